"""Stage augment@TASK: `python -m stages.augment TASK`."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, only, say


def main(arguments: Sequence[str]) -> None:
    """Write the tables that training and sampling read."""
    with importing():
        from pipelines.dataset import augment
        from pipelines.params import load_task

    name = only(arguments, "stages.augment TASK")
    counts = augment(name, load_task(name))
    done = ", ".join(f"{key} {value}" for key, value in counts.items())
    say(f"augment {name}: {done or 'tables as generated'}")


if __name__ == "__main__":
    entry(main)
