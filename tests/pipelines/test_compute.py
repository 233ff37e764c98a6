import ast
from pathlib import Path

import pytest
import torch

from pipelines.compute import compute_with

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


def test_convolutions_in_float32_are_float32_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; torch allows TF32 by itself."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    compute_with(torch.get_num_threads())
    assert not torch.backends.cudnn.allow_tf32
