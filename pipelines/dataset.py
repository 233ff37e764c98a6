"""The data stages: generate a task's raw tables, augment them, and read them back. A target that
is all padding is a secret one.

Knows where the tables of a task lie; what is in them is the task's.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import torch

from gram_core import tables
from gram_core.config import dump
from gram_core.errors import GramError
from gram_core.files import write_atomic
from gram_core.tables import TableError
from gram_core.tasks.base import Split, Task
from gram_core.tasks.batches import Examples, Puzzles, members
from pipelines import storage
from pipelines.params import DATA
from pipelines.provenance import provenance
from pipelines.sources import fetch
from pipelines.storage import StorageError


def generate(name: str, task: Task) -> dict[str, Any]:
    """data/NAME/raw/{train,test}.parquet and metadata.json; the counts in the latter."""
    split = task.generate(fetch)
    folder = DATA / name / "raw"
    _write(folder, split, task)
    metadata = json.dumps(split.metadata, indent=2) + "\n"
    write_atomic(folder / "metadata.json", metadata.encode())
    return split.metadata


def augment(name: str, task: Task) -> dict[str, int]:
    """data/NAME/{train,test}.parquet from the raw tables; the task's counts of what it did."""
    raw = DATA / name / "raw"
    split = task.augment(read(raw / "train.parquet", task), read(raw / "test.parquet", task))
    _write(DATA / name, split, task)
    return split.metadata


def _write(folder: Path, split: Split, task: Task) -> None:
    schema = tables.dataset_schema(task.length, task.length)
    about = {"task": dump(task.config), **provenance()}
    for part in ("train", "test"):
        tables.write(folder / f"{part}.parquet", getattr(split, part), schema, about)


def read(path: Path, task: Task) -> pa.Table:
    """A dataset table of `task`. Raises `TableError` where tokens do not fit the task."""
    table = tables.read(path, "dataset")
    for column in ("inputs", "target"):
        tokens = tables.tokens_numpy(table[column])
        if tokens.shape[1] != task.length:
            raise TableError(
                f"{path}: {column} has {tokens.shape[1]} tokens a row, the task {task.length}"
            )
        if int(tokens.max()) >= task.vocab:
            row = int(tokens.max(axis=1).argmax())
            raise TableError(
                f"{path}: {column} of row {row} has token {int(tokens.max())}, the task's "
                f"vocabulary is 0..{task.vocab - 1}"
            )
    return table


def publish(name: str, prefix: str) -> str:
    """Put the tables of a task where workers can read them, under a name made of their content,
    and return that address. Raises `StorageError`."""
    files = {part: DATA / name / part for part in ("train.parquet", "test.parquet")}
    content = {part: storage.read(str(path)) for part, path in files.items()}
    digest = hashlib.sha256(b"".join(content.values())).hexdigest()[:16]
    folder = storage.join(prefix, name, digest)
    there = storage.names(folder)
    for part, whole in content.items():
        address = storage.join(folder, part)
        # One that was damaged since is put there again.
        if part not in there or storage.read(address) != whole:
            storage.write(address, whole)
    return folder


@contextmanager
def published(address: str) -> Iterator[Path]:
    """A folder on this machine with the tables that `publish` put at the address, for a while.
    Raises `StorageError`, also where they are not what was put there."""
    with tempfile.TemporaryDirectory() as place:
        digest, folder = hashlib.sha256(), Path(place)
        for part in ("train.parquet", "test.parquet"):
            content = storage.read(storage.join(address, part))
            digest.update(content)
            (folder / part).write_bytes(content)
        if digest.hexdigest()[:16] != address.rpartition("/")[2]:
            raise StorageError(f"{address}: the tables there are not those that were put there")
        yield folder


def identifiers(name: str, task: Task) -> list[str]:
    """The groups whose variants have learned identifiers, in the order of these; none where the
    task's have not."""
    if not task.identified:
        return []
    return sorted(set(read(DATA / name / "train.parquet", task)["group_id"].to_pylist()))


