"""How fast data are read and made, on one thread: `python -m benchmarks.data [SUDOKU_FILE ...]`.

Reads Sudoku files (columns question and answer, 9x9) as the task does, with the proof that every
puzzle has one solution and that it is its answer; without files, puzzles that it generates. Then
builds the paper's 13,465 + 192 graphs of 10 vertices with all their colourings, and N-Queens data
sets of growing size, whole: solutions, completions, split, tables. Prints Markdown.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from gram_core.tasks.graph_coloring import GraphColoringConfig, colourings, random_graphs
from gram_core.tasks.nqueens import NQueens, NQueensConfig
from gram_core.tasks.sudoku import Generated, board_id, generate_puzzles, read_puzzles
from gram_core.tasks.sudoku_solver import solve
from pipelines.runtime import entry

MADE = Path(".gram") / "bench_sudoku.csv"


def sudoku_file() -> Path:
    """A file of 2,000 generated puzzles."""
    puzzles, answers = generate_puzzles(Generated(train=1900, test=100), 9)
    rows = {
        name: [board_id(board) for board in boards]
        for name, boards in (("question", puzzles), ("answer", answers))
    }
    MADE.parent.mkdir(exist_ok=True)
    pl.DataFrame(rows).write_csv(MADE)
    return MADE


def graphs(config: GraphColoringConfig) -> int:
    """Pairs of distinct 3-colourable graphs and their canonical colourings."""
    rng = np.random.default_rng(config.seed)
    count = config.train + config.test
    made = random_graphs(count, config.vertices, config.probability, rng)
    return len(colourings(made, config.vertices)[0])


def main(arguments: Sequence[str]) -> None:
    """Time them, after one small call each to compile."""
    solve(np.zeros((1, 81), np.uint8), 9)
    small = GraphColoringConfig(vertices=10, train=10, test=1)
    graphs(small)
    print("| what | count | seconds | a second |\n|---|---|---|---|")
    for path in [Path(name) for name in arguments] or [sudoku_file()]:
        start = time.perf_counter()
        puzzles, _ = read_puzzles(path, str(path), 9, None, 0)
        seconds = time.perf_counter() - start
        rate = len(puzzles) / seconds
        print(f"| puzzles of {path.name} | {len(puzzles):,} | {seconds:.1f} | {rate:,.0f} |")
    start = time.perf_counter()
    pairs = graphs(GraphColoringConfig(vertices=10, train=13_465, test=192))
    seconds = time.perf_counter() - start
    print(f"| colourings of 13,657 graphs | {pairs:,} | {seconds:.2f} | {pairs / seconds:,.0f} |")
    for size, remove in ((8, (5, 6, 7)), (10, (7, 8, 9)), (12, (9, 10, 11))):
        task = NQueens(NQueensConfig(size=size, remove=remove))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            made = task.generate(Path)
            times.append(time.perf_counter() - start)
        seconds = min(times)
        name = f"{size}-queens, {made.metadata['inputs']:,} inputs"
        pairs = made.metadata["pairs"]
        print(f"| {name} | {pairs:,} | {seconds:.2f} | {pairs / seconds:,.0f} |")


if __name__ == "__main__":
    entry(main)
