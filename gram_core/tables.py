"""The tables that the stages exchange: one Arrow schema each, Parquet on disk.

Writing is atomic (a file is whole or absent), reading checks the schema, and the metadata says
what made the file. It knows no task and no model.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gram_core.errors import GramError

VERSION = "1"


class TableError(GramError):
    """A file that is missing, damaged or not the table it should be; one line, naming the file."""


def _tokens(length: int) -> pa.DataType:
    return pa.list_(pa.uint8(), length)


def dataset_schema(inputs: int, target: int) -> pa.Schema:
    """One row a pair of an input and one of its targets; token counts fix the list sizes."""
    return pa.schema(
        [
            ("puzzle_id", pa.string()),
            ("inputs", _tokens(inputs)),
            ("target", _tokens(target)),
            ("solution_count", pa.uint32()),
            ("group_id", pa.string()),
            ("augmentation", pa.string()),
        ],
        metadata={"gram.table": "dataset", "gram.version": VERSION},
    )


def trajectories_schema(target: int) -> pa.Schema:
    """One row a trajectory and depth allowed."""
    return pa.schema(
        [
            ("puzzle_id", pa.string()),
            ("trajectory", pa.uint32()),
            ("depth", pa.uint16()),
            ("seed", pa.uint64()),
            ("steps", pa.uint16()),
            ("halted", pa.bool_()),
            ("value", pa.float32()),
            ("prediction", _tokens(target)),
            ("valid", pa.bool_()),
            ("exact", pa.bool_()),
        ],
        metadata={"gram.table": "trajectories", "gram.version": VERSION},
    )


def puzzles_schema() -> pa.Schema:
    """One row a puzzle, width and depth. `selected_*` says whether that selector's answer is
    valid, `accuracy` the share of the trajectories that are."""
    return pa.schema(
        [
            ("puzzle_id", pa.string()),
            ("width", pa.uint32()),
            ("depth", pa.uint16()),
            ("solution_count", pa.uint32()),
            ("selected_majority", pa.bool_()),
            ("selected_value", pa.bool_()),
            ("selected_first_halt", pa.bool_()),
            ("accuracy", pa.float64()),
            ("coverage", pa.float64()),
            ("valid_count", pa.uint32()),
            ("distinct_valid", pa.uint32()),
            ("distinct", pa.uint32()),
            ("mean_steps", pa.float64()),
        ],
        metadata={"gram.table": "puzzles", "gram.version": VERSION},
    )


def trials_schema() -> pa.Schema:
    """One row a trial of a sweep and report: `params` are the values that the sweep chose, as JSON
    by the dotted key of the run's setting, `seconds` the wall time since the trial began. A trial
    that reported nothing has one row at step 0 without metrics."""
    return pa.schema(
        [
            ("sweep", pa.string()),
            ("trial", pa.string()),
            ("number", pa.uint32()),
            ("state", pa.string()),
            ("step", pa.uint32()),
            ("seconds", pa.float64()),
            ("params", pa.map_(pa.string(), pa.string())),
            ("metrics", pa.map_(pa.string(), pa.float64())),
        ],
        metadata={"gram.table": "trials", "gram.version": VERSION},
    )


def write(path: Path, table: pa.Table, schema: pa.Schema, provenance: Mapping[str, Any]) -> None:
    """Write `table` to `path` whole or not at all; `provenance` (run, revision, params) goes into
    the metadata as JSON. Raises `TableError` where the columns do not fit the schema."""
    write_parts(path, [table], schema, provenance)


def write_parts(
    path: Path, parts: Iterable[pa.Table], schema: pa.Schema, provenance: Mapping[str, Any]
) -> int:
    """`write` of a table that comes in parts, none of which need be in memory with another; the
    number of rows."""
    metadata = {**(schema.metadata or {}), b"gram.provenance": json.dumps(provenance).encode()}
    whole = schema.with_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    rows = 0
    try:
        with pq.ParquetWriter(partial, whole, compression="zstd") as writer:
            for part in parts:
                writer.write_table(_fitted(path, part, schema).replace_schema_metadata(metadata))
                rows += len(part)
        partial.replace(path)
    except OSError as error:
        raise TableError(f"{path}: not written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return rows


def _fitted(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    try:
        table = table.select(schema.names).cast(schema)
    except (KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise TableError(
            f"{path}: columns do not fit the {_kind(schema)} table: {reason}"
        ) from None
    _check_nulls(path, table)
    return table


def read(path: Path, kind: str) -> pa.Table:
    """Read and check the table `kind` ("dataset", "trajectories", "puzzles" or "trials").

    Raises `TableError` for a missing or damaged file, another table, or another version.
    """
    with _opened(path, kind) as file:
        table = file.read()
        table.validate(full=True)
    _check_nulls(path, table)
    return table


def batches(path: Path, kind: str, rows: int = 1 << 16) -> Iterator[pa.Table]:
    """`read` in parts of at most so many rows, in order, one in memory at a time."""
    with _opened(path, kind) as file:
        for batch in file.iter_batches(batch_size=rows):
            part = pa.Table.from_batches([batch])
            part.validate(full=True)
            _check_nulls(path, part)
            yield part


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[pq.ParquetFile]:
    """The file of a table `kind`, its schema checked. Raises `TableError`, also for what reading
    it in the block meets."""
    if not path.is_file():
        raise TableError(f"{path}: no such table; run the stage that makes it (dvc repro)")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            found = schema.metadata or {}
            name, version = (
                found.get(b"gram.table", b"?").decode(),
                found.get(b"gram.version", b"?"),
            )
            if name != kind or version.decode() != VERSION:
                raise TableError(
                    f"{path}: expected the {kind} table, version {VERSION}; "
                    f"this is {name!r}, version {version.decode()!r}"
                )
            _check_columns(path, kind, schema)
            # That of a sweep which was not run has none.
            if file.metadata.num_rows == 0 and kind != "trials":
                raise TableError(f"{path}: the {kind} table has no rows")
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TableError(f"{path}: not a readable Parquet file ({reason})") from None


def provenance(table: pa.Table) -> dict[str, Any]:
    """What made a table: the mapping that `write` stored."""
    stored = (table.schema.metadata or {}).get(b"gram.provenance", b"{}")
    made: dict[str, Any] = json.loads(stored)
    return made


def _kind(schema: pa.Schema) -> str:
    return str((schema.metadata or {})[b"gram.table"].decode())


def _check_columns(path: Path, kind: str, schema: pa.Schema) -> None:
    """Names and types must be the declared ones, whatever the token lengths are."""

    def size(name: str) -> int:
        index = schema.get_field_index(name)
        if index < 0 or not pa.types.is_fixed_size_list(schema.field(index).type):
            return 1
        return int(schema.field(index).type.list_size)

    declared = {
        "dataset": lambda: dataset_schema(size("inputs"), size("target")),
        "trajectories": lambda: trajectories_schema(size("prediction")),
        "puzzles": puzzles_schema,
        "trials": trials_schema,
    }[kind]()
    for field in declared:
        index = schema.get_field_index(field.name)
        if index < 0:
            raise TableError(f"{path}: column {field.name!r} is missing from the {kind} table")
        if not schema.field(index).type.equals(field.type):
            raise TableError(
                f"{path}: column {field.name!r} is {schema.field(index).type}, "
                f"the {kind} table wants {field.type}"
            )


def _check_nulls(path: Path, table: pa.Table) -> None:
    """Only the coverage of a puzzle without known solutions may be missing."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        missing = column.null_count
        if pa.types.is_fixed_size_list(column.type):
            missing += column.flatten().null_count
        if missing and name != "coverage":
            raise TableError(f"{path}: column {name!r} has {missing} missing values, none may be")


def tokens_array(tokens: Any) -> pa.FixedSizeListArray:
    """A uint8 array [N, L] as an Arrow column."""
    flat = pa.array(tokens.reshape(-1), type=pa.uint8())
    return pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1])


def tokens_numpy(column: pa.ChunkedArray) -> Any:
    """An Arrow token column as a uint8 array [N, L]."""
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