def _puzzle(table: pa.Table, task: Task, groups: Sequence[str]) -> torch.Tensor:
    """The learned identifier of each row, int32 [N]: those of a group's variants follow each
    other. Raises `TableError` for a group that training did not see."""
    if not task.identified:
        return torch.zeros(len(table), dtype=torch.int32)
    first = {group: number * task.variants for number, group in enumerate(groups)}
    rows = zip(table["group_id"].to_pylist(), table["augmentation"].to_pylist(), strict=True)
    try:
        numbers = [first[group] + int(variant or 0) for group, variant in rows]
    except KeyError as error:
        raise TableError(f"group {error} has no learned identifier: it is not trained on") from None
    return torch.tensor(numbers, dtype=torch.int32)


def examples(
    name: str,
    task: Task,
    part: Literal["train", "test"],
    groups: Sequence[str] = (),
    folder: Path | None = None,
) -> Examples:
    """The pairs of one table whose target is known, in its order, as tensors; training rows with
    their variants, none of which is a test input. `groups` are `identifiers`; `folder` is where the
    tables lie, by default the task's own."""
    folder = folder or DATA / name
    table = read(folder / f"{part}.parquet", task)
    if part == "test":
        table = table.filter(tables.tokens_numpy(table["target"]).any(axis=1))
    inputs = torch.from_numpy(tables.tokens_numpy(table["inputs"]).copy())
    target = torch.from_numpy(tables.tokens_numpy(table["target"]).copy())
    puzzle = _puzzle(table, task, groups)
    if part == "test" or task.variants == 1:
        return Examples(inputs, target, puzzle)
    held_out: frozenset[bytes] = frozenset()
    if not task.identified:
        # With identifiers the answer hangs on the group: another's input gives nothing away.
        test = tables.tokens_numpy(read(folder / "test.parquet", task)["inputs"])
        held_out = frozenset(row.tobytes() for row in test)
    return Examples(
        inputs,
        target,
        puzzle,
        variants=task.variants,
        vary=task.vary,
        members=members(table["group_id"].to_pylist()),
        held_out=held_out,
        identified=task.identified,
    )


def labelled(
    name: str, task: Task, part: Literal["train", "test"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of one table and their labels, uint8 [N, S] and [N]; an image's label stands in
    its `group_id` before the slash."""
    table = read(DATA / name / f"{part}.parquet", task)
    labels = [int(group.partition("/")[0]) for group in table["group_id"].to_pylist()]
    images = torch.from_numpy(tables.tokens_numpy(table["target"]).copy())
    return images, torch.tensor(labels, dtype=torch.uint8)


def held_out(
    name: str, task: Task, groups: Sequence[str] = ()
) -> tuple[Puzzles, dict[str, set[bytes]]]:
    """The unique test inputs in the table's order, and the known targets of each. `groups` are
    those that the model has identifiers for."""
    table = test_table(name, task)
    inputs, target = (tables.tokens_numpy(table[c]) for c in ("inputs", "target"))
    told = target.any(axis=1)
    first: dict[str, int] = {}
    targets: dict[str, set[bytes]] = {}
    for row, puzzle_id in enumerate(table["puzzle_id"].to_pylist()):
        first.setdefault(puzzle_id, row)
        known = targets.setdefault(puzzle_id, set())
        if told[row]:
            known.add(target[row].tobytes())
    rows = torch.tensor(list(first.values()))
    unique = torch.from_numpy(inputs[rows.numpy()].copy())
    return Puzzles(list(first), unique, _puzzle(table, task, groups)[rows]), targets


def test_table(name: str, task: Task) -> pa.Table:
    """The test rows. Raises `TableError`."""
    return read(DATA / name / "test.parquet", task)


def solution_counts(name: str, task: Task) -> pl.LazyFrame:
    """`puzzle_id` and `solution_count` of the test inputs."""
    table = test_table(name, task)
    frame = pl.from_arrow(table.select(["puzzle_id", "solution_count"]))
    if not isinstance(frame, pl.DataFrame):
        raise GramError(f"test table of {name}: not a table")
    return frame.unique(maintain_order=True).lazy()
