"""The report as a whole: what is on the page and what is in the CSVs."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipelines.report.build import build

SECTIONS = ["results", "training", "width", "depth", "solutions", "halting", "boards", "data"]
Settings = Mapping[str, Any]


class Page(HTMLParser):
    """Ids, loads, links and chart specifications of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.boards: list[str] = []
        self.specs: list[Any] = []
        self._json = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [found[k] for k in ("src", "srcset", "data", "poster") if k in found]
        self.links += [found["href"]] if "href" in found else []
        if "board" in found.get("class", "").split():
            self.boards.append(found["aria-label"])
        self._json = found.get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        if self._json and data.strip():
            self.specs.append(json.loads(data))


@pytest.fixture(scope="module")
def out(workspace: Path, runs: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    build(workspace, runs, folder)
    return folder


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "index.html").read_text())


def test_page_has_every_section_and_figure(page: Page, out: Path) -> None:
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert {f"#{name}" for name in SECTIONS} <= set(page.links)
    titles = [spec["description"] for spec in page.specs]
    # Eight training panels, six by width, three by depth, three by solutions, one halting a run.
    assert len(titles) == 8 + 6 + 3 + 3 + 2
    text = (out / "index.html").read_text()
    for words in ("Not like for like", "99.7", "90.3", "symmetric twin", "perfect deterministic"):
        assert (words in text) == (words not in ("99.7", "90.3", "Not like for like")), words


def test_page_loads_nothing(page: Page, out: Path) -> None:
    text = (out / "index.html").read_text()
    assert page.loads == []
    assert all(link.startswith("#") for link in page.links)
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in markup and "@import" not in markup and "url(" not in markup
    assert len(text) < 4_000_000
    assert not any("url" in json.dumps(spec) for spec in page.specs)


def test_results_agree_with_metrics(out: Path, workspace: Path, runs: Settings) -> None:
    table = pl.read_csv(out / "tables/results.csv")
    for name in runs:
        numbers = json.loads((workspace / "results" / name / "metrics.json").read_text())
        for row in table.filter(pl.col("run") == name).iter_rows(named=True):
            assert row["value"] == numbers[row["metric"]]
            assert row["low"] == numbers[row["metric"] + "_low"]
            assert row["high"] == numbers[row["metric"] + "_high"]
        assert len(table.filter(pl.col("run") == name)) * 3 == len(numbers)
        shown = f"{100 * numbers['coverage_multi@5']:.1f}"
        assert f'<span class="value">{shown}</span>' in (out / "index.html").read_text()


def test_scaling_agrees_with_metrics(out: Path, workspace: Path, runs: Settings) -> None:
    numbers = json.loads((workspace / "results/gram/metrics.json").read_text())
    width = pl.read_csv(out / "tables/width_scaling.csv").filter(pl.col("run") == "gram")
    for n in (1, 2, 5):
        row = width.filter((pl.col("width") == n) & (pl.col("metric") == "any_valid"))
        assert row["value"].item() == numbers[f"any_valid@{n}"]
        assert row["high"].item() == numbers[f"any_valid@{n}_high"]
    depth = pl.read_csv(out / "tables/depth_scaling.csv").filter(pl.col("run") == "gram")
    assert depth["depth"].unique().sort().to_list() == [2, 4, 8]
    row = depth.filter((pl.col("depth") == 4) & (pl.col("metric") == "accuracy"))
    assert row["value"].item() == numbers["accuracy"]


def test_other_tables(out: Path) -> None:
    halting = pl.read_csv(out / "tables/halting.csv")
    assert halting.group_by("run").agg(pl.col("share").sum().round(9))["share"].to_list() == [1, 1]
    training = pl.read_csv(out / "tables/training.csv")
    twin = training.filter(pl.col("run") == "twin")
    assert set(twin["path"]) == {"prior"}, "without guidance there is no posterior"
    points = training.select("run", "path", "term", "step")
    assert points.n_unique() == len(points), "one curve a run, path and term"
    gram = training.filter((pl.col("run") == "gram") & (pl.col("path") == "posterior"))
    assert set(gram["term"]) == {"reconstruction", "token_accuracy", "exact", "kl"}
    solutions = pl.read_csv(out / "tables/by_solution_count.csv")
    single = solutions.filter((pl.col("solution_count") == 1) & (pl.col("metric") == "coverage"))
    assert single["ideal"].to_list() == [1.0, 1.0]
    assert pl.read_csv(out / "tables/paper.csv").is_empty(), "the paper has no 7x7"


def test_boards_show_what_trajectories_answered(out: Path, page: Page) -> None:
    table = pl.read_csv(out / "tables/gallery.csv")
    votes = table.group_by("run", "puzzle_id").agg(pl.col("trajectories").sum())
    assert votes["trajectories"].unique().to_list() == [5]
    same = table.group_by("run").agg(pl.col("puzzle_id").unique().sort())
    assert same["puzzle_id"][0].to_list() == same["puzzle_id"][1].to_list()
    answered = table.filter((pl.col("trajectories") > 0) & pl.col("valid"))
    assert sum(label.startswith("valid answer") for label in page.boards) == len(answered)
    missed = len(table.filter(pl.col("trajectories") == 0))
    assert sum(label.startswith("solution that was not") for label in page.boards) == missed


def test_rebuild_is_byte_identical(
    out: Path, workspace: Path, runs: Settings, tmp_path: Path
) -> None:
    build(workspace, runs, tmp_path)
    written = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert written == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in written:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("by", ["input", "orbit"])
def test_two_tasks_and_the_paper(
    workspace: Path, runs: Settings, tmp_path: Path, make_workspace: Callable[..., None], by: str
) -> None:
    """An 8x8 task on the paper's split stands beside the paper, on another it does not; charts
    keep tasks apart."""
    root = tmp_path / "root"
    shutil.copytree(workspace, root)
    task = {"kind": "nqueens", "remove": [6, 7], "split": {"by": by, "test": 0.05}}
    other = {**runs["gram"], "task": "eight"}
    make_workspace(tmp_path / "eight", {"other": other}, task)
    shutil.copytree(tmp_path / "eight/data/queens", root / "data/eight")
    shutil.copytree(tmp_path / "eight/models/other", root / "models/other")
    shutil.copytree(tmp_path / "eight/results/other", root / "results/other")
    build(root, {**runs, "other": other}, tmp_path / "out", {"eight": task})
    text = (tmp_path / "out/index.html").read_text()
    for words in ("Not like for like", "99.7", "90.3"):
        assert (words in text) == (by == "input"), words
    for words in ("symmetry orbit", "; 0 of the test inputs"):
        assert (words in text) == (by == "orbit"), words
    assert len(pl.read_csv(tmp_path / "out/tables/paper.csv")) == (8 if by == "input" else 0)
    assert len(Page(text).specs) == 8 + 2 * (6 + 3 + 3) + 3
