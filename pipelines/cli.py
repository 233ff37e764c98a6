"""The `gram` command: solve a puzzle, sample, sweep, reproduce, look at a run."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runtime import entry, fail, importing, say, threads

if TYPE_CHECKING:
    from gram_core.sample.trajectory import SampleConfig

EXAMPLES = """examples:
  gram solve nqueens8_gram \\
    "Q.......|........|........|........|........|........|........|....Q..."
  gram solve nqueens8_gram board.txt --width 50 --depth 8
  gram solve sudoku4_gram "1...|..3.|.4..|...2"
  gram solve coloring6_gram "1-2 1-3 2-3 3-4 4-5"
  gram solve boards4_gram blank
  gram info nqueens8_gram
  gram sample nqueens8_gram
  gram sweep nqueens8
  gram reproduce HEAD

in Python:
  from gram_core.solve import Solver
  solver = Solver.load("models/nqueens8_gram")
  answers = solver.solve("Q.......|........|...", width=20)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="gram",
        description="Generative recursive reasoning: trained runs at work.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    solve = commands.add_parser(
        "solve",
        help="answer a puzzle with candidates, verified ones first",
        description="Answer a puzzle. Exit code 0 where an answer is verified, 1 where none is, "
        "2 where the puzzle cannot be read.",
    )
    solve.add_argument("run", metavar="RUN", help="a run's name, or the folder of its model")
    solve.add_argument(
        "puzzle", help="in the notation of the run's task (docs/tasks.md), or a file that holds it"
    )
    solve.add_argument("--width", type=_positive, default=20, help="trajectories (20)")
    solve.add_argument(
        "--depth", type=_positive, help="supervision steps allowed (the run's sample.depth)"
    )
    solve.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    solve.add_argument(
        "--all", action="store_true", help="print the unverified answers too, if one is verified"
    )
    sample = commands.add_parser("sample", help="sample a run's test puzzles (the DVC stage)")
    sample.add_argument("run", metavar="RUN")
    submission = commands.add_parser(
        "submission",
        help="an ARC run's answers in the form of the ARC Prize",
        description="Write the two best-voted answers to every test input of an ARC run, from its "
        "trajectories.",
    )
    submission.add_argument("run", metavar="RUN")
    submission.add_argument("file", nargs="?", default="submission.json", help="(submission.json)")
    sweep = commands.add_parser(
        "sweep",
        help="search settings of a run with Ray Tune (the DVC stage)",
        description="Run the sweep NAME of params.yaml into results/sweeps/NAME/trials.parquet.",
    )
    sweep.add_argument("name", metavar="NAME")
    what = sweep.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="go on with a sweep that was killed")
    what.add_argument(
        "--promote",
        action="store_true",
        help="run nothing; print the best trial as a patch of params.yaml",
    )
    reproduce = commands.add_parser(
        "reproduce",
        help="rebuild a revision in a clean worktree and compare metrics",
        description="In a clean worktree of REV pull what the remote has, rerun what it has not, "
        "and compare metrics with the recorded ones. Exit code 0 where all agree within their "
        "intervals, 1 where some differ.",
    )
    reproduce.add_argument("revision", metavar="REV", help="a commit, tag or branch")
    reproduce.add_argument(
        "--run", action="append", metavar="RUN", help="only this run (may be repeated)"
    )
    reproduce.add_argument(
        "--force", action="store_true", help="rerun everything, whatever could be pulled"
    )
    info = commands.add_parser("info", help="a run's model, training and results")
    info.add_argument("run", metavar="RUN")
    return top


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    chosen = parser().parse_args(arguments)
    if chosen.command == "solve":
        return _solve(chosen)
    if chosen.command == "sample":
        with importing():
            from pipelines.params import load_run
            from pipelines.sample import sample_run

        say(f"sample {chosen.run}: {sample_run(load_run(chosen.run))} rows")
        return 0
    if chosen.command == "submission":
        from pipelines.params import load_run
        from pipelines.submission import write_submission

        tasks = write_submission(load_run(chosen.run), Path(chosen.file))
        say(f"{chosen.file}: two attempts for every input of {tasks} tasks")
        return 0
    if chosen.command == "sweep":
        return _sweep(chosen)
    if chosen.command == "reproduce":
        from pipelines.reproduce import reproduce

        return reproduce(chosen.revision, chosen.run or [], force=chosen.force)
    return _info(chosen.run)


