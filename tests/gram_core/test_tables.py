from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gram_core import tables
from gram_core.tables import (
    TableError,
    dataset_schema,
    provenance,
    puzzles_schema,
    tokens_array,
    tokens_numpy,
    trajectories_schema,
)

SCHEMAS = {
    "dataset": dataset_schema(4, 2),
    "trajectories": trajectories_schema(4),
    "puzzles": puzzles_schema(),
}


def column(field: pa.Field) -> list:
    """Three values that fit a field; token lists of its length."""
    if pa.types.is_fixed_size_list(field.type):
        return [[row] * field.type.list_size for row in range(3)]
    if pa.types.is_string(field.type):
        return ["a", "b", ""]
    if pa.types.is_boolean(field.type):
        return [True, False, True]
    return [0, 1, 2] if pa.types.is_integer(field.type) else [0.0, 0.5, 1.0]


def sample(kind: str) -> pa.Table:
    schema = SCHEMAS[kind]
    return pa.table({f.name: pa.array(column(f), f.type) for f in schema}, schema=schema)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "table.parquet"


def stored(path: Path, kind: str = "dataset") -> pa.Table:
    tables.write(path, sample(kind), SCHEMAS[kind], {"run": "a"})
    return pq.read_table(path)


def assert_one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_table_comes_back_as_it_was_written(path, kind):
    made = {"run": "a", "revision": "abc", "params": {"x": [1, 2.5, None]}}
    tables.write(path, sample(kind), SCHEMAS[kind], made)
    table = tables.read(path, kind)
    assert table.equals(sample(kind))
    assert table.schema.equals(SCHEMAS[kind])
    assert provenance(table) == made
    assert list(path.parent.iterdir()) == [path]


def test_columns_are_put_in_order_cast_and_the_superfluous_left_out(path):
    table = sample("dataset").append_column("more", pa.array([1, 2, 3]))
    table = table.select(table.column_names[::-1])
    table = table.set_column(
        table.column_names.index("solution_count"),
        "solution_count",
        pa.array([0, 1, 2], pa.int64()),
    )
    tables.write(path, table, SCHEMAS["dataset"], {})
    assert tables.read(path, "dataset").equals(sample("dataset"))


def test_a_table_of_nobody_knows_where_has_no_provenance():
    assert provenance(pa.table({"a": [1]})) == {}


def test_coverage_may_be_null(path):
    table = sample("puzzles")
    nulls = pa.array([None, 0.5, None], pa.float64())
    table = table.set_column(table.column_names.index("coverage"), "coverage", nulls)
    tables.write(path, table, puzzles_schema(), {})
    assert tables.read(path, "puzzles")["coverage"].to_pylist() == [None, 0.5, None]


@pytest.mark.parametrize(
    "break_table",
    [
        lambda t: t.drop_columns(["target"]),
        lambda t: t.set_column(3, "solution_count", pa.array([-1, 0, 1])),
        lambda t: t.set_column(3, "solution_count", pa.array(["x", "y", "z"])),
        lambda t: t.set_column(1, "inputs", pa.array([[1], [2, 3], [4]])),
    ],
    ids=["missing", "negative", "text", "ragged"],
)
def test_columns_that_do_not_fit_are_refused_and_the_old_file_stays(path, break_table):
    before = stored(path)
    with pytest.raises(TableError, match="do not fit the dataset table") as error:
        tables.write(path, break_table(sample("dataset")), SCHEMAS["dataset"], {})
    assert str(error.value).startswith(f"{path}: ")
    assert pq.read_table(path).equals(before)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(path, monkeypatch):
    before = stored(path)

    def full_disk(writer: pq.ParquetWriter, table: pa.Table, **settings: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full_disk)
    with pytest.raises(TableError, match=r"not written: .*No space left") as error:
        tables.write(path, sample("dataset"), SCHEMAS["dataset"], {"run": "b"})
    assert_one_line(error, path)
    assert list(path.parent.iterdir()) == [path]
    assert pq.read_table(path).equals(before)


def test_a_missing_file_is_one_line_that_says_what_makes_it(path):
    with pytest.raises(TableError, match="no such table; run the stage") as error:
        tables.read(path, "dataset")
    assert_one_line(error, path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_truncated_file_is_one_line(path, keep):
    stored(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(TableError, match="not a readable Parquet file") as error:
        tables.read(path, "dataset")
    assert_one_line(error, path)


def test_another_table_is_refused(path):
    stored(path, "puzzles")
    with pytest.raises(TableError, match=r"the dataset table.* this is 'puzzles'") as error:
        tables.read(path, "dataset")
    assert_one_line(error, path)


def test_a_parquet_file_of_somebody_elses_is_refused(path):
    path.parent.mkdir()
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(TableError, match=r"this is '\?', version '\?'") as error:
        tables.read(path, "dataset")
    assert_one_line(error, path)


def test_another_version_is_refused(path):
    table = stored(path)
    metadata = {**table.schema.metadata, b"gram.version": b"0"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(TableError, match="version 1; this is 'dataset', version '0'") as error:
        tables.read(path, "dataset")
    assert_one_line(error, path)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_missing_column_is_named(path, kind):
    table = stored(path, kind)
    for name in SCHEMAS[kind].names:
        pq.write_table(table.drop_columns([name]), path)
        with pytest.raises(TableError, match=f"column '{name}' is missing") as error:
            tables.read(path, kind)
        assert_one_line(error, path)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_column_of_another_type_is_named(path, kind):
    table = stored(path, kind)
    for index, name in enumerate(SCHEMAS[kind].names):
        wrong = table.set_column(index, name, pa.array([1, 2, 3], pa.int8()))
        pq.write_table(wrong, path)
        with pytest.raises(TableError, match=f"column '{name}' is int8, the {kind} table") as error:
            tables.read(path, kind)
        assert_one_line(error, path)


@pytest.mark.parametrize(
    ("name", "values"),
    [("puzzle_id", ["a", None, "c"]), ("inputs", [[1] * 4, None, [1] * 4]),
     ("inputs", [[1] * 4, [1, 2, None, 1], [1] * 4])],
)  # fmt: skip
def test_missing_values_are_refused_in_both_directions(path, name, values):
    schema = SCHEMAS["dataset"]
    index = schema.get_field_index(name)
    table = sample("dataset").set_column(index, name, pa.array(values, schema.field(index).type))
    with pytest.raises(TableError, match=f"column '{name}' has 1 missing") as caught:
        tables.write(path, table, schema, {})
    assert_one_line(caught, path)
    assert not path.exists()
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata(schema.metadata), path)
    with pytest.raises(TableError, match=f"column '{name}' has 1 missing") as caught:
        tables.read(path, "dataset")
    assert_one_line(caught, path)


def test_an_empty_table_is_refused(path):
    tables.write(path, sample("dataset").slice(0, 0), SCHEMAS["dataset"], {})
    with pytest.raises(TableError, match="the dataset table has no rows") as error:
        tables.read(path, "dataset")
    assert_one_line(error, path)


def test_tokens_go_to_arrow_and_back_in_slices_and_chunks_too(rng):
    tokens = rng.integers(0, 255, (6, 5)).astype(np.uint8)
    column = pa.chunked_array([tokens_array(tokens[:2]), tokens_array(tokens[2:])])
    assert np.array_equal(tokens_numpy(column), tokens)
    assert np.array_equal(tokens_numpy(column.slice(1, 4)), tokens[1:5])
    table = pa.table({"t": tokens_array(tokens)}).filter(pa.array([True, False] * 3))
    assert np.array_equal(tokens_numpy(table["t"]), tokens[::2])
