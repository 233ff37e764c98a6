"""Builds the report: one self-contained HTML page, and the data of every table and plot as CSV.

The page is a function of its inputs alone, without date or chance. Everything is computed before
anything is written, so a missing input (`ReportError`) leaves the earlier report as it was.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gram_core.files import write_atomic
from pipelines.report import boards, figures, gallery, results, series, summary, sweeps
from pipelines.report.inputs import ReportError, RunInputs, TaskInputs, read_run, read_task
from pipelines.report.layout import Figure
from pipelines.report.sweep_section import Section, section

__all__ = ["ReportError", "build"]

TEMPLATES = Path(__file__).parent / "templates"


def build(
    root: Path,
    runs: Mapping[str, Mapping[str, Any]],
    out: Path,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write `out/index.html` and `out/tables/*.csv` from the files of `runs` under `root`,
    and from the sweeps found there.

    `runs` and `tasks` are the mappings of that name in params.yaml; where `tasks` is left out, a
    task's settings are taken from what its tables say made them. Runs that stop at the first valid
    answer (`sample.stop_when_verified`) are left out. Raises `ReportError` where a
    file is missing, damaged or without a number that the page needs.
    """
    for name, settings in runs.items():
        if not isinstance(settings, Mapping) or not settings.get("task"):
            raise ReportError(f"params.yaml: runs.{name}: names no task")
        if not isinstance(settings.get("sample", {}), Mapping):
            raise ReportError(f"params.yaml: runs.{name}.sample: expected a mapping")
    # Where the first valid answer ends a puzzle there is nothing to compare with other runs.
    runs = {
        name: settings
        for name, settings in runs.items()
        if not settings.get("sample", {}).get("stop_when_verified")
    }
    if not runs:
        raise ReportError(
            "params.yaml: runs is empty, or all stop when verified; a report needs at least one run"
        )
    read = [read_run(root, name, settings) for name, settings in runs.items()]
    names = list(dict.fromkeys(run.task for run in read))
    read_tasks = [read_task(root, name, (tasks or {}).get(name, {})) for name in names]
    searched = sweeps.read_sweeps(root)
    by_task = [(task, [run for run in read if run.task == task.name]) for task in read_tasks]
    shown = [(task, gallery.gallery(task, its)) for task, its in by_task if task.conditional]
    samples = [(task, gallery.samples(its)) for task, its in by_task if not task.conditional]
    judged = [run.name for task, its in by_task for run in its if task.judged]
    alone = [run.name for task, its in by_task for run in its if not task.conditional]
    frames = {
        "training": series.training(read, judged),
        "width_scaling": series.unchosen(series.scaling(read, "width"), alone),
        "depth_scaling": series.unchosen(series.scaling(read, "depth"), alone),
        "by_solution_count": series.by_solutions(read),
        "halting": series.halting(read, judged),
    }
    page = _render(
        read=read,
        by_task=by_task,
        figures=_figures(frames, by_task, [run.name for run in read]),
        galleries=[(task, puzzles, boards.renderer(task.settings)) for task, puzzles in shown],
        samples=[(task, its, boards.renderer(task.settings)) for task, its in samples],
        sweeps=[section(sweep) for sweep in searched],
    )
    csv = {
        "results": series.results(read),
        "runs": _runs_table(read),
        "paper": _paper_table(read_tasks),
        **frames,
        "gallery": pl.concat(
            [gallery.gallery_table(p, task.name) for task, p in shown]
            + [gallery.samples_table(its, task.name) for task, its in samples]
        ),
        "sweeps": sweeps.frame(searched),
    }
    for name, frame in csv.items():
        write_atomic(out / "tables" / f"{name}.csv", frame.write_csv().encode())
    write_atomic(out / "index.html", page.encode())


def _figures(
    frames: Mapping[str, pl.DataFrame],
    by_task: Sequence[tuple[TaskInputs, list[RunInputs]]],
    names: Sequence[str],
) -> dict[str, list[tuple[str, Figure]]]:
    """Figures by section, each with the task it is about (empty: all runs together). Runs of
    different tasks never share a chart whose reference lines depend on the task."""
    sections: dict[str, list[tuple[str, Figure]]] = {
        "training": [("", figures.training(frames["training"], names))],
        "width": [],
        "depth": [],
        "solutions": [],
    }
    for task, runs in by_task:
        if not task.judged:
            continue
        title = task.name if len(by_task) > 1 else ""
        its = pl.col("run").is_in([run.name for run in runs])
        trained = {run.name: run.model.get("N_sup", "?") for run in runs}
        width, depth, count = (
            frames[name].filter(its)
            for name in ("width_scaling", "depth_scaling", "by_solution_count")
        )
        # Of one input whose answers nobody has counted there is nothing by width.
        if task.conditional or "coverage" in width["metric"]:
            sections["width"].append((title, figures.width(width, names)))
        sections["depth"].append((title, figures.depth(depth, names, trained)))
        if task.conditional and not count.is_empty():
            sections["solutions"].append((title, figures.solutions(count, names)))
    limits = {run.name: run.depths[-1] for _, runs in by_task for run in runs}
    sections["halting"] = [("", figures.halting(frames["halting"], limits))]
    return sections


def _render(
    *,
    read: Sequence[RunInputs],
    by_task: Sequence[tuple[TaskInputs, list[RunInputs]]],
    figures: Mapping[str, Any],
    galleries: Sequence[Any],
    samples: Sequence[Any],
    sweeps: Sequence[Section],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = _script_json
    page: str = environment.get_template("index.html.j2").render(
        runs=read,
        revisions=sorted({run.revision for run in read if run.revision}),
        tasks=[
            {
                "task": task,
                "runs": runs,
                "rows": results.metric_rows(task, runs),
                "own": results.own_rows(task, runs),
                "comparison": results.comparison(task, runs),
                "split": results.split_sentence(task),
                "width": results.widths(runs),
            }
            for task, runs in by_task
        ],
        overview=[(run, summary.row(run.metrics)) for run in read] if len(by_task) > 1 else [],
        columns=[title for _, title in summary.COLUMNS],
        likelihood=results.likelihood_rows(read),
        facts=list(
            zip(results.FACTS, zip(*map(results.run_facts, read), strict=True), strict=True)
        ),
        figures=figures,
        galleries=galleries,
        samples=samples,
        sweeps=sweeps,
        style=(TEMPLATES / "style.css").read_text(),
        script=(TEMPLATES / "page.js").read_text(),
        vega=_vega_bundle(),
    )
    return page


def _vega_bundle() -> str:
    """Vega-Lite and all it needs, as one script that loads nothing."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if "</script" in bundle.lower():
        raise ReportError("vl-convert-python: its JavaScript bundle would end the script element")
    return bundle


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False
    )
    return text.replace("<", "\\u003c")


def _runs_table(read: Sequence[RunInputs]) -> pl.DataFrame:
    rows = [
        [run.name, run.task, *results.run_facts(run), run.training.get("train_seconds")]
        for run in read
    ]
    return pl.DataFrame(rows, schema=["run", "task", *results.FACTS, "train_seconds"], orient="row")


def _paper_table(tasks: Iterable[TaskInputs]) -> pl.DataFrame:
    records = [
        (task.name, row.method, row.parameters, *row.accuracy, *row.coverage)
        for task in tasks
        for row in results.comparison(task, []).published
    ]
    text = dict.fromkeys(("task", "method", "parameters"), pl.String)
    columns = ("accuracy", "accuracy_sd", "coverage", "coverage_sd")
    schema = {**text, **dict.fromkeys(columns, pl.Float64)}
    return pl.DataFrame(records, schema=schema, orient="row")
