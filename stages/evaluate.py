"""Stage evaluate@RUN: `python -m stages.evaluate RUN`."""

from collections.abc import Sequence

from pipelines.runtime import entry, say


def main(arguments: Sequence[str]) -> None:
    """Turn the run's trajectories into metrics."""
    from pipelines.evaluate import evaluate
    from pipelines.params import load_run

    (name,) = arguments
    found = evaluate(load_run(name))
    say(f"evaluate {name}: accuracy of one trajectory {found['accuracy']:.3f}")


if __name__ == "__main__":
    entry(main)
