"""How a program begins and ends."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from workspace import REPOSITORY as ROOT

PROGRAM = """
import atexit, sys
from gram_core.errors import GramError
from pipelines.runtime import entry

class TakenDown:
    def __del__(self):
        print("taken down")

held = TakenDown()

def main(arguments):
    atexit.register(print, "at exit")
    sys.stdout.write("said, ")
    {what}

entry(main)
"""


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("return", 0, ""),
        ("return 3", 3, ""),
        ("raise GramError('no such run')", 1, "error: no such run\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise OSError(28, 'No space left on device', 'x')", 1,
         "error: x: No space left on device\n"),
        ("raise OSError(21, 'Is a directory', 'x')", 1, "error: x: Is a directory\n"),
    ],
)  # fmt: skip
def test_a_program_ends_before_python_is_taken_down(
    tmp_path: Path, what: str, code: int, error: str
) -> None:
    done = run(tmp_path, what)
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == "said, at exit\n"


@pytest.mark.parametrize("what", ["return", "print('x' * 100_000)"])
def test_whose_output_is_not_wanted_any_more_ends_in_silence(tmp_path: Path, what: str) -> None:
    """At the end, or in the middle."""
    with subprocess.Popen(
        ["head", "-c", "0"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as reader:
        reader.wait()
        done = run(tmp_path, what, stdout=reader.stdin)
    assert (done.returncode, done.stderr) == (120, "")


def test_another_pipe_than_the_output_is_no_reader_that_left(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        done = run(tmp_path, "raise BrokenPipeError(32, 'of something else')", stdout=file)
    assert done.returncode == 1
    assert "of something else" in done.stderr


@pytest.mark.parametrize("stage", ["train RUN", "generate TASK", "sweep NAME"])
def test_a_stage_without_its_argument_says_how_it_is_used(tmp_path: Path, stage: str) -> None:
    name = stage.partition(" ")[0]
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{name}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"error: usage: python -m stages.{stage}\n")


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(tmp_path, "return", stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: disk: No space left on device\n")


def test_output_may_be_closed(tmp_path: Path) -> None:
    done = run(tmp_path, "sys.stdout = None; return 3")
    assert (done.returncode, done.stderr) == (3, "")


def test_stages_have_told_atexit_nothing_when_they_begin() -> None:
    stages = [f"stages.{path.stem}" for path in (ROOT / "stages").glob("[a-z]*.py")]
    program = (
        "import atexit, importlib, sys\n"
        "before = atexit._ncallbacks()\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(atexit._ncallbacks() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *stages, "pipelines.cli", "pipelines.quick"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(stages) > 6 and done.stdout == "0\n"


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [("sys.exit(2)", 2, ""), ("raise ValueError('a defect')", 1, "ValueError: a defect\n")],
)
def test_what_is_not_told_ends_as_python_does(
    tmp_path: Path, what: str, code: int, error: str
) -> None:
    done = run(tmp_path, what)
    assert done.returncode == code
    assert done.stderr.endswith(error)
    assert done.stdout == "said, at exit\ntaken down\n"


def run(
    folder: Path, what: str, stdout: int | IO[Any] | None = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """The program whose main does that; its output is buffered, whatever is usual here."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(what=what))
    here = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, program],
        env={**here, "PYTHONPATH": str(ROOT)},
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
