"""Graph colouring against networkx's atlas, brute force, and by hand."""

from itertools import product

import networkx as nx
import numpy as np
import pytest
import torch

from gram_core import tables
from gram_core.tasks import base
from gram_core.tasks.base import TaskError
from gram_core.tasks.graph_coloring import (
    GraphColoring,
    GraphColoringConfig,
    adjacency,
    colouring_counts,
    colourings,
    isomorphic_to_any,
    random_graphs,
)


def unused(source: str) -> None:
    raise AssertionError(f"{source} was asked for")


def triangle(graph: nx.Graph) -> np.ndarray:
    n = graph.number_of_nodes()
    matrix = nx.to_numpy_array(graph, nodelist=sorted(graph)).astype(np.uint8)
    return matrix[np.triu_indices(n, 1)]


def brute_force(graph: np.ndarray, n: int) -> set[tuple[int, ...]]:
    """Every map of vertices to three colours that no edge forbids, one of each renaming."""
    edges = [pair for pair, edge in zip(zip(*np.triu_indices(n, 1)), graph) if edge]  # noqa: B905
    found = set()
    for colours in product(range(3), repeat=n):
        if all(colours[i] != colours[j] for i, j in edges):
            names: dict[int, int] = {}
            found.add(tuple(names.setdefault(colour, len(names)) for colour in colours))
    return found


def test_enumeration_equals_brute_force_on_the_atlas() -> None:
    graphs = [g for g in nx.graph_atlas_g() if 3 <= g.number_of_nodes() <= 6]
    assert len(graphs) == 4 + 11 + 34 + 156
    for graph in graphs:
        n = graph.number_of_nodes()
        edges = triangle(graph)
        owner, found = colourings(edges[None], n)
        wanted = brute_force(edges, n)
        assert {tuple(row) for row in found.tolist()} == wanted
        assert len(found) == len(wanted) == colouring_counts(edges[None], n)[0]
        assert (owner == 0).all()


@pytest.mark.parametrize(("n", "count"), [(8, 6), (10, 2)])
def test_enumeration_equals_brute_force_on_random_graphs(n: int, count: int) -> None:
    graphs = random_graphs(count, n, 0.35, np.random.default_rng(n))
    owner, found = colourings(graphs, n)
    for number, graph in enumerate(graphs):
        mine = found[owner == number].tolist()
        assert {tuple(row) for row in mine} == brute_force(graph, n)
        assert mine == sorted(mine)


def test_random_graphs_are_distinct_colourable_and_as_dense_as_asked() -> None:
    graphs = random_graphs(400, 8, 0.45, np.random.default_rng(0))
    assert len(np.unique(graphs, axis=0)) == 400
    assert (colouring_counts(graphs, 8) > 0).all()
    # Colourable graphs are sparser than all graphs; without the condition the mean is 0.45.
    assert 0.35 < graphs.mean() < 0.45


def test_more_graphs_than_there_are_is_one_clear_error() -> None:
    with pytest.raises(TaskError, match="9 different"):
        random_graphs(9, 3, 0.5, np.random.default_rng(0))
    assert len(random_graphs(8, 3, 0.5, np.random.default_rng(0))) == 8


