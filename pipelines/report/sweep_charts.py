"""Vega-Lite specifications of a sweep's charts: parallel coordinates, and the best value so far.

Knows axes, rows and marks, and nothing of files or of where a chart stands on the page. Each row
of `rows` is a trial with what `tips` (field to title) shows of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.charts import chart
from pipelines.report.sweep_axes import Axis
from pipelines.report.theme import SHADES, Spec, shade

Row = Mapping[str, Any]
HEIGHT = 300
ROOM = 900  # pixels that the labels of all axes may take together
TICKS = 20  # numbers on the axis of trials, at most
BEST = "var(--best)"
NONE = "var(--faint)"
PLACED = {"filter": "isValid(datum.place)"}
GAPS = {"invalid": "break-paths-show-path-domains"}  # a line ends where it has no place


def parallel(
    axes: Sequence[Axis], rows: Sequence[Row], tips: Mapping[str, str], description: str
) -> Spec:
    """One line a trial through its place on every axis, the last of them the metric's. A row's
    `level` is its colour's, none without a metric, and `best` marks the best trial."""
    fields = [f"at{i}" for i in range(len(axes))]
    placed = [
        {**row, **dict(zip(fields, places, strict=True))}
        for row, *places in zip(rows, *(map(_rounded, axis.places) for axis in axes), strict=True)
    ]
    # The better a trial, the later it is drawn: over the others.
    placed.sort(key=lambda row: -1 if row["level"] is None else row["level"])
    scale = {"domain": [-0.5, len(axes) - 0.5], "nice": False}
    x = {"field": "axis", "type": "quantitative", "axis": None, "scale": scale}
    # Above the axes is room for their names, below for the labels of their lower ends.
    y: Spec = {"field": "place", "type": "quantitative", "axis": None}
    y["scale"] = {"domain": [-0.12, 1.25], "nice": False}
    trials = {
        "data": {"values": placed},
        "transform": [
            {"fold": fields, "as": ["axis_field", "place"]},
            {"calculate": "toNumber(slice(datum.axis_field, 2))", "as": "axis"},
        ],
        "layer": [
            *_lines("!isValid(datum.level)", 1.4, {"value": NONE}, strokeDash=[4, 3]),
            *_lines("isValid(datum.level) && !datum.best", 1.8, _shades(), opacity=0.9),
            *_lines("datum.best", 6, {"value": "var(--panel)"}),
            *_lines("datum.best", 3.4, {"value": BEST}),
            *_hover(tips),
        ],
    }
    layers = [*_scaffold(axes), trials, *_labels(axes)]
    return chart(layers, description, height=HEIGHT, encoding={"x": x, "y": y})


def _rounded(place: float | None) -> float | None:
    return None if place is None else round(place, 4)


def _each() -> Spec:
    """A line for every trial, through the axes in order."""
    order = {"field": "axis", "type": "quantitative"}
    return {"detail": {"field": "trial", "type": "nominal"}, "order": order}


def _shades() -> Spec:
    levels = list(range(SHADES))
    scale = {"domain": levels, "range": [shade(level) for level in levels]}
    return {"field": "level", "type": "ordinal", "scale": scale, "legend": None}


def _lines(test: str, width: float, colour: Spec, **more: Any) -> list[Spec]:
    """Lines of the trials that pass a test, and dots where they cross an axis."""
    line = {"type": "line", "strokeWidth": width, "strokeJoin": "round", **GAPS, **more}
    dots = {"type": "circle", "size": 12 * width, "opacity": more.get("opacity", 1)}
    chosen = {"filter": test}
    return [
        {"transform": [chosen], "mark": line, "encoding": {**_each(), "color": colour}},
        {"transform": [chosen, PLACED], "mark": dots, "encoding": {"color": colour}},
    ]


def _hover(tips: Mapping[str, str]) -> list[Spec]:
    """Invisible lines and dots that show a trial's values from a little way off."""
    line = {"type": "line", "strokeWidth": 10, "opacity": 0, **GAPS}
    dots = {"type": "circle", "size": 120, "opacity": 0}
    tooltip = {"tooltip": _tooltip(tips)}
    return [
        {"mark": line, "encoding": {**_each(), **tooltip}},
        {"transform": [PLACED], "mark": dots, "encoding": tooltip},
    ]


