"""Stage generate@TASK: `python -m stages.generate TASK`."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, only, say


def main(arguments: Sequence[str]) -> None:
    """Write the task's raw tables."""
    with importing():
        from pipelines.dataset import generate
        from pipelines.params import load_task

    name = only(arguments, "stages.generate TASK")
    counts = generate(name, load_task(name))
    say(f"generate {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    entry(main)
