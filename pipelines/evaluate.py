"""The evaluate stage: trajectories in, puzzles table, metrics and plot data out.

The trajectories are read once, some puzzles at a time, so that memory does not grow with their
number. A guided model is also asked for the bounds on its likelihood, on the test pairs.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from gram_core import tables
from gram_core.config import ConfigError
from gram_core.evaluate.bound import bound
from gram_core.evaluate.images import inception_scores, scores
from gram_core.evaluate.metrics import (
    EvaluateConfig,
    generated,
    measured,
    metrics,
    puzzle_table,
    ratio,
    selected,
    summarise,
    tokens,
)
from gram_core.files import write_atomic
from gram_core.model.gram import GRAM
from gram_core.model.store import load_model
from gram_core.noise import Key, batch_noise, trajectory_key
from gram_core.sample.trajectory import SampleConfig
from gram_core.tables import TableError
from gram_core.tasks.base import Task
from gram_core.train.objective import ObjectiveConfig
from pipelines.dataset import examples, held_out, labelled, solution_counts, test_table
from pipelines.params import MODELS, RESULTS, Run
from pipelines.provenance import provenance
from pipelines.runtime import device_name

POSITIONS = 32768  # of the bounds, at a time

# What is left where the first valid answer ends a puzzle: trajectories that were not drawn say
# nothing of accuracy, coverage or selection.
EARLY = ("any_valid", "best_of_verifier", "steps")


def evaluate(run: Run) -> dict[str, float]:
    """results/RUN/puzzles.parquet, metrics.json and scaling.csv; returns the metrics.

    Raises `TableError` where the trajectories do not belong to the run's test puzzles.
    """
    config = run.section("evaluate", EvaluateConfig)
    sample = run.section("sample", SampleConfig)
    if max(config.widths) > sample.width:
        raise ConfigError(
            f"{run.where}.evaluate.widths: {max(config.widths)} is above sample.width "
            f"{sample.width}; draw that many trajectories or report fewer"
        )
    folder = RESULTS / run.name
    seen = _Seen(run, sample, config)
    model, about = load_model(MODELS / run.name, torch.device(device_name()))
    groups = about.get("identifiers", [])
    seen.read(folder / "trajectories.parquet", groups)
    puzzles = seen.puzzles()
    found = {
        **_common(run, model, puzzles, sample, config),
        **({} if sample.stop_when_verified else _own(run, seen, groups, config)),
        **_bounds(run, model, groups, config),
    }
    scaling = _scaling(puzzles, sample, config)
    made = {"run": run.name, **provenance(config.seed)}
    tables.write(folder / "puzzles.parquet", puzzles.to_arrow(), tables.puzzles_schema(), made)
    write_atomic(folder / "scaling.csv", scaling.write_csv().encode())
    write_atomic(folder / "metrics.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def whole_puzzles(path: Path) -> Iterator[pl.DataFrame]:
    """The trajectories table in parts that each hold some puzzles whole, one in memory at a time.
    Raises `TableError`."""
    held: list[pl.DataFrame] = []
    for part in tables.batches(path, "trajectories"):
        frame = pl.from_arrow(part)
        assert isinstance(frame, pl.DataFrame)
        ids = frame["puzzle_id"]
        begun = int((ids == ids[-1]).arg_max() or 0)  # where the last puzzle of the part begins
        if begun or (held and held[-1]["puzzle_id"][-1] != ids[-1]):
            yield pl.concat([*held, frame[:begun]])
            held = []
        held.append(frame[begun:])
    if held:
        yield pl.concat(held)


class _Seen:
    """What one pass over the trajectories leaves: a row or so a puzzle, and whole answers only
    where a score needs all of them together."""

    def __init__(self, run: Run, sample: SampleConfig, config: EvaluateConfig) -> None:
        self.run = run
        self.sample = sample
        self.config = config
        self.tables: list[pl.DataFrame] = []
        self.selected: list[pl.DataFrame] = []
        self.answers: list[pl.DataFrame] = []
        # Tasks that score groups of puzzles, and those that answer nothing, need answers together.
        self.together = type(run.task).score is not Task.score or not run.task.conditional

    def puzzles(self) -> pl.DataFrame:
        """One row a puzzle, width and depth."""
        return pl.concat(self.tables).sort("depth", "width", "puzzle_id")

    def read(self, path: Path, groups: Sequence[str]) -> None:
        """Go through the table. Raises `TableError` where it does not hold every test puzzle with
        every trajectory at every depth once."""
        run, sample = self.run, self.sample
        counts = solution_counts(run.task_name, run.task).collect()
        inputs, targets = held_out(run.task_name, run.task, groups)
        place = {puzzle_id: i for i, puzzle_id in enumerate(inputs.ids)}
        one_known = all(len(known) == 1 for known in targets.values())
        each = sample.width * len(sample.all_depths)
        left = set(place)
        for frame in whole_puzzles(path):
            found = frame["puzzle_id"].unique()
            for puzzle_id in found:
                if puzzle_id not in place:
                    raise TableError(
                        f"{path}: puzzle {puzzle_id!r} is not in both this table and the test table"
                    )
            keys = frame.select("puzzle_id", "trajectory", "depth").n_unique()
            if len(frame) != each * len(found) or keys != len(frame) or not left.issuperset(found):
                raise TableError(
                    f"{path}: expected {each} rows of a puzzle: every puzzle, trajectory and depth "
                    "once"
                )
            left.difference_update(found)
            known = counts.filter(pl.col("puzzle_id").is_in(found.implode()))
            self.tables.append(puzzle_table(frame.lazy(), known.lazy(), self.config.widths))
            rows = frame.filter(pl.col("depth") == sample.depth)
            puzzle = np.array([place[puzzle_id] for puzzle_id in rows["puzzle_id"].to_list()])
            answers = tokens(rows)
            given = inputs.inputs[torch.from_numpy(puzzle)]
            numbers = run.task.measure(given, torch.from_numpy(answers.copy()))
            columns = {name: values.numpy() for name, values in numbers.items()}
            if one_known:
                wanted = np.stack(
                    [np.frombuffer(min(targets[i]), np.uint8) for i in rows["puzzle_id"].to_list()]
                )
                scored = wanted > 0
                columns["token_accuracy"] = ((answers == wanted) & scored).sum(1) / scored.sum(1)
            if columns:
                own = rows.with_columns(pl.Series(k, v) for k, v in columns.items())
                self.selected.append(selected(own, list(columns), self.config.widths))
            if self.together:
                self.answers.append(rows)
        if left:
            raise TableError(
                f"{path}: puzzle {min(left)!r} is not in both this table and the test table"
            )


def _common(
    run: Run, model: GRAM, puzzles: pl.DataFrame, sample: SampleConfig, config: EvaluateConfig
) -> dict[str, float]:
    """What the table of puzzles says. Without an input there is none to choose an answer for, and
    no interval over inputs; where nothing says which answers are valid, only how many differ and
    the steps are left; so it is where the first valid answer ends a puzzle."""
    found = metrics(puzzles, sample.depth, config)
    if sample.stop_when_verified:
        return {
            name: value
            for name, value in found.items()
            if name.startswith(EARLY)
            and (run.task.conditional or not name.endswith(("_low", "_high")))
        }
    if run.task.conditional:
        return found
    kept = {"distinct", "steps"}
    if run.task.verifies:
        kept |= {"accuracy"}
        # Of copies of one trajectory there is no interval.
        if model.config.stochastic and sample.temperature > 0:
            kept |= {"accuracy_low", "accuracy_high"}
        kept |= {"coverage", "coverage_ideal", "coverage_deterministic"}
    return {
        name: value
        for name, value in found.items()
        if name.partition("@")[0] in kept and not ("@" in name and name.endswith(("_low", "_high")))
    }


def _own(run: Run, seen: _Seen, groups: Sequence[str], config: EvaluateConfig) -> dict[str, float]:
    """What the task measures beside validity, and `token_accuracy` where every input has one known
    answer; of an unconditional task, how different and how new its answers are."""
    shares = ("token_accuracy",)
    found = measured(pl.concat(seen.selected), config, shares) if seen.selected else {}
    if not seen.together:
        return found
    rows = pl.concat(seen.answers)
    for name, scored in run.task.score(rows, test_table(run.task_name, run.task)).items():
        if not len(scored):
            continue  # every answer is secret
        e = ratio(scored, np.ones(len(scored)), config.resamples, config.seed)
        found[name], found[f"{name}_low"], found[f"{name}_high"] = e.value, e.low, e.high
    if run.task.image is not None:
        answers = torch.from_numpy(tokens(rows).copy())
        train, test = (labelled(run.task_name, run.task, part) for part in ("train", "test"))
        side, steps = run.task.image[0], config.classifier_steps
        found.update(scores(answers, train, test, side, steps=steps, seed=config.seed))
        if config.inception is not None:
            found.update(inception_scores(answers, train[0], side, config.inception))
    elif not run.task.conditional:
        known = examples(run.task_name, run.task, "train").target.numpy()
        found.update(generated(rows, {row.tobytes() for row in known}, config))
    return found


def _bounds(
    run: Run, model: GRAM, groups: Sequence[str], config: EvaluateConfig
) -> dict[str, float]:
    """Means over the test pairs, in nats a pair, with intervals over puzzles where there are any:
    `bound`, Eq. 13, its parts `bound_reconstruction` and `bound_divergence`, and `bound_surrogate`,
    Eq. 14. Nothing for a model whose guidance has no density."""
    shape, device = model.config, model.z0_h.device
    if shape.guidance not in ("full", "stochastic_only"):
        return {}
    objective = run.section("objective", ObjectiveConfig)
    pairs = examples(run.task_name, run.task, "test", groups)
    count = min(len(pairs), config.bound_pairs)
    if count < len(pairs):
        # The tables are sorted; pairs from all over them, in their order.
        chosen = np.random.default_rng(config.seed).permutation(len(pairs))[:count]
        pairs = pairs.take(np.sort(chosen))
    transitions = shape.T if shape.deep_supervision else shape.T * shape.N_sup
    parts: dict[str, list[np.ndarray]] = {}
    size = max(1, POSITIONS // model.length)
    for start in range(0, count, size):
        rows = range(start, min(start + size, count))
        keys = [trajectory_key(config.seed, f"bound of pair {row}", 0) for row in rows]

        def noise(step: int, keys: list[Key] = keys) -> torch.Tensor:
            like = (transitions, model.length, shape.dim)
            return batch_noise(keys, [step] * len(keys), like, device)

        inputs, target, puzzle = (
            t[rows.start : rows.stop].to(device) for t in (pairs.inputs, pairs.target, pairs.puzzle)
        )
        of = bound(
            model,
            inputs,
            target,
            noise,
            rollout=objective.rollout,
            likelihood=objective.cross_entropy,
            puzzle=puzzle,
        )
        for name, values in (
            ("bound", of.full),
            ("bound_surrogate", of.surrogate),
            ("bound_reconstruction", -of.reconstruction),
            ("bound_divergence", of.divergence),
        ):
            parts.setdefault(name, []).append(values.cpu().double().numpy())
    _, which = np.unique(pairs.inputs[:count].numpy(), axis=0, return_inverse=True)
    weight = np.bincount(which).astype(float)
    flat: dict[str, float] = {}
    for name, chunks in parts.items():
        total = np.bincount(which, weights=np.concatenate(chunks))
        estimate = ratio(total, weight, config.resamples, config.seed, share=False)
        flat[name] = estimate.value
        if len(weight) > 1:  # without an input there is no interval over inputs
            flat[f"{name}_low"], flat[f"{name}_high"] = estimate.low, estimate.high
    return flat


def _scaling(puzzles: pl.DataFrame, sample: SampleConfig, config: EvaluateConfig) -> pl.DataFrame:
    """Each metric at every width and depth, for `dvc plots`."""
    records = [
        (depth, width, name, e.value, e.low, e.high)
        for depth in sample.all_depths
        for width in config.widths
        for name, e in summarise(puzzles, width, depth, config).items()
        if name in EARLY or not sample.stop_when_verified
    ]
    columns = ["depth", "width", "metric", "value", "low", "high"]
    return pl.DataFrame(records, schema=columns, orient="row")
