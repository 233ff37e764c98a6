"""Stage train@RUN: `python -m stages.train RUN`."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, only, say


def main(arguments: Sequence[str]) -> None:
    """Train the run."""
    with importing():
        from pipelines.params import load_run
        from pipelines.train import train_run

    name = only(arguments, "stages.train RUN")
    found = train_run(load_run(name))
    say(f"train {name}: {found['steps']} steps in {found['train_seconds']:.0f} s")


if __name__ == "__main__":
    entry(main)
