"""Stage evaluate@RUN: `python -m stages.evaluate RUN`."""

from collections.abc import Sequence

from pipelines.runtime import entry, say


def main(arguments: Sequence[str]) -> None:
    from pipelines.evaluate import evaluate
    from pipelines.params import load_run

    (name,) = arguments
    run = load_run(name)
    found, widest = evaluate(run), max(run.evaluate.widths)
    say(
        f"evaluate {name}: accuracy {found['accuracy']:.3f}, any of {widest} valid "
        f"{found[f'any_valid@{widest}']:.3f}, by value {found[f'best_of_value@{widest}']:.3f}"
    )


if __name__ == "__main__":
    entry(main)
