"""Stage report: `python -m stages.report`."""

from collections.abc import Sequence

from pipelines.runtime import entry, importing, say


def main(arguments: Sequence[str]) -> None:
    """Build report/index.html from every run's results."""
    with importing():
        from pathlib import Path

        from pipelines.params import read_params
        from pipelines.report.build import build

    build(Path(), read_params()["runs"], Path("report"))
    say("report: open report/index.html")


if __name__ == "__main__":
    entry(main)
