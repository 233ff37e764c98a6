"""The parts of the report by themselves: choice of puzzles, boards, paper's rows, small words."""

from types import SimpleNamespace

import numpy as np
import polars as pl

from gram_core.tasks.nqueens import QUEEN
from pipelines.report import boards, figures, paper, summary
from pipelines.report.gallery import choose
from pipelines.report.results import Cell, duration, likelihood_rows, widths


def puzzles(counts: list[int]) -> pl.DataFrame:
    names = [f"p{number:03}" for number in range(len(counts))]
    return pl.DataFrame({"puzzle_id": names, "solution_count": counts})


def chosen_counts(counts: list[int], wanted: int) -> list[int]:
    table = puzzles(counts)
    picked = choose(table, wanted)
    assert len(set(picked)) == len(picked)
    lookup = dict(table.iter_rows())
    return [lookup[name] for name in picked]


def test_choice_spreads_over_solution_counts() -> None:
    counts = [1] * 50 + [2] * 40 + [3] * 20 + [4] * 9 + [5, 6, 7, 8, 9, 18]
    assert chosen_counts(counts, 6) == [2, 4, 5, 7, 8, 18]
    assert chosen_counts([1, 1, 2, 2, 2, 4, 4], 4) == [2, 2, 4, 4]


def test_choice_with_few_puzzles() -> None:
    assert chosen_counts([1, 1, 3], 6) == [3]
    assert chosen_counts([1, 1], 6) == [1, 1], "without several solutions, any"
    assert chosen_counts([2, 2, 2, 2, 5], 4) == [2, 2, 2, 5]


def test_choice_does_not_depend_on_the_rows_order() -> None:
    table = puzzles([2, 3] * 20)
    assert choose(table, 6) == choose(table.reverse(), 6)


def test_attacking_pairs_are_neighbours_on_a_line() -> None:
    assert boards.attacking_pairs([(0, 0), (1, 2), (2, 4)]) == []
    assert boards.attacking_pairs([(0, 0), (0, 2), (0, 4)]) == [((0, 0), (0, 2)), ((0, 2), (0, 4))]
    assert boards.attacking_pairs([(3, 0), (0, 3)]) == [((0, 3), (3, 0))]


def test_board_marks_attacks_and_dropped_givens() -> None:
    given = np.ones(16, dtype=np.uint8)
    given[1] = QUEEN
    answer = np.ones(16, dtype=np.uint8)
    answer[[0, 5]] = QUEEN
    svg = boards.nqueens(given, answer, 'a "label"')
    assert svg.count('class="placed attacked"') == 2
    assert svg.count('class="dropped"') == 1 and svg.count('class="attack"') == 1
    assert "a &#34;label&#34;" in svg
    assert boards.nqueens(given, None, "input").count('class="given"') == 1


def draw(kind: str, inputs: list[int], answer: list[int] | None) -> str:
    tokens = [None if t is None else np.array(t, dtype=np.uint8) for t in (inputs, answer)]
    assert tokens[0] is not None
    return str(boards.RENDERERS[kind](tokens[0], tokens[1], 'a "label"'))


def test_sudoku_boards_mark_givens_and_doubles() -> None:
    # Givens 1 and 2; the answer has 1 twice in the first row and twice in the first column.
    inputs = [2, 1, 1, 1, 1, 3, *[1] * 10]
    answer = [2, 3, 2, 4, 1, 3, 4, 5, 2, 4, 5, 3, 4, 5, 3, 1]
    svg = draw("sudoku", inputs, answer)
    assert svg.count("sq-given") == 2
    assert svg.count('class="digit') == 14, "blanks are empty"
    assert svg.count("attacked") > 2
    assert "a &#34;label&#34;" in svg
    assert draw("sudoku", inputs, None).count('class="digit given"') == 2
    full = [2, 3, 4, 5, 4, 5, 2, 3, 3, 2, 5, 4, 5, 4, 3, 2]
    assert "attacked" not in draw("sudoku_boards", [1] * 16, full)


def test_graphs_mark_edges_of_one_colour() -> None:
    # A triangle and a fourth vertex on the third: edges 12, 13, 23, 34.
    edges = [2, 2, 1, 2, 1, 2]
    svg = draw("graph_coloring", edges, [3, 4, 5, 5, 0, 0])
    assert svg.count('class="edge"') == 3 and svg.count('class="clash"') == 1
    assert [svg.count(f"colour-{k}") for k in range(4)] == [0, 1, 1, 2]
    plain = draw("graph_coloring", edges, None)
    assert plain.count('class="edge"') == 4 and plain.count("colour-0") == 4


