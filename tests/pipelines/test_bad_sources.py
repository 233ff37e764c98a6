"""Damaged and wrong files of every kind of source: one line that names file and row, exit code 1,
and nothing written."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from workspace import write_params

from pipelines.runtime import fail
from stages.generate import main

PUZZLE = ".23434122143432."
ANSWER = "1234341221434321"


def csv(path: Path, rows: list[tuple[str, str]], header: str = "question,answer") -> None:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


def sudoku(bad: Callable[[Path], None]) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        bad(folder / "train.csv")
        csv(folder / "test.csv", [(PUZZLE, ANSWER)])
        source = {"kind": "files", "train_path": "train.csv", "test_path": "test.csv"}
        return {"kind": "sudoku", "size": 4, "source": source}

    return make


def truncated(path: Path) -> None:
    whole = gzip.compress(b"question,answer\n" + f"{PUZZLE},{ANSWER}\n".encode() * 500, mtime=0)
    path.write_bytes(whole[:-20])


def images(header: bytes, pixels: int) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "images").write_bytes(header + bytes(pixels))
        (folder / "labels").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 5) + bytes(5))
        source = {"kind": "idx", "images": "images", "labels": "labels", "held_out": 1}
        return {"kind": "digits", "side": 4, "source": source}

    return make


def arc(grid: list[list[int]]) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        good = {"input": [[1]], "output": [[2]]}
        for part, test in (("training", {"input": grid, "output": [[1]]}), ("evaluation", good)):
            (folder / "tasks" / part).mkdir(parents=True)
            task = {"train": [good], "test": [test]}
            (folder / "tasks" / part / f"{part}1.json").write_text(json.dumps(task))
        return {"kind": "arc", "source": {"kind": "folder", "path": "tasks"}, "augmentations": 1}

    return make


def table(inputs: list[list[int]], column: str = "inputs") -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        frame = pl.DataFrame({column: inputs, "target": [[1, 2]] * len(inputs)})
        frame.write_parquet(folder / "own.parquet")
        return {"kind": "table", "length": 2, "vocab": 3, "train": "own.parquet"}

    return make


IDX = struct.pack(">BBBB3I", 0, 0, 8, 3, 5, 4, 4)
CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "wrong columns": (
        sudoku(lambda p: csv(p, [(PUZZLE, ANSWER)], "quiz,answer")),
        "train.csv: column 'question' is missing",
    ),
    "a grid that is too short": (
        sudoku(lambda p: csv(p, [(PUZZLE, ANSWER), (PUZZLE[:-1], ANSWER)])),
        "train.csv: question of row 2 has 15 characters, expected 16",
    ),
    "two solutions": (
        sudoku(lambda p: csv(p, [(PUZZLE, ANSWER), ("." * 16, ANSWER)])),
        "train.csv: puzzle of row 2 has several solutions",
    ),
    "no solution": (
        sudoku(lambda p: csv(p, [("11" + "." * 14, ANSWER)])),
        "train.csv: puzzle of row 1 has no solution",
    ),
    "another answer": (
        sudoku(lambda p: csv(p, [(PUZZLE, ANSWER[4:] + ANSWER[:4])])),
        "train.csv: puzzle of row 1 has another solution than its answer",
    ),
    "truncated gzip": (sudoku(truncated), "train.csv: not a readable table"),
    "a file that is not there": (sudoku(lambda p: None), "train.csv"),
    "another magic number": (images(b"\0\0\x09\x03" + IDX[4:], 80), "images: starts with 00000903"),
    "cut images": (images(IDX, 79), "images: 95 bytes"),
    "a grid of 31 rows": (arc([[0]] * 31), "training1: test pair 1: input: 31x1 cells"),
    "a colour of 10": (arc([[10]]), "training1: test pair 1: input: 10 is no colour"),
    "tokens beyond the vocabulary": (table([[1, 2], [1, 3]]), "own.parquet"),
    "rows of another length": (table([[1, 2], [1, 2, 1]]), "own.parquet"),
    "another column": (table([[1, 2]], "x"), "own.parquet"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_what_is_wrong_and_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gram_core.errors import GramError

    make, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    write_params({"tasks": {"bad": make(tmp_path)}, "runs": {"run": {"task": "bad"}}})
    with pytest.raises(GramError) as error:
        main(["bad"])
    text = str(error.value)
    assert message in text
    assert "\n" not in text and len(text) < 400
    assert not (tmp_path / "data").exists()
    assert fail(text) == 1


def test_the_good_files_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cases above fail for their own reason."""
    monkeypatch.chdir(tmp_path)
    good = {
        "sudoku": sudoku(lambda p: csv(p, [("1" + PUZZLE[1:], ANSWER)])),
        "images": images(IDX, 80),
        "arc": arc([[0]] * 30),
        "table": table([[1, 2], [2, 1], [1, 1], [2, 2]]),
    }
    for name, make in good.items():
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        write_params({"tasks": {name: make(folder)}, "runs": {"run": {"task": name}}})
        main([name])
        assert (folder / "data" / name / "raw" / "train.parquet").exists(), name
        assert np.isfinite(list(json.loads(
            (folder / "data" / name / "raw" / "metadata.json").read_text()
        ).values())).all()  # fmt: skip
