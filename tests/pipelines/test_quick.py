"""The smoke profile in one process: every task from its data to the report."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from workspace import make_data, make_run, params, write_params

from gram_core import tables
from gram_core.errors import GramError
from pipelines.dataset import examples, held_out, identifiers
from pipelines.params import load_run, read_params
from pipelines.quick import main, run_here
from pipelines.report.build import build
from pipelines.submission import write_submission


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke profile's runs that need no Ray."""
    path = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        run_here("smoke", ["~tasks.nqueens5", "~runs.smoke_gram", "~runs.smoke_twin"])
    return path


def numbers(workspace: Path, run: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((workspace / f"results/{run}/metrics.json").read_text())
    return found


def test_every_task_has_its_numbers(workspace: Path) -> None:
    sudoku = numbers(workspace, "smoke_sudoku")
    assert {"token_accuracy", "any_valid@4", "coverage@4", "bound"} <= set(sudoku)
    coloring = numbers(workspace, "smoke_coloring")
    assert coloring["conflicts_total"] == pytest.approx(12 * coloring["conflicts"])
    assert "coverage@4" in coloring
    boards = numbers(workspace, "smoke_boards")
    assert {"accuracy", "accuracy_low", "coverage@50", "coverage_ideal@50"} <= set(boards)
    # One input: nothing to select an answer for, no interval over inputs.
    assert not any(name.startswith(("best_of", "any_valid", "majority")) for name in boards)
    assert "coverage@50_low" not in boards
    assert {"steps", "bound"} <= set(boards) and not {"steps_low", "bound_low"} & set(boards)
    assert "bound_low" in sudoku
    digits = numbers(workspace, "smoke_digits")
    assert {"classifier_score", "classifier_distance", "distinct@50", "bound"} <= set(digits)
    assert not any(name.startswith(("accuracy", "any_valid", "coverage")) for name in digits)
    arc = numbers(workspace, "smoke_arc")
    assert {"pass@1", "pass@2", "pass@1000"} <= set(arc)
    assert arc["pass@1"] <= arc["pass@1000"]


def test_arc_saves_its_identifiers_and_writes_a_submission(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = json.loads((workspace / "models/smoke_arc/config.json").read_text())
    # Two training tasks and two scored ones, four variants each.
    assert len(about["identifiers"]) == 4 and about["identifiers"] == sorted(about["identifiers"])
    assert about["shape"]["puzzles"] == 16
    monkeypatch.chdir(workspace)
    assert write_submission(load_run("smoke_arc"), Path("out.json")) == 2
    document = json.loads(Path("out.json").read_text())
    assert set(document) < set(about["identifiers"])
    assert set(document[min(document)][0]) == {"attempt_1", "attempt_2"}
    with pytest.raises(GramError, match="is a folder; name a file"):
        write_submission(load_run("smoke_arc"), Path())
    with pytest.raises(Exception, match="not of kind arc"):
        write_submission(load_run("smoke_sudoku"), Path("no.json"))
    assert not Path("no.json").exists()


def test_secret_answers_are_answered_and_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ARC folder as the ARC Prize gives it: the evaluation tasks' test outputs are not there."""
    monkeypatch.chdir(tmp_path)
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    for part, test in (("training", pair), ("evaluation", {"input": [[3, 4]]})):
        Path("tasks", part).mkdir(parents=True)
        task = {"train": [pair, pair], "test": [test]}
        Path("tasks", part, f"{part}.json").write_text(json.dumps(task))
    document = params(
        tasks={
            "arc": {
                "kind": "arc",
                "source": {"kind": "folder", "path": "tasks"},
                "augmentations": 1,
                "test_variants": 2,
            }
        },
        runs__tiny__task="arc",
        runs__tiny__model__prefix_tokens=2,
        runs__tiny__train__steps=4,
    )
    write_params(document)
    make_data("arc")
    found = make_run()
    assert not any(name.startswith("pass") for name in found)
    assert all(math.isfinite(value) for value in found.values())
    assert write_submission(load_run("tiny"), Path("out.json")) == 1
    assert set(json.loads(Path("out.json").read_text())) == {"evaluation"}
    runs, tasks = (document[section] for section in ("runs", "tasks"))
    build(Path(), runs, Path("report"), tasks)
    page = Path("report/index.html").read_text()
    assert "answer secret" in page and "found 0;" in page
    gallery = pl.read_csv("report/tables/gallery.csv")
    assert not [a for a in gallery["answer"] if set(a.split()) == {"0"}]


def test_the_report_shows_every_task(workspace: Path) -> None:
    page = (workspace / "report/index.html").read_text()
    for words in ("sudoku4", "coloring5", "boards4", "arc", "digits8", "Conflict edges", "pass@2"):
        assert words in page, words
    for drawing in ("digit given", "vertex colour-", "pixel-on", "arc-0"):
        assert drawing in page, drawing
    assert "step 4" in page, "samples over supervision steps"
    gallery = pl.read_csv(workspace / "report/tables/gallery.csv")
    assert set(gallery["task"]) == {"sudoku4", "coloring5", "boards4", "arc", "digits8"}


def test_the_report_shows_no_more_than_there_is_of_one_input(workspace: Path) -> None:
    """Nothing to choose an answer for, no interval over one puzzle, nothing valid without a
    rule."""
    for over in ("width", "depth"):
        frame = pl.read_csv(workspace / f"report/tables/{over}_scaling.csv")
        boards = frame.filter(pl.col("run") == "smoke_boards")
        assert set(boards["metric"]) == {"accuracy", "coverage", "coverage_ideal"}
        assert boards["low"].null_count() == boards["high"].null_count() == len(boards)
        others = frame.filter(pl.col("run") == "smoke_sudoku")
        assert "any_valid" in others["metric"] and not others["low"].null_count()
    halting = pl.read_csv(workspace / "report/tables/halting.csv")
    assert set(halting.filter(pl.col("run") == "smoke_digits")["outcome"]) <= {
        "halted",
        "reached the limit",
    }
    training = pl.read_csv(workspace / "report/tables/training.csv")
    judged = training.filter(pl.col("term") == "valid")["run"].unique().to_list()
    assert "smoke_boards" in judged and "smoke_digits" not in judged
    page = (workspace / "report/index.html").read_text()
    assert "trajectories, with 95% intervals over them" in page
    assert "what is found of all answers is, of smoke_boards" in page


def test_one_input_whose_answers_nobody_has_counted_has_no_figure_by_width(
    workspace: Path, tmp_path: Path
) -> None:
    """Complete 9x9 boards: there is no coverage, and nothing is chosen."""
    root = tmp_path / "root"
    shutil.copytree(workspace, root)
    path = root / "results/smoke_boards/puzzles.parquet"
    table = tables.read(path, "puzzles")
    place = table.schema.get_field_index("solution_count")
    unknown = pa.array([0] * len(table), table.schema.field(place).type)
    table = table.set_column(place, table.schema.field(place), unknown)
    tables.write(path, table, tables.puzzles_schema(), tables.provenance(table))
    document = read_params(root / "params.yaml")
    runs = {"smoke_boards": document["runs"]["smoke_boards"]}
    build(root, runs, tmp_path / "report", document["tasks"])
    for over in ("width", "depth"):
        frame = pl.read_csv(tmp_path / f"report/tables/{over}_scaling.csv")
        assert set(frame["metric"]) == {"accuracy"}
    assert "what is found of all answers" not in (tmp_path / "report/index.html").read_text()


def test_an_unknown_profile_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 1
    assert "no profile 'nothing'; there are: cpu, paper, smoke" in capsys.readouterr().err


def test_no_variant_of_a_training_board_is_a_test_input(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline tells examples which inputs are held out, and which identifiers they have."""
    monkeypatch.chdir(workspace)
    sudoku = load_run("smoke_sudoku")
    train = examples(sudoku.task_name, sudoku.task, "train")
    test = tables.tokens_numpy(tables.read(Path("data/sudoku4/test.parquet"), "dataset")["inputs"])
    assert train.variants > 1
    assert train.held_out == {row.tobytes() for row in test}
    arc = load_run("smoke_arc")
    groups = identifiers(arc.task_name, arc.task)
    train = examples(arc.task_name, arc.task, "train", groups)
    number = 2 * len(train.inputs)  # the first row's second variant
    assert train.take(np.array([number])).puzzle.item() == train.puzzle[0].item() + 2
    puzzles, _ = held_out(arc.task_name, arc.task, groups)
    for name, puzzle in zip(puzzles.ids, puzzles.puzzle.tolist(), strict=True):
        group, _, variant = name.rsplit("/", 2)
        assert puzzle == groups.index(group) * arc.task.variants + int(variant)
    assert {name.rpartition("/")[2] for name in puzzles.ids} > {"0"}
