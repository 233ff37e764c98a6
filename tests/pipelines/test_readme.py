"""The README tells what the committed metrics say."""

import json
import re

import pytest
from workspace import REPOSITORY

from pipelines.params import read_params
from pipelines.report.summary import table

README = (REPOSITORY / "README.md").read_text()


def test_results_table_is_that_of_the_committed_metrics() -> None:
    runs = read_params(REPOSITORY / "params.yaml")["runs"]
    block = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", README, re.DOTALL)
    assert block is not None
    assert block[1].splitlines() == table(REPOSITORY, runs)


def test_named_files_exist() -> None:
    for name in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize(
    ("key", "floor"),
    [
        ("any_valid@20", 0.93),
        ("coverage@20", 0.85),
        ("coverage_multi@20", 0.60),
        ("best_of_value@20", 0.75),
        ("accuracy", 0.45),
    ],
)
def test_committed_metrics_are_above_the_floors(key: str, floor: float) -> None:
    path = REPOSITORY / "results/nqueens8_gram/metrics.json"
    assert json.loads(path.read_text())[key] >= floor