def _sweep(chosen: argparse.Namespace) -> int:
    if chosen.promote:
        from pipelines.promote import promotion

        print(promotion(chosen.name), end="")
        return 0
    from pipelines.sweep import sweep

    say(f"sweep {chosen.name}: {sweep(chosen.name, resume=chosen.resume)} reports")
    return 0


def _model_folder(run: str) -> Path:
    """models/RUN, or the folder itself where a path is given."""
    from pipelines.params import MODELS

    path = Path(run)
    return path if (path / "config.json").is_file() else MODELS / run


def _sampling(run: str) -> "SampleConfig | None":
    """How params.yaml says to sample the run, whose folder in models/ will do as well; None where
    it does not know the run."""
    from gram_core.config import ConfigError
    from gram_core.sample.trajectory import SampleConfig
    from pipelines.params import FILE, MODELS, load_run, read_params

    if Path(run).absolute().parent == MODELS.absolute():
        run = Path(run).name
    if not FILE.is_file() or run not in read_params()["runs"]:
        return None
    try:
        return load_run(run).section("sample", SampleConfig)
    except ConfigError as error:
        say(f"sampling with the defaults, because of {error}")
        return None


def _solve(chosen: argparse.Namespace) -> int:
    with importing():
        from gram_core.solve import Solver
        from gram_core.tasks.base import TaskError
        from pipelines.compute import compute_with

    compute_with(threads())
    solver = Solver.load(_model_folder(chosen.run), _sampling(chosen.run))
    text = chosen.puzzle
    with suppress(OSError):  # a long puzzle is no name of a file
        if "|" not in text and Path(text).is_file():
            text = Path(text).read_text(errors="replace")
    depth = {"depth": chosen.depth} if chosen.depth else {}
    try:
        answers = solver.solve(text, chosen.width, seed=chosen.seed, **depth)
    except TaskError as error:
        return fail(f"puzzle: {error}", code=2)
    verified = [answer for answer in answers if answer.verified]
    drawn = sum(answer.count for answer in answers)  # fewer where the first valid one is the last
    for answer in answers if chosen.all or not verified else verified:
        mark = "verified" if answer.verified else "not verified"
        print(f"{mark}, {answer.count} of {drawn} trajectories, value {answer.value:.2f}")
        print(answer.text, end="\n\n")
    if not verified:
        say(f"none of {len(answers)} distinct answers was verified")
        return 1
    say(f"{len(verified)} verified of {len(answers)} distinct answers")
    return 0


def _info(run: str) -> int:
    import json

    from gram_core.model.store import load_model

    folder = _model_folder(run)
    model, about = load_model(folder)
    made = about.get("provenance", {})
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters:,} parameters, task {about.get('task')}")
    for part in ("model", "objective", "train"):
        print(f"{part}: {json.dumps(about.get(part), sort_keys=True)}")
    print(f"made at revision {made.get('revision')} on {made.get('device')}")
    for path in (folder / "metrics.json", Path("results") / folder.name / "metrics.json"):
        if path.is_file():
            print(f"{path}:")
            try:
                for name, value in json.loads(path.read_bytes()).items():
                    if not name.endswith(("_low", "_high")):
                        print(f"  {name:32} {value:.4g}")
            except (AttributeError, TypeError, ValueError):
                return fail(f"{path}: not a mapping of numbers; make it again (dvc repro)")
    return 0


def program() -> None:
    """The console script."""
    # As with `python -m`, where stages find the module that a table task's `verifier` names.
    sys.path.append(str(Path.cwd()))
    entry(main)


if __name__ == "__main__":
    program()
