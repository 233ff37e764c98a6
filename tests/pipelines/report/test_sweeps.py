"""Sweeps in the report: reductions, axes, and what the page and its CSV hold."""

import json
import math
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import vl_convert

from gram_core import tables
from pipelines.report.build import ReportError, build
from pipelines.report.sweep_axes import ABSENT, axis, short_names, show
from pipelines.report.sweep_section import section
from pipelines.report.sweeps import Sweep, frame, read_sweeps

Settings = Mapping[str, Any]
MADE = {"sweep": "s", "run": "gram", "metric": "prior_valid", "mode": "max"}
LR = "train.optim.lr"
NAN = float("nan")


def write_sweep(
    root: Path, trials: Sequence[Mapping[str, Any]], name: str = "s", **made: str
) -> Path:
    """Write a sweep; a trial is its params, its values by report, and a state."""
    rows = []
    for number, trial in enumerate(trials):
        values = trial.get("values", [])
        common = {
            "sweep": name,
            "trial": f"t{number:03}",
            "number": number,
            "state": trial.get("state", "TERMINATED"),
            "params": [(key, json.dumps(value)) for key, value in trial["params"].items()],
        }
        if not values:
            rows.append({**common, "step": 0, "seconds": 1.5, "metrics": []})
        for i, value in enumerate(values, 1):
            metrics = [("kl", 0.1), *([("prior_valid", value)] if value is not None else [])]
            rows.append({**common, "step": 10 * i, "seconds": 30.0 * i, "metrics": metrics})
    random.Random(0).shuffle(rows)  # the order of rows means nothing
    path = root / "results/sweeps" / name / "trials.parquet"
    schema = tables.trials_schema()
    tables.write(path, pa.Table.from_pylist(rows, schema), schema, {**MADE, "sweep": name, **made})
    return path


def one(root: Path, trials: Sequence[Mapping[str, Any]], **made: str) -> Sweep:
    write_sweep(root, trials, **made)
    (sweep,) = read_sweeps(root)
    return sweep


def lr(value: float, *values: float | None, state: str = "TERMINATED") -> dict[str, Any]:
    return {"params": {LR: value}, "values": values, "state": state}


FEW = [
    lr(1e-3, 0.1, 0.2, 0.3),
    lr(1e-2, 0.9, 0.25),
    lr(1e-1, state="ERROR"),
    lr(3e-3, 0.2, 0.4, 0.5),
    lr(1e-4, 0.2, None, None),
    lr(2e-3, 0.3, NAN, state="ERROR"),
    lr(5e-3, 0.4, state="RUNNING"),
]


@pytest.mark.parametrize(
    ("mode", "best", "so_far", "order"),
    [
        ("max", 3, [0.3, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5], [3, 6, 0, 1, 4, 2, 5]),
        ("min", 4, [0.3, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2], [4, 1, 0, 6, 3, 2, 5]),
    ],
)
def test_reductions(
    tmp_path: Path, mode: str, best: int, so_far: list[float], order: list[int]
) -> None:
    sweep = one(tmp_path, FEW, mode=mode)
    assert [t.number for t in sweep.trials] == list(range(7))
    assert [t.place for t in sweep.trials] == [0.3, 0.25, None, 0.5, 0.2, None, 0.4]
    assert sweep.trials[2].value is None and math.isnan(sweep.trials[5].value or 0)
    assert [t.reports for t in sweep.trials] == [3, 2, 0, 3, 3, 2, 1]
    assert [t.step for t in sweep.trials] == [30, 20, 0, 30, 30, 20, 10]
    assert sweep.best is not None and sweep.best.number == best
    assert sweep.best_so_far() == so_far
    assert [t.number for t in sweep.ranked()] == order
    full, early = "ran to the end", "stopped early"
    outcomes = [full, early, "failed", full, full, "failed", "running"]
    assert [sweep.outcome(t) for t in sweep.trials] == outcomes


