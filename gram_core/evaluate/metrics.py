"""Metrics over the trajectories table, in polars (paper, 4.2 and C.2; docs/evaluation.md).

`puzzle_table` reduces trajectories to one row a puzzle, width and depth; `summarise` reduces
those to numbers with 95% intervals over puzzles. Width N means the first N trajectories.

Every metric is a ratio of two sums over puzzles. Intervals: Wilson's for a share of puzzles that
each count as 0 or 1, a percentile bootstrap over puzzles for the others, which are no shares or
count puzzles in part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np
import polars as pl

from gram_core.config import Config, PositiveInt, Seed


class EvaluateConfig(Config, frozen=True, kw_only=True):
    """Which widths to report, the bootstrap of the intervals, how many test pairs the bounds are
    over at most (drawn by the seed where there are more), and for images how long the classifier
    that scores them is trained and the weights of Inception-v3, `download` or a file, if that shall
    score them too."""

    widths: tuple[PositiveInt, ...] = (1, 5, 10, 20)
    bound_pairs: PositiveInt = 5000
    classifier_steps: PositiveInt = 600
    inception: str | None = None
    resamples: Annotated[int, msgspec.Meta(ge=100)] = 1000
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths: expected one or more, each once, got {list(self.widths)}")


# What a selector sorts trajectories by; `votes` counts those with the same answer.
MAJORITY = ("votes", "-trajectory")
VALUE = ("value", "-trajectory")
FIRST_HALT = ("halted", "-steps", "value", "-trajectory")
CELLS = 2**23  # numbers of resamples in memory at a time, beside their compact counts


def puzzle_table(
    trajectories: pl.LazyFrame, puzzles: pl.LazyFrame, widths: Sequence[int]
) -> pl.DataFrame:
    """One row a puzzle, width and depth, in the columns of the `puzzles` schema.

    `puzzles` has `puzzle_id` and `solution_count` (0 where unknown: coverage is then null).
    Selectors: majority takes the commonest answer, ties to the earliest trajectory; value the
    highest value head; first_halt the trajectory that halted in the fewest steps, ties and
    trajectories that never halted by value.
    """
    rows = trajectories.with_columns(answer=pl.col("prediction").hash())
    group = ["puzzle_id", "depth"]
    tables = []
    for width in widths:
        votes = pl.len().over([*group, "answer"])
        table = (
            rows.filter(pl.col("trajectory") < width)
            .with_columns(votes=votes)
            .group_by(group)
            .agg(
                width=pl.lit(width, dtype=pl.UInt32),
                selected_majority=_first("valid", MAJORITY),
                selected_value=_first("valid", VALUE),
                selected_first_halt=_first("valid", FIRST_HALT),
                accuracy=pl.col("valid").mean(),
                valid_count=pl.col("valid").sum().cast(pl.UInt32),
                distinct_valid=pl.col("answer").filter("valid").n_unique().cast(pl.UInt32),
                distinct=pl.col("answer").n_unique().cast(pl.UInt32),
                mean_steps=pl.col("steps").mean(),
            )
        )
        tables.append(table)
    known = pl.col("solution_count") > 0
    share = pl.col("distinct_valid") / pl.col("solution_count")
    return (
        pl.concat(tables)
        .join(puzzles.select("puzzle_id", "solution_count").unique(), on="puzzle_id", how="left")
        .with_columns(coverage=pl.when(known).then(share))
        .sort("depth", "width", "puzzle_id")
        .collect()
    )


def _first(column: str, keys: Sequence[str]) -> pl.Expr:
    """`column` of the trajectory that sorts first by `keys`: descending, ascending with a `-`."""
    names = [key.lstrip("-") for key in keys]
    down = [not key.startswith("-") for key in keys]
    return pl.col(column).sort_by(names, descending=down).first()


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95% interval over puzzles."""

    value: float
    low: float
    high: float


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    z = 1.959963984540054
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@lru_cache(maxsize=4)
def _bootstrap_weights(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` puzzles is drawn in each resample; every metric uses the same."""
    generator = np.random.default_rng(seed)
    shares = np.full(count, 1 / count)
    # One resample at a time and a byte a number, for a draw of all takes eight. No puzzle is drawn
    # 256 times: among that many and more, each is drawn once on average.
    weights = np.empty((resamples, count), dtype=np.uint8)
    for row in weights:
        row[:] = generator.multinomial(count, shares)
    return weights


def _resampled(column: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of a column over the puzzles of each resample, some resamples at a time."""
    weights = _bootstrap_weights(len(column), resamples, seed)
    size = max(1, CELLS // len(column))
    parts = [weights[i : i + size].astype(float) @ column for i in range(0, resamples, size)]
    return np.concatenate(parts)


def ratio(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, seed: int, *, share: bool = True
) -> Estimate:
    """sum(numerator) / sum(denominator) over puzzles, with its interval. Without `share` it is no
    share, which happens to be 0 or 1 for every puzzle, but a mean of other numbers."""
    count = len(numerator)
    value = float(numerator.sum() / denominator.sum())
    if share and (denominator == 1).all() and np.isin(numerator, (0.0, 1.0)).all():
        return Estimate(value, *wilson(float(numerator.sum()), count))
    below = _resampled(denominator, resamples, seed)
    above = _resampled(numerator, resamples, seed)
    # A resample may miss every puzzle that the ratio is over.
    draws = np.divide(above, below, out=np.full(resamples, value), where=below > 0)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def summarise(
    puzzles: pl.DataFrame, width: int, depth: int, config: EvaluateConfig
) -> dict[str, Estimate]:
    """All metrics at one width and depth; names without the `@N`.

    Coverage comes in three readings (paper.md leaves open which the paper means): `coverage` is
    the mean over inputs, `coverage_pairs` pooled over all solutions, `coverage_multi` pooled over
    the inputs with two solutions or more. `..._ideal` is what an ideal uniform sampler expects at
    this width, `..._deterministic` what a perfect deterministic solver gets. `accuracy_pairs`
    weights each input by its number of solutions.
    """
    rows = puzzles.filter((pl.col("width") == width) & (pl.col("depth") == depth))
    if rows.is_empty():
        raise ValueError(f"there is no puzzle at width {width} and depth {depth}")
    one = np.ones(len(rows))

    def column(name: str) -> np.ndarray:
        return rows[name].cast(pl.Float64).to_numpy()

    def estimate(numerator: np.ndarray, denominator: np.ndarray, *, share: bool = True) -> Estimate:
        return ratio(numerator, denominator, config.resamples, config.seed, share=share)

    accuracy = estimate(column("accuracy"), one)
    if len(rows) == 1:
        # An unconditional task has one input: the interval is over its trajectories.
        accuracy = Estimate(accuracy.value, *wilson(float(column("valid_count")[0]), width))
    out = {
        "accuracy": accuracy,
        "any_valid": estimate((column("valid_count") > 0).astype(float), one),
        "majority": estimate(column("selected_majority"), one),
        "best_of_value": estimate(column("selected_value"), one),
        "first_halt": estimate(column("selected_first_halt"), one),
        "best_of_verifier": estimate((column("valid_count") > 0).astype(float), one),
        "distinct": estimate(column("distinct"), one, share=False),
        "steps": estimate(column("mean_steps"), one, share=False),
    }
    solutions, found = column("solution_count"), column("distinct_valid")
    if (solutions > 0).all():
        several = (solutions > 1).astype(float)
        ideal = 1 - (1 - 1 / solutions) ** width
        shares = {"": found / solutions, "_ideal": ideal, "_deterministic": 1 / solutions}
        for suffix, share in shares.items():
            out[f"coverage{suffix}"] = estimate(share, one)
            out[f"coverage_pairs{suffix}"] = estimate(share * solutions, solutions)
            if several.any():
                out[f"coverage_multi{suffix}"] = estimate(
                    share * solutions * several, solutions * several
                )
        out["accuracy_pairs"] = estimate(column("accuracy") * solutions, solutions)
    return out


WIDTHLESS = ("accuracy", "accuracy_pairs", "steps")


def metrics(puzzles: pl.DataFrame, depth: int, config: EvaluateConfig) -> dict[str, float]:
    """The flat keys of results/RUN/metrics.json at the run's depth: `name@N`, `name@N_low`,
    `name@N_high`; metrics of a single trajectory carry no `@N` and use the largest width."""
    flat: dict[str, float] = {}
    for width in sorted(config.widths):
        for name, estimate in summarise(puzzles, width, depth, config).items():
            key = name if name in WIDTHLESS else f"{name}@{width}"
            flat[key] = estimate.value
            flat[f"{key}_low"], flat[f"{key}_high"] = estimate.low, estimate.high
    return flat


def selected(
    trajectories: pl.DataFrame, names: Sequence[str], widths: Sequence[int]
) -> pl.DataFrame:
    """One row a puzzle of a task's own numbers (`names`, columns of the trajectories at one depth):
    `name`, its mean over the trajectories, and `name_majority@N` and `name_value@N`, those of the
    selected ones."""
    table = trajectories.group_by("puzzle_id").agg(pl.col(name).mean() for name in names)
    for width in sorted(widths):
        chosen = (
            trajectories.filter(pl.col("trajectory") < width)
            .with_columns(votes=pl.len().over("puzzle_id", "prediction"))
            .group_by("puzzle_id")
            .agg(
                _first(name, keys).alias(f"{name}_{selector}@{width}")
                for name in names
                for selector, keys in (("majority", MAJORITY), ("value", VALUE))
            )
        )
        table = table.join(chosen, on="puzzle_id")
    return table


def measured(
    puzzles: pl.DataFrame, config: EvaluateConfig, shares: Sequence[str] = ()
) -> dict[str, float]:
    """The columns of what `selected` gave, for all puzzles, as means with intervals; `..._total`
    are their sums over the puzzles. `shares` are the names whose numbers lie between 0 and 1."""
    flat: dict[str, float] = {}
    table = puzzles.sort("puzzle_id")
    for key in table.columns[1:]:
        numbers = table[key].cast(pl.Float64).to_numpy()
        label, _, width = key.partition("@")
        share = any(label in (n, f"{n}_majority", f"{n}_value") for n in shares)
        e = ratio(numbers, np.ones(len(numbers)), config.resamples, config.seed, share=share)
        flat[key], flat[f"{key}_low"], flat[f"{key}_high"] = e.value, e.low, e.high
        flat[f"{label}_total" + (f"@{width}" if width else "")] = float(numbers.sum())
    return flat


def generated(
    trajectories: pl.DataFrame, known: set[bytes], config: EvaluateConfig
) -> dict[str, float]:
    """What an unconditional task asks of the first N answers at one depth: `unique@N`, distinct
    valid ones / valid ones, and `novel@N`, the share of the distinct valid ones that are not in
    `known`, the training targets (paper, D.5). NaN-free: absent where nothing is valid."""
    flat: dict[str, float] = {}
    for width in sorted(config.widths):
        rows = trajectories.filter((pl.col("trajectory") < width) & pl.col("valid"))
        distinct = {answer.tobytes() for answer in tokens(rows)}
        if distinct:
            flat[f"unique@{width}"] = len(distinct) / len(rows)
            flat[f"novel@{width}"] = len(distinct - known) / len(distinct)
    return flat


def tokens(trajectories: pl.DataFrame) -> np.ndarray:
    """The predictions as uint8 [R, S]."""
    column = trajectories["prediction"]
    if isinstance(column.dtype, pl.Array):
        return column.to_numpy()
    return np.array(column.to_list(), dtype=np.uint8)


def by_solution_count(
    puzzles: pl.DataFrame, width: int, depth: int, config: EvaluateConfig
) -> pl.DataFrame:
    """Accuracy, any-valid and coverage for each number of solutions (Figures 4 and 15), with the
    number of puzzles and the intervals, null over a single puzzle."""
    at = puzzles.filter((pl.col("width") == width) & (pl.col("depth") == depth))
    records = []
    for (count,), rows in sorted(at.group_by("solution_count"), key=lambda group: group[0]):
        found = summarise(rows, width, depth, config)
        for name in ("accuracy", "any_valid", "coverage"):
            if name in found:
                e = found[name]
                bounds = (e.low, e.high) if len(rows) > 1 else (None, None)
                records.append((count, len(rows), name, e.value, *bounds))
    interval = dict.fromkeys(("value", "low", "high"), pl.Float64)
    schema = {"solution_count": pl.UInt32, "puzzles": pl.UInt32, "metric": pl.String, **interval}
    return pl.DataFrame(records, schema=schema, orient="row")
