"""Which test puzzles the report shows, and what the trajectories answered to them.

Everything is a function of the tables: no drawing, no chance. How a board looks is in `boards`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from gram_core.tables import tokens_numpy
from pipelines.report.inputs import RunInputs, TaskInputs

Tokens = np.ndarray
GALLERY = {
    "task": pl.String,
    "puzzle_id": pl.String,
    "run": pl.String,
    "trajectories": pl.Int64,
    "valid": pl.Boolean,
    "answer": pl.String,
}


@dataclass(frozen=True)
class Answer:
    """A distinct answer of one run: how many trajectories gave it, and whether it is valid."""

    tokens: Tokens
    votes: int
    valid: bool


@dataclass(frozen=True)
class RunAnswers:
    """One run's answers, valid and frequent ones first, and the solutions it did not find."""

    run: str
    width: int
    answers: list[Answer]
    missed: list[Tokens]

    @property
    def found(self) -> int:
        """Distinct valid answers."""
        return sum(answer.valid for answer in self.answers)

    @property
    def valid_votes(self) -> int:
        """Trajectories that ended in a valid answer."""
        return sum(answer.votes for answer in self.answers if answer.valid)


@dataclass(frozen=True)
class Puzzle:
    """A test puzzle with every run's answers to it."""

    puzzle_id: str
    inputs: Tokens
    solutions: list[Tokens]
    runs: list[RunAnswers]
    count: int  # of all solutions; 0: unknown

    @property
    def known(self) -> str:
        """How many solutions there are, in words."""
        if self.count:
            return f"{self.count} solution{'s' * (self.count > 1)}"
        return f"{len(self.solutions)} known" if self.solutions else "answer secret"

    @property
    def of(self) -> str:
        """What is found is found of so many."""
        return f" of {self.count}" if self.count else ""


def choose(puzzles: pl.DataFrame, count: int) -> list[str]:
    """About `count` puzzles with several solutions, spread over the numbers of solutions; within
    one number the order is that of the ids' hashes. Without such puzzles, any."""
    several = puzzles.filter(pl.col("solution_count") > 1)
    pool = puzzles if several.is_empty() else several
    groups: dict[int, list[str]] = {}
    for puzzle_id, solutions in pool.select("puzzle_id", "solution_count").iter_rows():
        groups.setdefault(solutions, []).append(puzzle_id)
    for ids in groups.values():
        ids.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    numbers = sorted(groups)
    spread = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    order = [numbers[i] for i in dict.fromkeys(spread.tolist())]
    chosen: list[tuple[int, str]] = []
    while len(chosen) < min(count, len(pool)):
        for number in order:
            if groups[number] and len(chosen) < count:
                chosen.append((number, groups[number].pop(0)))
        order = [number for number in numbers if groups[number]]
    return [name for _, name in sorted(chosen, key=lambda pair: pair[0])]


def gallery(task: TaskInputs, runs: Sequence[RunInputs], count: int = 6) -> list[Puzzle]:
    """The chosen puzzles of `task`, answered by each of `runs` at its depth and full width."""
    shared = task.puzzles
    for run in runs:
        sampled = run.trajectories.select("puzzle_id").unique()
        shared = shared.join(sampled, on="puzzle_id", how="semi")
    ids = task.test["puzzle_id"].to_numpy()
    inputs, targets = tokens_numpy(task.test["inputs"]), tokens_numpy(task.test["target"])
    counts = dict(shared.select("puzzle_id", "solution_count").iter_rows())
    shown = []
    for name in choose(shared.sort("puzzle_id"), count):
        rows = np.flatnonzero(ids == name)
        # A secret answer is padding alone.
        solutions = [s for s in np.unique(targets[rows], axis=0) if s.any()]
        answers = [_answers(run, name, solutions) for run in runs]
        shown.append(Puzzle(name, inputs[rows[0]], solutions, answers, counts[name]))
    return shown


def _answers(run: RunInputs, puzzle_id: str, solutions: list[Tokens]) -> RunAnswers:
    rows = run.trajectories.filter(
        (pl.col("puzzle_id") == puzzle_id)
        & (pl.col("depth") == run.depth)
        & (pl.col("trajectory") < run.width)
    )
    tally: dict[bytes, list[bool]] = {}
    for prediction, valid in rows.select("prediction", "valid").iter_rows():
        tally.setdefault(bytes(prediction), []).append(valid)
    answers = [
        Answer(np.frombuffer(key, dtype=np.uint8), len(valid), all(valid))
        for key, valid in tally.items()
    ]
    answers.sort(key=lambda a: (not a.valid, -a.votes, a.tokens.tobytes()))
    missed = [s for s in solutions if s.tobytes() not in tally]
    return RunAnswers(run.name, len(rows), answers, missed)


def gallery_table(shown: Sequence[Puzzle], task: str) -> pl.DataFrame:
    """The gallery as a table: one row an answer, or a solution not found (0 votes)."""
    records = []
    for puzzle in shown:
        for run in puzzle.runs:
            rows = [(a.tokens, a.votes, a.valid) for a in run.answers]
            rows += [(tokens, 0, True) for tokens in run.missed]
            for tokens, votes, valid in rows:
                answer = " ".join(map(str, tokens.tolist()))
                records.append((task, puzzle.puzzle_id, run.run, votes, valid, answer))
    return pl.DataFrame(records, schema=GALLERY, orient="row")


@dataclass(frozen=True)
class Samples:
    """The first trajectories of an unconditional run: for each its answer at every depth."""

    run: str
    depths: list[int]
    rows: list[list[Answer]]


def samples(runs: Sequence[RunInputs], count: int = 10) -> list[Samples]:
    """What the first `count` trajectories of each run answered as their supervision steps went on
    (Figures 6 and 16)."""
    found = []
    for run in runs:
        rows = run.trajectories.filter(pl.col("trajectory") < count).sort("trajectory", "depth")
        columns = rows.select("trajectory", "prediction", "valid")
        grid: dict[int, list[Answer]] = {}
        for trajectory, prediction, valid in columns.iter_rows():
            tokens = np.array(prediction, dtype=np.uint8)
            grid.setdefault(trajectory, []).append(Answer(tokens, 1, valid))
        found.append(Samples(run.name, run.depths, list(grid.values())))
    return found


def samples_table(shown: Sequence[Samples], task: str) -> pl.DataFrame:
    """The last depth of the samples, in the columns of `gallery_table`."""
    records = [
        (task, "", its.run, 1, row[-1].valid, " ".join(map(str, row[-1].tokens.tolist())))
        for its in shown
        for row in its.rows
    ]
    return pl.DataFrame(records, schema=GALLERY, orient="row")