def test_a_trial_of_its_own_steps_ran_to_its_end(tmp_path: Path) -> None:
    short, long = ({"params": {"train.steps": n * 10}, "values": [0.1] * n} for n in (2, 3))
    cut = {"params": {"train.steps": 30}, "values": [0.1] * 2}
    sweep = one(tmp_path, [short, long, cut])
    wanted = ["ran to the end", "ran to the end", "stopped early"]
    assert [sweep.outcome(trial) for trial in sweep.trials] == wanted


def test_ties_go_to_the_first_trial(tmp_path: Path) -> None:
    for mode in ("max", "min"):
        sweep = one(tmp_path, [lr(1.0, 0.5), lr(2.0, 0.5)], mode=mode)
        assert sweep.best is sweep.trials[0]


def test_summary_says_how_the_sweep_went(tmp_path: Path) -> None:
    assert section(one(tmp_path, FEW)).summary == (
        "Run gram, 7 trials: 3 ran to the end, 1 stopped early (before the last of their "
        "steps), 2 failed, 1 running. Judged by prior_valid as a trial reported it last, "
        "the larger the better: trial 3 is best with 0.5. "
        "Wall time of all trials added up: 7.0 min."
    )


def test_numeric_axes() -> None:
    line = axis("dim", [10, 60, ABSENT, 110])
    assert line.places == [0.0, 0.5, None, 1.0] and line.ticks == [(0.0, "10"), (1.0, "110")]
    assert line.scale is not None and not line.scale.log
    log = axis("lr", [1e-4, 1e-2, 1e-3])
    assert log.places == pytest.approx([0, 1, 0.5]) and log.ticks[0] == (0.0, "0.0001")
    assert log.scale is not None and log.scale.log and log.scale.at(0.5) == pytest.approx(1e-3)
    for values in ([1, 20], [0, 100], [-1, 50]):
        scale = axis("x", values).scale
        assert scale is not None and not scale.log, values
    same = axis("x", [3, 3.0])
    assert same.places == [0.5, 0.5] and same.ticks == [(0.5, "3")]


def test_categorical_axes() -> None:
    mixed = axis("x", ["b", True, None, "a", 2, False, ABSENT, [1]])
    assert [label for _, label in mixed.ticks] == ["null", "false", "true", "2", "a", "b", "[1]"]
    assert mixed.places == pytest.approx([5 / 6, 2 / 6, 0, 4 / 6, 3 / 6, 1 / 6, None, 1])
    assert axis("x", ["adam", "adam"]).ticks == [(0.5, "adam")]
    many = axis("x", [f"n{i:02}" for i in range(12)])
    assert many.ticks == [(0.0, "n00"), (1.0, "n11")] and many.places[3] == pytest.approx(3 / 11)
    assert axis("x", [1.0, math.inf]).scale is None
    assert axis("x", [ABSENT]).ticks == []


def test_names_and_values_as_text() -> None:
    keys = ["train.optim.lr", "model.lr", "train.batch", "lr"]
    assert short_names(keys) == ["optim.lr", "model.lr", "batch", "lr"]
    values = [True, None, "x", 3, 0.123456, 1e-5, NAN, {"b": 1}, ABSENT]
    shown = ["true", "null", "x", "3", "0.1235", "1e-05", "nan", '{"b": 1}', "–"]
    assert [show(value) for value in values] == shown


