"""The axes of a sweep's chart: where each trial's value stands between 0 and 1, and what the
axis says. Knows values; it knows nothing of trials or marks."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = object()  # stands for the value of a trial that has none
LOG_FROM = 20  # positive values that span more than this factor stand on a logarithmic axis
LABELS = 8  # an axis with more categories than this names only the first and the last


def is_log(values: Sequence[float]) -> bool:
    """Whether values belong on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_FROM


def show(value: Any, digits: int = 4) -> str:
    """A value as the page writes it."""
    if value is ABSENT:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Scale:
    """Numbers between the smallest and the largest, as 0 to 1; 0.5 where they are all the same."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Where a value stands."""
        if self.low == self.high:
            return 0.5
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)

    def at(self, place: float) -> float:
        """The value that stands at a place."""
        if self.log:
            return float(self.low ** (1 - place) * self.high**place)
        return self.low * (1 - place) + self.high * place


@dataclass(frozen=True)
class Axis:
    """An axis: each trial's place (None: it has none) and the marks with their labels."""

    title: str
    places: list[float | None]
    ticks: list[tuple[float, str]]
    scale: Scale | None = None


def axis(title: str, values: Sequence[Any]) -> Axis:
    """The axis of one parameter, `values` by trial: finite numbers by size, anything else by its
    order (null, booleans, numbers, texts, the rest)."""
    known = [value for value in values if value is not ABSENT]
    if all(_is_number(value) for value in known) and known:
        scale = Scale(min(known), max(known), is_log(known))
        ends = [scale.low, scale.high] if scale.low < scale.high else [scale.low]
        places = [None if value is ABSENT else scale.place(value) for value in values]
        return Axis(title, places, [(scale.place(end), show(end)) for end in ends], scale)
    ordered = sorted({_order(value): show(value) for value in known}.items())
    last = len(ordered) - 1
    by_order = {key: i / last if last else 0.5 for i, (key, _) in enumerate(ordered)}
    places = [None if value is ABSENT else by_order[_order(value)] for value in values]
    named = ordered if len(ordered) <= LABELS else [ordered[0], ordered[-1]]
    return Axis(title, places, [(by_order[key], label) for key, label in named])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _order(value: Any) -> tuple[int, float, str]:
    """Sorts values of any kind, and tells them apart."""
    if _is_number(value):
        return 2, value, ""
    kinds = {type(None): 0, bool: 1, float: 2, str: 3}
    return kinds.get(type(value), 4), 0.0, json.dumps(value, sort_keys=True)


def short_names(keys: Sequence[str]) -> list[str]:
    """Dotted keys by their last parts, as many of them as it takes to tell them apart."""
    names = []
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names.append(next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), key))
    return names