def test_images_and_arc_grids_are_their_cells() -> None:
    svg = draw("digits", [1] * 4, [1, 2, 2, 1])
    assert 'class="pixel-on" d="M1 0h1v1h-1zM0 1h1v1h-1z"' in svg
    canvas = [0] * 900
    canvas[0], canvas[1], canvas[30], canvas[31] = 2, 5, 1, 1
    svg = draw("arc", canvas, None)
    assert 'viewBox="0 0 2 1"' in svg
    assert 'class="arc-0" d="M0 0h1v1h-1z"' in svg and 'class="arc-3" d="M1 0' in svg
    assert "attack" in draw("arc", canvas, [0] * 900), "an answer that is no grid"


def test_unknown_tasks_are_drawn_as_text() -> None:
    tokens = np.array([1, 2, 1], dtype=np.uint8)
    drawn = boards.renderer({})(tokens, None, "x")
    assert drawn == '<pre class="board" role="img" aria-label="x">1 2 1</pre>'


def test_tasks_without_a_drawing_use_their_own_text() -> None:
    own = boards.RENDERERS.pop("nqueens")
    try:
        board = np.ones(16, dtype=np.uint8)
        text = boards.renderer({"kind": "nqueens", "size": 4, "remove": [1]})(board, board, "x")
    finally:
        boards.RENDERERS["nqueens"] = own
    assert "....\n....\n....\n...." in text


def test_bounds_without_an_interval_stand_alone() -> None:
    """Of a task with one input, over which there is no interval."""
    whole = SimpleNamespace(
        metrics={"bound": -3.14159, "bound_low": -4.0, "bound_high": -2.0}, metric=None
    )
    alone = SimpleNamespace(metrics={"bound": -3.14159}, metric=None)
    for run in (whole, alone):
        run.metric = run.metrics.__getitem__
    (row,) = likelihood_rows([whole, alone, SimpleNamespace(metrics={})])
    assert row.cells[:2] == ["-3.14 (-4.00 – -2.00)", "-3.14"]


def test_runs_of_other_widths_are_said_to_be() -> None:
    wide, narrow = SimpleNamespace(name="a", width=20), SimpleNamespace(name="b", width=4)
    assert widths([wide, wide]) == "20"
    assert widths([wide, narrow]) == "20 (a), 4 (b)"


def test_a_caption_has_each_runs_own_span() -> None:
    def gain(b_width: int) -> str:
        points = [("a", 20, 0.9), ("a", 1, 0.25), ("b", 1, 0.5), ("b", b_width, 0.75)]
        frame = pl.DataFrame(points, schema=["run", "width", "value"], orient="row")
        frame = frame.with_columns(metric=pl.lit("any_valid"))
        caption = figures.width(frame, []).caption
        return caption[: caption.index(" Bands")]

    valid = "the best of them by verifier is valid for a 25% → 90%"
    assert gain(20) == f"From 1 to 20 trajectories, {valid}; b 50% → 75%."
    assert gain(4) == f"With trajectories, {valid} from 1 to 20; b 50% → 75% from 1 to 4."


def test_a_samplers_line_is_one_of_n() -> None:
    """Runs of other widths have other ideals, and no line of theirs together."""

    def lines(*widths: int) -> list[float]:
        rows = [
            (run, width, depth, metric, value * width)
            for run, width in zip("ab", widths, strict=True)
            for depth in (2, 4)
            for metric, value in (("any_valid", 0.01), ("any_valid_ideal", 0.02))
        ]
        frame = pl.DataFrame(rows, ["run", "width", "depth", "metric", "value"], orient="row")
        return figures._reference_lines(frame, "depth", "any_valid")["value"].to_list()

    assert lines(4, 4) == [0.08, 0.08]
    assert lines(4, 8) == []


def test_a_solver_has_no_coverage_where_there_is_none() -> None:
    found = {"any_valid@4": 0.5, "coverage_deterministic@4": 0.25}
    names = ("accuracy", "coverage", "coverage_multi")
    assert [summary._solver(found, name, 4) for name in names] == ["100.0", "25.0", "–"]
    assert summary.row({"any_valid@4": 0.5, "pass@2": 0.125}).also == "pass@2 12.5"


def test_paper_rows() -> None:
    rows = {row.method: row for row in paper.published("nqueens", 8)}
    assert rows["GRAM"].accuracy == (99.7, 0.3) and rows["GRAM"].coverage == (90.3, 1.9)
    assert paper.published("nqueens", 6) == () == paper.published("", None)


def test_words() -> None:
    assert Cell(0.1234, 0.1, 0.2).text == "12.3" and Cell(0.1, 0.1, 0.2).interval == "10.0 – 20.0"
    assert Cell().text == "–" and Cell(1.0).interval == ""
    assert [duration(s) for s in (59, 600, 9000, None)] == ["59 s", "10.0 min", "2.5 h", "–"]
