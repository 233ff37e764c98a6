"""The paper's published numbers (arXiv 2605.19376, Table 1), as it prints them.

Mean and standard deviation in per cent. How the paper averages either column is not stated, so
these stand beside ours, never in one column with them. Knows nothing of runs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One method on one task: accuracy and coverage, each with its standard deviation."""

    method: str
    parameters: str
    accuracy: tuple[float, float]
    coverage: tuple[float, float]


# By the task's kind and size.
TABLE: dict[tuple[str, int], tuple[Published, ...]] = {
    ("nqueens", 8): (
        Published("Direct, 8 layers", "27M", (40.4, 1.1), (13.7, 1.1)),
        Published("Direct, 32 layers", "100M", (40.2, 1.3), (13.6, 1.1)),
        Published("Looped TF", "7M", (68.4, 3.7), (23.6, 1.9)),
        Published("HRM", "27M", (78.7, 2.9), (26.7, 1.3)),
        Published("TRM", "7M", (66.8, 5.7), (36.1, 22.5)),
        Published("AR", "10.6M", (96.3, 1.0), (84.8, 0.8)),
        Published("MDLM", "12.6M", (96.1, 1.5), (87.2, 0.6)),
        Published("GRAM", "10M", (99.7, 0.3), (90.3, 1.9)),
    ),
    ("nqueens", 10): (
        Published("Direct, 8 layers", "27M", (13.6, 0.5), (1.6, 0.2)),
        Published("Direct, 32 layers", "100M", (13.1, 0.4), (1.6, 0.2)),
        Published("Looped TF", "7M", (50.0, 7.6), (6.2, 3.2)),
        Published("HRM", "27M", (37.4, 0.3), (4.7, 0.1)),
        Published("TRM", "7M", (17.5, 11.2), (2.0, 1.3)),
        Published("AR", "10.6M", (90.0, 2.2), (53.2, 0.8)),
        Published("MDLM", "12.6M", (74.3, 6.6), (47.4, 2.2)),
        Published("GRAM", "10M", (89.7, 2.7), (57.5, 3.4)),
    ),
}


def published(kind: str, size: object) -> tuple[Published, ...]:
    """The paper's rows for a task; none where it has no such task."""
    return TABLE.get((kind, size), ()) if isinstance(size, int) else ()