def test_more_colourings_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four vertices without an edge are coloured in 14 ways, with one in 9: set partitions into at
    most three, by hand."""
    graphs = np.array([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], np.uint8)
    monkeypatch.setattr(base, "memory", lambda: 2.0 * (14 + 9) * 6)
    assert len(colourings(graphs, 4)[0]) == 14 + 9
    monkeypatch.setattr(base, "memory", lambda: 2.0 * (14 + 9) * 6 - 1)
    with pytest.raises(TaskError, match=r"^23 pairs need .* fewer graphs"):
        colourings(graphs, 4)


def test_isomorphism_is_that_of_networkx() -> None:
    rng = np.random.default_rng(5)
    some, others = random_graphs(60, 6, 0.4, rng), random_graphs(25, 6, 0.4, rng)

    def graph(edges: np.ndarray) -> nx.Graph:
        return nx.from_numpy_array(adjacency(edges[None], 6)[0])

    wanted = [any(nx.is_isomorphic(graph(a), graph(b)) for b in others) for a in some]
    assert isomorphic_to_any(some, others, 6).tolist() == wanted
    assert 0 < sum(wanted) < 60


@pytest.fixture(scope="module")
def task() -> GraphColoring:
    return GraphColoring(
        GraphColoringConfig(vertices=6, edge_probability=0.45, train=60, test=20, seed=1)
    )


def test_tables_hold_every_colouring_of_every_graph(task: GraphColoring) -> None:
    split = task.generate(unused)
    for part, count in ((split.train, 60), (split.test, 20)):
        ids = part["puzzle_id"].to_pylist()
        assert len(set(ids)) == count
        inputs, target = (tables.tokens_numpy(part[c]) for c in ("inputs", "target"))
        counts = part["solution_count"].to_numpy()
        for name in list(dict.fromkeys(ids))[:10]:
            rows = [i for i, other in enumerate(ids) if other == name]
            graph = inputs[rows[0]] - 1
            assert "".join(map(str, graph)) == name
            found = {tuple((target[i, :6] - 3).tolist()) for i in rows}
            assert found == brute_force(graph, 6)
            assert (counts[rows] == len(rows)).all()
        assert (target[:, 6:] == 0).all()
    shared = set(split.train["puzzle_id"].to_pylist()) & set(split.test["puzzle_id"].to_pylist())
    assert not shared
    assert split.metadata["test_inputs_with_twin_in_train"] > 0
    assert task.generate(unused).train.equals(split.train)


def test_every_target_is_verified_and_no_spoilt_one(task: GraphColoring) -> None:
    test = task.generate(unused).test
    inputs, target = (
        torch.from_numpy(tables.tokens_numpy(test[c]).copy()) for c in ("inputs", "target")
    )
    assert task.verify(inputs, target).all()
    assert (task.conflicts(inputs, target) == 0).all()
    spoilt = target.clone()
    spoilt[:, 0] = 1
    assert not task.verify(inputs, spoilt).any()
    # What lies behind the vertices is no part of the answer.
    behind = target.clone()
    behind[:, 6:] = 4
    assert task.verify(inputs, behind).all()


def test_conflicts_are_counted_edge_by_edge(task: GraphColoring) -> None:
    inputs = torch.from_numpy(task.parse("1-2 2-3 1-3 4-5"))[None]
    answer = torch.zeros_like(inputs)
    answer[0, :6] = torch.tensor([3, 3, 3, 4, 5, 3])
    assert task.conflicts(inputs, answer).tolist() == [3.0]
    answer[0, :6] = torch.tensor([3, 4, 5, 4, 2, 3])  # vertex 5 has no colour
    assert task.conflicts(inputs, answer).tolist() == [1.0]
    assert not task.verify(inputs, answer).any()
    answer[0, 4] = 3
    assert task.verify(inputs, answer).all()
    assert task.measure(inputs, answer)["conflicts"].tolist() == [0.0]


def test_canonical_answers_do_not_depend_on_the_names_of_the_colours(task: GraphColoring) -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 6, (200, task.length)).astype(np.uint8)
    names = np.array([0, 1, 2, 5, 3, 4], np.uint8)
    canonical = task.canonical(answers)
    assert (task.canonical(names[answers]) == canonical).all()
    assert (task.canonical(canonical) == canonical).all()
    assert (canonical[:, 6:] == 0).all()
    for raw, made in zip(answers[:, :6].tolist(), canonical[:, :6].tolist(), strict=True):
        seen: dict[int, int] = {}
        assert made == [t if t < 3 else seen.setdefault(t, 3 + len(seen)) for t in raw]


def test_parse_and_render(task: GraphColoring) -> None:
    assert task.render(task.parse("2-1, 3-6 1-2")) == "1-2 3-6"
    answer = np.zeros(task.length, np.uint8)
    answer[:6] = [3, 4, 5, 3, 1, 4]
    assert task.render(answer) == "RBGR?B"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1_2", "is no edge"),
        ("1-7", "vertices 1-6"),
        ("2-2", "vertices 1-6"),
        ("0-1", "1-6"),
        ("1-" + "2" * 5000, "is no edge"),
    ],
)
def test_malformed_graphs(task: GraphColoring, text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task.parse(text)


def test_sizes_without_a_known_probability_need_one() -> None:
    with pytest.raises(ValueError, match="edge_probability"):
        GraphColoringConfig(vertices=9)
    assert GraphColoringConfig(vertices=10).probability == 0.33
    assert GraphColoringConfig(vertices=9, edge_probability=0.2).probability == 0.2
