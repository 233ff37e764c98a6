"""dvc.yaml: every stage depends on the code it imports; one changed key reruns what it must."""

import json
import subprocess
from pathlib import Path
from typing import Any

import grimp
import pytest
from checkout import commit, copy_code, git
from ruamel.yaml import YAML
from workspace import REPOSITORY, child_environment

from pipelines.profiles import compose

PACKAGES = ("gram_core", "pipelines", "stages")
DVC: dict[str, Any] = YAML(typ="safe", pure=True).load((REPOSITORY / "dvc.yaml").read_text())


def test_one_file_a_stage() -> None:
    files = {path.stem for path in (REPOSITORY / "stages").glob("*.py")} - {"__init__"}
    assert files == set(DVC["stages"])
    for name, stage in DVC["stages"].items():
        body = stage.get("do", stage)
        assert body["cmd"].startswith(f"python -m stages.{name}")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


@pytest.mark.parametrize("stage", DVC["stages"])
def test_dependencies_are_the_imports(stage: str, graph: grimp.ImportGraph) -> None:
    body = DVC["stages"][stage].get("do", DVC["stages"][stage])
    declared = [dep for dep in body["deps"] if dep.split("/")[0] in PACKAGES]
    module = f"stages.{stage}"
    imported = set()
    for name in graph.find_upstream_modules(module) | {module}:
        path = Path(*name.split("."))
        file = REPOSITORY / path.with_suffix(".py")
        # A package's own file is empty here.
        if file.is_file():
            imported.add(path.with_suffix(".py").as_posix())
        else:
            assert (REPOSITORY / path / "__init__.py").read_text().strip() == "" or (
                f"{path.as_posix()}" in declared
            )

    def covers(dep: str, file: str) -> bool:
        return file == dep or file.startswith(f"{dep}/")

    assert [file for file in imported if not any(covers(dep, file) for dep in declared)] == []
    assert [dep for dep in declared if not any(covers(dep, file) for file in imported)] == []


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own with the smoke profile's first task rebuilt in it."""
    path = tmp_path_factory.mktemp("clone")
    copy_code(path)
    git(path, "init", "-q")
    commit(path)
    whole = YAML(typ="safe").load((REPOSITORY / "pipelines/conf/profile/smoke.yaml").read_text())
    kept = {"tasks": {"nqueens5"}, "runs": {"smoke_gram", "smoke_twin"}}
    others = [f"~{part}.{name}" for part in kept for name in set(whole[part]) - kept[part]]
    compose("smoke", path / "params.yaml", others)
    done = dvc(path, "repro")
    assert done.returncode == 0, done.stderr
    return path


def dvc(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**child_environment(), "PYTHONPATH": str(path)}
    return subprocess.run(
        ["dvc", *arguments],
        cwd=path, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def changed(path: Path) -> set[str]:
    """The stages that `dvc repro` would run because of their own inputs."""
    return set(json.loads(dvc(path, "status", "--json").stdout))


@pytest.mark.ray
def test_smoke_profile_rebuilds_and_is_up_to_date(clone: Path) -> None:
    assert changed(clone) == set()
    page = (clone / "report/index.html").read_text()
    assert "smoke_gram" in page
    assert "smoke_twin" in page
    for run in ("smoke_gram", "smoke_twin"):
        metrics = json.loads((clone / "results" / run / "metrics.json").read_text())
        assert 0 <= metrics["coverage@4"] <= 1
    assert "bound" in json.loads((clone / "results/smoke_gram/metrics.json").read_text())


def edit(text: str, path: str, old: str, new: str) -> str:
    """`text` with `old` replaced by `new` after the keys of `path`."""
    start = 0
    for part in path.split("."):
        start = text.index(f"{part}:", start)
    assert old in text[start:]
    return text[:start] + text[start:].replace(old, new, 1)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        ("runs.smoke_gram.train", "steps: 20", "steps: 22", {"train@smoke_gram"}),
        (
            "runs.smoke_gram.sample", "depth: 2", "depth: 1",
            {"sample@smoke_gram", "evaluate@smoke_gram"},
        ),
        ("runs.smoke_gram.evaluate", "- 4", "- 3", {"evaluate@smoke_gram"}),
    ],
)  # fmt: skip
def test_one_key_concerns_its_run_alone(
    clone: Path, path: str, old: str, new: str, expected: set[str]
) -> None:
    file = clone / "params.yaml"
    before = file.read_text()
    file.write_text(edit(before, path, old, new))
    try:
        assert changed(clone) == {*expected, "report"}
    finally:
        file.write_text(before)
    assert changed(clone) == set()


@pytest.mark.ray
def test_one_key_reruns_its_runs_stages_and_the_report(clone: Path) -> None:
    file = clone / "params.yaml"
    file.write_text(edit(file.read_text(), "runs.smoke_twin.train", "batch: 16", "batch: 12"))
    done = dvc(clone, "repro")
    assert done.returncode == 0, done.stderr
    ran = [line.split("'")[1] for line in done.stdout.splitlines() if "Running stage" in line]
    twin = ["train@smoke_twin", "sample@smoke_twin", "evaluate@smoke_twin"]
    assert ran == [*twin, "report"]


@pytest.mark.ray
def test_metrics_and_plots_are_dvcs(clone: Path) -> None:
    shown = json.loads(dvc(clone, "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    assert {"models/smoke_gram/metrics.json", "results/smoke_twin/metrics.json"} <= set(files)
    difference = dvc(clone, "metrics", "diff", "--json")
    assert difference.returncode == 0
    plots = dvc(clone, "plots", "show", "--json")
    assert plots.returncode == 0
    assert "smoke_gram" in plots.stdout


@pytest.mark.ray
def test_a_bad_setting_stops_repro_and_leaves_the_results(clone: Path) -> None:
    file = clone / "params.yaml"
    before = file.read_text()
    page = (clone / "report/index.html").read_bytes()
    metrics = (clone / "models/smoke_gram/metrics.json").read_bytes()
    file.write_text(before.replace("steps: 20", "steps: -1", 1))
    try:
        done = dvc(clone, "repro")
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "runs.smoke_gram.train.steps" in lines[0]
        assert "Traceback" not in done.stderr
        assert (clone / "report/index.html").read_bytes() == page
        assert (clone / "models/smoke_gram/metrics.json").read_bytes() == metrics
    finally:
        file.write_text(before)
    assert changed(clone) == set()
