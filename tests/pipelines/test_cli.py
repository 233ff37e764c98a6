"""The `gram` command, as a person meets it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from workspace import child_environment, make_data, params, write_params

from gram_core.errors import GramError
from gram_core.solve import Answer, Solver
from pipelines.cli import _sampling, main
from pipelines.params import load_run
from pipelines.train import train_run

# One completion: columns 1 3 0 2.
BOARD = ".Q..|....|....|...."
ATTACKED = "QQ..|....|....|...."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to complete 4x4 boards."""
    path = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    patch.chdir(path)
    try:
        document = params(
            tasks__queens__size=4,
            tasks__queens__remove=[2, 3],
            tasks__queens__split__test=0.1,
            runs__tiny__model__dim=32,
            runs__tiny__model__ffn=64,
            runs__tiny__train__steps=400,
            runs__tiny__train__batch=32,
            runs__tiny__train__log_every=100,
            runs__tiny__train__checkpoint_every=400,
            runs__tiny__train__ema=0.98,
            runs__tiny__train__optim__warmup=50,
            runs__tiny__train__optim__lr=5e-3,
            runs__tiny__objective__beta=1.5,
        )
        write_params(document)
        make_data()
        train_run(load_run("tiny"))
    finally:
        patch.undo()
    return path


@pytest.fixture
def at(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def boards(text: str) -> list[str]:
    """The boards that `gram solve` printed."""
    return ["|".join(block.splitlines()[1:]) for block in text.strip().split("\n\n")]


def test_solve_prints_the_verified_answers(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "tiny", BOARD, "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert boards(out) == [".Q..|...Q|Q...|..Q."]
    assert out.startswith("verified, ")


def test_solve_reads_a_file(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "board.txt").write_text(BOARD.replace("|", "\n") + "\n")
    assert main(["solve", "tiny", "board.txt", "--width", "64"]) == 0
    from_file = capsys.readouterr().out
    main(["solve", str(at / "models/tiny"), BOARD, "--width", "64"])
    assert capsys.readouterr().out == from_file


def test_solve_asks_for_what_its_options_say(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    right, wrong = BOARD.replace(".", "Q", 1), BOARD

    def solve(self: Solver, puzzle: str, width: int, **settings: int) -> list[Answer]:
        asked.append((puzzle, width, settings))
        # One was not drawn, as where the first valid answer is the last.
        found = ((right, width - 3), (wrong, 2))
        return [Answer(np.zeros(16), text == right, count, 0.5, text) for text, count in found]

    monkeypatch.setattr(Solver, "solve", solve)
    assert main(["solve", "tiny", BOARD]) == 0
    some = capsys.readouterr()
    assert main(["solve", "tiny", BOARD, "--width=7", "--depth=5", "--seed=9", "--all"]) == 0
    every = capsys.readouterr()
    assert asked == [
        (BOARD, 20, {"seed": 0}), (BOARD, 7, {"seed": 9, "depth": 5}),
    ]  # fmt: skip
    assert some.out == f"verified, 17 of 19 trajectories, value 0.50\n{right}\n\n"
    assert every.out == (
        f"verified, 4 of 6 trajectories, value 0.50\n{right}\n\n"
        f"not verified, 2 of 6 trajectories, value 0.50\n{wrong}\n\n"
    )
    for err in (some.err, every.err):
        assert err.endswith("1 verified of 2 distinct answers\n")


def test_solve_says_when_nothing_was_verified(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "tiny", ATTACKED]) == 1
    captured = capsys.readouterr()
    assert "not verified" in captured.out
    assert captured.err.splitlines()[-1].startswith("none of ")


@pytest.mark.parametrize(
    ("board", "words"),
    [
        ("Q...|....", "2 rows, expected 4"),
        ("QX..|....|....|....", "'X'"),
        ("", "0 rows"),
    ],
)
def test_solve_refuses_a_malformed_board(
    at: Path, board: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solve", "tiny", board]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: puzzle: ")
    assert words in line


def test_a_long_puzzle_is_no_name_of_a_file(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "tiny", "....\n" * 100]) == 2
    assert capsys.readouterr().err.startswith("error: puzzle: ")


def test_info_names_model_and_metrics(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny"]) == 0
    out = capsys.readouterr().out
    for words in ("parameters", "nqueens", "best_of_value@3", "prior_valid", "made at revision"):
        assert words in out


def test_sample_is_the_stage(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = pl.read_parquet("results/tiny/trajectories.parquet")
    assert main(["sample", "tiny"]) == 0
    assert pl.read_parquet("results/tiny/trajectories.parquet").equals(before)
    assert "rows" in capsys.readouterr().err


def test_unknown_run_is_an_error(at: Path) -> None:
    with pytest.raises(GramError, match="no such model"):
        main(["solve", "nobody", BOARD])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["solve", "tiny", BOARD, "--width", "0"]])
def test_wrong_usage_exits_with_two(at: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_shows_the_command_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "gram solve" in out
    assert "Solver.load" in out


def test_solve_samples_as_the_run_does(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = _sampling("tiny")
    assert sampling is not None
    assert sampling == load_run("tiny").section("sample", type(sampling))
    assert sampling.all_depths == (1, 2, 3), "of params.yaml, not the defaults"
    assert _sampling(str(at / "models" / "tiny")) == _sampling("models/tiny") == sampling
    # A folder elsewhere, an unknown run or a setting that cannot be: the defaults.
    assert _sampling(str(at / "elsewhere" / "tiny")) is None
    assert _sampling("other") is None
    before = (at / "params.yaml").read_text()
    try:
        write_params(params(runs__tiny__sample__halt_threshold=2))
        assert _sampling("tiny") is None
        assert "sampling with the defaults" in capsys.readouterr().err
    finally:
        (at / "params.yaml").write_text(before)


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": "b"}', '{"a": 1'])
def test_info_of_damaged_metrics_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(trained / "models" / "tiny", folder)
    (folder / "metrics.json").write_text(content)
    assert main(["info", str(folder)]) == 1
    assert capsys.readouterr().err.endswith("metrics.json: not a mapping of numbers; make it again "
                                            "(dvc repro)\n")  # fmt: skip


def test_the_command_finds_what_lies_beside_params_yaml(folder: Path, tmp_path: Path) -> None:
    """The module that a table task's verifier names, as stages find it."""
    task = {"kind": "table", "length": 2, "vocab": 3, "train": "x", "verifier": "own_rule:valid"}
    write_params({"tasks": {"mine": task}, "runs": {"mine": {"task": "mine"}}})
    Path("own_rule.py").write_text("def valid(inputs, answers):\n    return inputs[:, 0] > 0\n")
    program = tmp_path / "elsewhere" / "gram"
    program.parent.mkdir()
    program.write_text("from pipelines.cli import program\n\nprogram()\n")
    done = subprocess.run(
        [sys.executable, str(program), "submission", "mine"],
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: params.yaml: runs.mine: task 'mine' is not of kind arc\n"
