"""Vega-Lite specifications of the report's charts, as plain mappings.

Colours are the page's CSS variables, so that a chart follows the light or dark scheme by itself.
Knows rows and marks; it knows nothing of runs' files or of where a chart stands on the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from pipelines.report.theme import CONFIG, OUTCOMES, REFERENCES, SHARE, Spec, colour, dash


def rounded(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows for the page, floats to five significant digits."""
    floats = pl.selectors.float()
    return frame.with_columns(floats.round_sig_figs(5)).to_dicts()


def chart(layers: Sequence[Spec], description: str, **more: Any) -> Spec:
    """A chart as wide as its place on the page."""
    size = {"width": "container", "height": 190, "autosize": {"type": "fit", "contains": "padding"}}
    return {"description": description, **size, "layer": list(layers), "config": CONFIG, **more}


def _by_run(runs: Sequence[str], *channels: str) -> Spec:
    """Encodings that tell runs apart."""
    numbers = range(len(runs))
    scales = {
        "color": {"domain": list(runs), "range": [colour(i) for i in numbers]},
        # Shared with the reference lines: a layered chart has one scale a channel.
        "strokeDash": {
            "domain": [*runs, *REFERENCES],
            "range": [*map(dash, numbers), *REFERENCES.values()],
        },
        "xOffset": {"domain": list(runs)},
    }
    field = {"field": "run", "type": "nominal"}
    legend: dict[str, Spec] = {"color": {"legend": None}, "strokeDash": {"legend": None}}
    return {name: {**field, "scale": scales[name], **legend.get(name, {})} for name in channels}


def _tip(fields: Mapping[str, str], share: bool) -> list[Spec]:
    """A tooltip of the fields, floats formatted."""
    tips = []
    for name, title in fields.items():
        kind = "nominal" if name in ("run", "reference", "outcome") else "quantitative"
        tip = {"field": name, "title": title, "type": kind}
        if name in ("value", "low", "high", "share"):
            tip["format"] = ".1%" if share else ".4~g"
        tips.append(tip)
    return tips


def curves(
    frame: pl.DataFrame, runs: Sequence[str], description: str, *, share: bool, top: float
) -> Spec:
    """Training curves: value over step, one line a run; `top` is the value axis's end."""
    y: Spec = {"field": "value", "type": "quantitative", "title": None}
    y["scale"] = {"domain": [0, top], "nice": not share}
    y["axis"] = {"format": ".0%" if share else "~r", "tickCount": 5}
    steps = {"tickCount": 4, "format": ",d", "grid": False}
    x = {"field": "step", "type": "quantitative", "title": "optimiser steps", "axis": steps}
    line = {"mark": {"type": "line", "strokeWidth": 2}}
    line["encoding"] = _by_run(runs, "color", "strokeDash")
    spots = {
        "mark": {"type": "circle", "opacity": 0, "size": 90},
        "encoding": {
            **_by_run(runs, "color"),
            "tooltip": _tip({"run": "run", "step": "step", "value": "value"}, share),
        },
    }
    data = {"values": rounded(frame)}
    return chart([line, spots], description, data=data, encoding={"x": x, "y": y})


def scaling(
    frame: pl.DataFrame,
    runs: Sequence[str],
    over: str,
    description: str,
    references: pl.DataFrame | None = None,
) -> Spec:
    """A metric over width or depth with its interval as a band; `references` has `reference`,
    `value` and the same x."""
    ticks = frame[over].unique().sort().to_list()
    names = {"width": "trajectories (N)", "depth": "supervision steps allowed"}
    scale = {"type": "log", "base": 2, "nice": False}
    x: Spec = {"field": over, "type": "quantitative", "title": names[over], "scale": scale}
    x["axis"] = {"values": ticks, "format": "d", "grid": False, "labelOverlap": True}
    share = {"format": ".0%", "tickCount": 5}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": SHARE, "axis": share}
    colours = _by_run(runs, "color")
    band = {
        "mark": {"type": "area", "opacity": 0.18},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **colours},
    }
    line = {
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {"x": x, "y": y, **_by_run(runs, "color", "strokeDash")},
    }
    fields = {"run": "run", over: names[over], "value": "value", "low": "low", "high": "high"}
    spots = {
        "mark": {"type": "circle", "size": 55, "opacity": 1},
        "encoding": {"x": x, "y": y, **colours, "tooltip": _tip(fields, True)},
    }
    layers = [band, line, spots]
    if references is not None and not references.is_empty():
        layers.insert(0, _references(references, runs, {"x": x, "y": y}, over))
    return chart(layers, description, data={"values": rounded(frame)})


def _references(frame: pl.DataFrame, runs: Sequence[str], place: Spec, over: str) -> Spec:
    """Grey lines for what an ideal sampler or a perfect deterministic solver gets."""
    tip = _tip({"reference": "reference", over: over.replace("_", " "), "value": "value"}, True)
    dashes = {**_by_run(runs, "strokeDash")["strokeDash"], "field": "reference"}
    return {
        "data": {"values": rounded(frame)},
        "mark": {"type": "line", "color": "var(--muted)", "strokeWidth": 1.4},
        "encoding": {**place, "strokeDash": dashes, "tooltip": tip},
    }


def by_count(
    frame: pl.DataFrame, runs: Sequence[str], description: str, references: pl.DataFrame
) -> Spec:
    """A metric for each number of solutions: a dot and its interval, runs side by side."""
    axis = {"labelAngle": 0, "grid": False}
    x = {"field": "solution_count", "type": "ordinal", "title": "solutions", "axis": axis}
    share = {"format": ".0%", "tickCount": 5}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": SHARE, "axis": share}
    by = _by_run(runs, "color", "xOffset")
    rule = {
        "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.45},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **by},
    }
    fields = {"run": "run", "solution_count": "solutions", "puzzles": "puzzles"}
    fields |= {"value": "value", "low": "low", "high": "high"}
    spots = {
        "mark": {"type": "circle", "size": 60, "opacity": 1},
        "encoding": {"x": x, "y": y, **by, "tooltip": _tip(fields, True)},
    }
    layers = [rule, spots]
    if not references.is_empty():
        place = {"x": x, "y": y}
        layers.insert(0, _references(references, runs, place, "solution_count"))
    return chart(layers, description, data={"values": rounded(frame)})


def histogram(frame: pl.DataFrame, last: int, description: str) -> Spec:
    """Shares of trajectories by the step they ended at, stacked by outcome."""
    order = {name: rank for rank, name in enumerate(OUTCOMES)}
    ranked = frame.with_columns(rank=pl.col("outcome").replace_strict(order, default=len(order)))
    axis = {"labelAngle": 0, "grid": False, "labelOverlap": True}
    x = {"field": "steps", "type": "ordinal", "title": "supervision steps used", "axis": axis}
    x["scale"] = {"domain": list(range(1, last + 1)), "paddingInner": 0.15}
    y = {"field": "share", "type": "quantitative", "title": None, "axis": {"format": ".0%"}}
    scale = {"domain": list(OUTCOMES), "range": list(OUTCOMES.values())}
    fields = {"outcome": "outcome", "steps": "steps", "trajectories": "trajectories"}
    encoding = {
        "x": x,
        "y": y,
        "color": {"field": "outcome", "type": "nominal", "scale": scale, "legend": None},
        "order": {"field": "rank", "type": "quantitative"},
        "tooltip": _tip({**fields, "share": "share"}, True),
    }
    bars = {"mark": {"type": "bar"}, "encoding": encoding}
    return chart([bars], description, data={"values": rounded(ranked)})
