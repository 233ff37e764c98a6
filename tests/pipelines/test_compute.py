import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_threads_are_set_together_with_the_width_of_products():
    # Whoever computes sets its threads; `cost.py` only gives back those that it had.
    found = [
        (path.relative_to(REPOSITORY).as_posix(), node.lineno)
        for folder in ("gram_core", "pipelines", "stages", "benchmarks")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "set_num_threads"
    ]
    assert [path for path, _ in found] == ["pipelines/compute.py", "pipelines/cost.py"], found
