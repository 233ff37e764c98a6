"""Stage sweep@NAME, frozen: `python -m stages.sweep NAME`; goes on with one that was killed."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, only, say


def main(arguments: Sequence[str]) -> None:
    """Run the sweep."""
    with importing():
        from pipelines.sweep import sweep

    name = only(arguments, "stages.sweep NAME")
    say(f"sweep {name}: {sweep(name, resume=True)} reports")


if __name__ == "__main__":
    entry(main)
