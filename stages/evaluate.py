"""Stage evaluate@RUN: `python -m stages.evaluate RUN`."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, only, say


def main(arguments: Sequence[str]) -> None:
    """Turn the run's trajectories into metrics."""
    with importing():
        from pipelines.evaluate import evaluate
        from pipelines.params import load_run

    name = only(arguments, "stages.evaluate RUN")
    found = evaluate(load_run(name))
    first = next(iter(found))
    say(f"evaluate {name}: {first} {found[first]:.3f}, {len(found)} numbers in all")


if __name__ == "__main__":
    entry(main)