EDGES: dict[str, list[dict[str, Any]]] = {
    "several": FEW,
    "one trial": [{"params": {LR: 0.1, "model.dim": 64}, "values": [0.2, 0.3]}],
    "one parameter": [lr(0.1, 0.2), lr(0.2, 0.3)],
    "no parameter": [{"params": {}, "values": [0.1]}, {"params": {}, "values": [0.2]}],
    "all failed": [lr(0.1, state="ERROR"), lr(0.2, state="ERROR")],
    "all NaN": [lr(0.1, NAN), lr(0.2, NAN, math.inf)],
    "same value": [lr(0.1, 0.2), lr(0.2, 0.2), lr(0.3, 0.2)],
    "constant parameter": [{"params": {"a": 1, "b": i}, "values": [i / 9]} for i in range(3)],
    "log metric": [lr(0.1, 0.001), lr(0.2, 0.01), lr(0.3, 900.0)],
    "kinds": [
        {"params": {"a": True, "b": "<i>&", "c": None, "d": [1, 2]}, "values": [0.1]},
        {"params": {"a": False, "b": "y", "c": 3, "e": 1}, "values": [0.4]},
    ],
    "pending": [lr(0.1, 0.2), lr(0.2, state="PENDING")],
    "many": [{"params": {f"p.{i}": i * n for i in range(12)}, "values": [n]} for n in range(30)],
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_every_sweep_makes_charts_that_compile(tmp_path: Path, case: str, mode: str) -> None:
    shown = section(one(tmp_path, EDGES[case], mode=mode))
    assert len(shown.figures) == (1 if case in ("all failed", "all NaN") else 2)
    assert len(shown.rows) == min(10, len(EDGES[case]))
    for figure in shown.figures:
        for panel in figure.panels:
            text = json.dumps(panel.spec, allow_nan=False)
            svg = vl_convert.vegalite_to_svg({**json.loads(text), "width": 900})
            assert "NaN" not in re.sub(r">[^<]*<|aria-label=\"[^\"]*\"", "", svg)
            assert "<path" in svg


def test_parallel_chart_draws_each_trial(tmp_path: Path) -> None:
    parallel, progress = section(one(tmp_path, FEW)).figures
    svg = vl_convert.vegalite_to_svg({**parallel.panels[0].spec, "width": 900})
    assert svg.count('stroke="var(--best)"') == 1
    assert svg.count('stroke-dasharray="4,3"') == 2, "failed and NaN"
    assert len(re.findall(r'stroke="var\(--shade-\d\)"', svg)) == 4
    for label in ("lr", "prior_valid", "0.0001", "0.1", "0.2", "0.5"):
        assert f">{label}</text>" in svg
    assert "prior_valid: 0.3; train.optim.lr: 0.001" in unescape(svg).replace("&quot;", ""), svg
    labels = [key.label for key in parallel.legend]
    assert labels == ["best: trial 3", "0.38 to 0.44", "0.26 to 0.32", "0.2 to 0.26", "no value"]
    assert progress.legend[0].label.startswith("best so far")


def test_trials_are_counted_in_whole_numbers(tmp_path: Path) -> None:
    for count, ticks in ((1, [0]), (2, [0, 1]), (45, list(range(0, 45, 3)))):
        trials = [lr(0.1, float(n)) for n in range(count)]
        spec = section(one(tmp_path / str(count), trials)).figures[1].panels[0].spec
        assert spec["layer"][0]["encoding"]["x"]["axis"]["values"] == ticks


def test_lines_break_where_a_trial_has_no_value(tmp_path: Path) -> None:
    spec = section(one(tmp_path, EDGES["kinds"])).figures[0].panels[0].spec
    svg = vl_convert.vegalite_to_svg({**spec, "width": 900})
    (best,) = re.findall(r'd="([^"]*)"[^>]*stroke="var\(--best\)"', svg)
    assert best.count("M") == 2 and best.count("L") == 3, "a b c, not d, e and the metric"


@pytest.fixture
def root(workspace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workspace, tmp_path / "root")
    return tmp_path / "root"


def test_page_has_a_section_a_sweep(root: Path, runs: Settings, tmp_path: Path) -> None:
    write_sweep(root, FEW, "width study")
    write_sweep(root, EDGES["kinds"], "kinds", mode="min")
    build(root, runs, tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    assert re.findall(r'<section id="(sweep-[^"]*)"', text) == [
        "sweep-kinds",
        "sweep-width%20study",
    ]
    assert re.findall(r'href="#(sweep-[^"]*)"', text) == ["sweep-kinds", "sweep-width%20study"]
    assert "<h2>Sweep width study</h2>" in text and "trial 3 is best with 0.5" in text
    first = text.index('<section id="sweep-width')
    body = text[first : text.index("</section>", first)]
    numbers = re.findall(r'<th scope="row" class="num">(\d+)</th>', body)
    assert numbers == ["3", "6", "0", "1", "4", "2", "5"]
    assert body.count('<tr class="aim">') == 1 and "<small>, stopped early</small>" in body
    assert "train.<wbr>optim.<wbr>lr" in body and '<td class="num">0.003</td>' in body
    assert '<td class="num">nan</td>' in body and "All 7 trials" in body
    assert "&lt;i&gt;&amp;" in text and "<i>&" not in text
    assert text.count('class="chart"') == len(re.findall(r'type="application/json"', text))
    build(root, runs, tmp_path / "again")
    assert (tmp_path / "again/index.html").read_text() == text


def test_csv_has_a_row_a_trial(root: Path, runs: Settings, tmp_path: Path) -> None:
    write_sweep(root, FEW, "b")
    write_sweep(root, EDGES["kinds"], "a")
    build(root, runs, tmp_path / "out")
    table = pl.read_csv(tmp_path / "out/tables/sweeps.csv")
    assert table["sweep"].to_list() == ["a"] * 2 + ["b"] * 7
    b = table.filter(pl.col("sweep") == "b")
    assert b["best_so_far"].to_list() == [0.3, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5]
    assert b["value"].fill_nan(None).to_list() == [0.3, 0.25, None, 0.5, 0.2, None, 0.4]
    assert b[f"params.{LR}"].to_list() == [1e-3, 1e-2, 1e-1, 3e-3, 1e-4, 2e-3, 5e-3]
    a = table.filter(pl.col("sweep") == "a")
    assert a["params.a"].to_list() == [True, False] and a["params.b"].to_list() == ["<i>&", "y"]
    assert a["params.c"].to_list() == ["null", "3"] and a["params.e"].to_list() == [None, 1]


def test_nothing_of_sweeps_without_one(root: Path, runs: Settings, tmp_path: Path) -> None:
    """A sweep that was removed leaves nothing behind on the page or in the CSV."""
    build(root, runs, tmp_path / "never")
    write_sweep(root, FEW)
    build(root, runs, tmp_path / "out")
    shutil.rmtree(root / "results/sweeps")
    (root / "results/sweeps/unfinished").mkdir(parents=True)
    build(root, runs, tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    assert text == (tmp_path / "never/index.html").read_text()
    assert "Sweep" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "sweeps.csv" not in text
    empty = pl.read_csv(tmp_path / "out/tables/sweeps.csv")
    assert empty.is_empty() and empty.columns == frame([]).columns


def test_damaged_sweeps_are_named(root: Path, runs: Settings, tmp_path: Path) -> None:
    path = write_sweep(root, FEW)
    out = tmp_path / "out"

    def fails(words: str) -> None:
        with pytest.raises(ReportError, match=re.escape(words)) as error:
            build(root, runs, out)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert not out.exists()

    path.write_text("no")
    fails("not a readable Parquet file")
    write_sweep(root, FEW, mode="most")
    fails("mode is 'most', expected 'max' or 'min'")
    schema = tables.trials_schema()
    good = tables.read(write_sweep(root, FEW), "trials")
    tables.write(path, good, schema, {"run": "gram", "mode": "max"})
    fails("its provenance has no 'metric'")
    params = pa.array([[("a", "{")]] * len(good), schema.field("params").type)
    tables.write(path, good.set_column(6, "params", params), schema, MADE)
    fails("a is '{', which is no JSON")
