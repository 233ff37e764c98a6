"""Stage sample@RUN: `python -m stages.sample RUN`."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, only, say


def main(arguments: Sequence[str]) -> None:
    """Sample the run's test puzzles."""
    with importing():
        from pipelines.params import load_run
        from pipelines.sample import sample_run

    name = only(arguments, "stages.sample RUN")
    say(f"sample {name}: {sample_run(load_run(name))} rows")


if __name__ == "__main__":
    entry(main)
