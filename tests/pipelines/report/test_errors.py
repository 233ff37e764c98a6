"""What stops the report: one line that names the file or setting, and the earlier report intact."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.report.build import ReportError, build

Settings = Mapping[str, Any]


@pytest.mark.parametrize(
    "missing",
    [
        "models/gram/config.json",
        "models/gram/metrics.json",
        "models/gram/history.csv",
        "results/twin/metrics.json",
        "results/twin/puzzles.parquet",
        "results/twin/trajectories.parquet",
        "data/queens/test.parquet",
        "data/queens/raw/metadata.json",
    ],
)
def test_missing_file_is_named(
    workspace: Path, runs: Settings, tmp_path: Path, missing: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(workspace, root)
    (root / missing).unlink()
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("earlier")
    with pytest.raises(ReportError) as error:
        build(root, runs, out)
    assert missing in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in out.iterdir()] == ["index.html"]
    assert (out / "index.html").read_text() == "earlier"


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("results/gram/metrics.json", "{}", "has no 'accuracy'"),
        ("results/gram/metrics.json", "[1", "cannot be read as JSON"),
        ("results/gram/metrics.json", "[1]", "expected a JSON object"),
        ("models/gram/config.json", "{}", "has no 'model' settings"),
        ("results/gram/metrics.json", '{"accuracy": NaN}', "NaN is no number"),
        ("models/gram/history.csv", "step,lr\n", "no rows"),
        ("models/gram/history.csv", "step,reconstruction\n2,nan\n", "that are not finite"),
        ("models/gram/history.csv", "step,lr\nx,y\n", "not a training history"),
        ("results/gram/puzzles.parquet", "no", "not a readable Parquet file"),
    ],
)
def test_damaged_file_is_named(
    workspace: Path, runs: Settings, tmp_path: Path, path: str, content: str, words: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(workspace, root)
    (root / path).write_text(content)
    with pytest.raises(ReportError, match=re.escape(words)) as error:
        build(root, runs, tmp_path / "out")
    assert path in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": ""}, "names no task"),
        ({"sample": {"dept": 4}}, "runs.gram.sample.dept: unknown key"),
        ({"sample": {"depth": 5}}, "has no depth 5"),
        ({"evaluate": {"widths": [3]}}, "has no width 3"),
    ],
)
def test_settings_that_do_not_fit(
    workspace: Path, runs: Settings, tmp_path: Path, change: Settings, words: str
) -> None:
    with pytest.raises(ReportError, match=re.escape(words)):
        build(workspace, {"gram": {**runs["gram"], **change}}, tmp_path)
    with pytest.raises(ReportError, match="runs is empty"):
        build(workspace, {}, tmp_path)