def _tooltip(tips: Mapping[str, str]) -> list[Spec]:
    return [{"field": name, "title": title, "type": "nominal"} for name, title in tips.items()]


def _scaffold(axes: Sequence[Axis]) -> list[Spec]:
    """The axes' lines and names."""
    names = [{"axis": i, "place": 0, "end": 1, "name": axis.title} for i, axis in enumerate(axes)]
    rule = {
        "data": {"values": names},
        "mark": {"type": "rule", "color": "var(--axis)", "strokeWidth": 1.2},
        "encoding": {"y2": {"field": "end"}},
    }
    last = {"test": f"datum.axis == {len(axes) - 1}", "value": "var(--ink)"}
    name = {
        "data": {"values": [{**name, "place": 1} for name in names]},
        "mark": _text(len(axes), dy=-27, fontSize=12, fontWeight=600),
        "encoding": {
            "text": {"field": "name", "type": "nominal"},
            "color": {"condition": last, "value": "var(--muted)"},
        },
    }
    return [rule, name]


def _labels(axes: Sequence[Axis]) -> list[Spec]:
    """The values at an axis's marks: above its upper end, below its lower end, else beside it,
    on a ground that keeps them legible among the lines."""
    ticks = [
        {"axis": i, "place": place, "label": label}
        for i, axis in enumerate(axes)
        for place, label in axis.ticks
    ]
    beside = {"align": "left", "dx": 8}
    ground = {"color": "var(--panel)", "stroke": "var(--panel)", "strokeWidth": 4}
    ink = {"color": "var(--ink)"}
    styles = [
        ("datum.place == 1", {"dy": -11, **ink}),
        ("datum.place == 0", {"dy": 12, **ink}),
        ("datum.place > 0 && datum.place < 1", {**beside, **ground}),
        ("datum.place > 0 && datum.place < 1", {**beside, **ink}),
    ]
    return [
        {
            "data": {"values": ticks},
            "transform": [{"filter": test}],
            "mark": _text(len(axes), **style),
            "encoding": {"text": {"field": "label", "type": "nominal"}},
        }
        for test, style in styles
    ]


def _text(axes: int, **style: Any) -> Spec:
    return {"type": "text", "baseline": "middle", "fontSize": 11, "limit": ROOM // axes, **style}


def progress(
    rows: Sequence[Row], tips: Mapping[str, str], metric: str, log: bool, description: str
) -> Spec:
    """The best value so far as a step line over the trials, and each trial's own value as a dot."""
    numbers = [row["number"] for row in rows]
    x: Spec = {"field": "number", "type": "quantitative", "title": "trial, in order of start"}
    x["scale"] = {"domain": [min(numbers) - 0.5, max(numbers) + 0.5], "nice": False}
    # Whole numbers only, which a scale left alone would not keep to.
    stride = -(-(max(numbers) - min(numbers) + 1) // TICKS)
    ticks = list(range(min(numbers), max(numbers) + 1, stride))
    x["axis"] = {"values": ticks, "format": "d", "grid": False}
    scale: Spec = {"type": "log", "nice": False} if log else {"zero": False, "nice": True}
    y: Spec = {"field": "value", "type": "quantitative", "title": metric, "scale": scale}
    y["axis"] = {"format": ".4~g", "tickCount": 5}
    step = {
        "transform": [{"filter": "isValid(datum.best_so_far)"}],
        "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2, "color": BEST},
        "encoding": {"x": x, "y": {**y, "field": "best_so_far"}},
    }
    only_best = {"test": "datum.best", "value": BEST}
    dots = {
        "transform": [{"filter": "isValid(datum.value)"}],
        "mark": {"type": "circle", "size": 60, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": {"condition": only_best, "value": shade(SHADES // 2)},
            "tooltip": _tooltip(tips),
        },
    }
    return chart([step, dots], description, data={"values": list(rows)}, height=230)
