"""How a program begins and ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    ],
)  # fmt: skip
def test_a_program_ends_before_python_is_taken_down(
    tmp_path: Path, what: str, code: int, error: str
) -> None:
    done = run(tmp_path, what)
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == "said, at exit\n"


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


def run(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    """The program whose main does that."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(what=what))
    return subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
