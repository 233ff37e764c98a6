"""Graph colouring (paper, 4.2 and C.2.2): colour a random graph's vertices so that no edge joins
two of one colour.

Graphs are Erdos-Renyi, kept where three colours do; every proper colouring of every graph is
enumerated, up to the names of the colours: a colouring is canonical when colours appear in order.
Tokens: 0 padding, 1 no edge, 2 edge, 3 to 5 colours. The input is the strict upper triangle of the
adjacency matrix, the answer the first n positions (gap G5; the rest is padding).

Shapes: N graphs, n vertices, S = n (n - 1) / 2 pairs of vertices, row-major.
"""

import re
from typing import Annotated

import msgspec
import numba
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from gram_core.config import Config, PositiveInt, Seed
from gram_core.tables import dataset_schema, tokens_array
from gram_core.tasks.base import Fetch, Split, Task, TaskError, check_rows

NO_EDGE, EDGE, FIRST_COLOUR = 1, 2, 3
COLOURS = 3
NAMES = "RBG"  # the paper's red, blue, green
# The paper does not say; these fit its coverage (the share of a graph's colourings that 20 ideal
# samples find).
EDGE_PROBABILITY = {8: 0.45, 10: 0.33}
DRAWS = 1000  # graphs drawn for each one asked for, before giving up


class GraphColoringConfig(
    Config, frozen=True, kw_only=True, tag="graph_coloring", tag_field="kind"
):
    """Number of vertices, probability of an edge, and numbers of distinct graphs."""

    # Beyond 12 vertices sparse graphs have tens of thousands of colourings each.
    vertices: Annotated[int, msgspec.Meta(ge=3, le=12)] = 8
    edge_probability: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    train: PositiveInt = 7002
    test: PositiveInt = 255
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.edge_probability is None and self.vertices not in EDGE_PROBABILITY:
            raise ValueError(
                f"edge_probability: there is no default for {self.vertices} vertices "
                f"(only for {', '.join(map(str, EDGE_PROBABILITY))}); give one, say 0.4"
            )

    @property
    def probability(self) -> float:
        """The probability of an edge."""
        return self.edge_probability or EDGE_PROBABILITY[self.vertices]


def random_graphs(count: int, n: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Distinct 3-colourable graphs as their upper triangles, uint8 [count, S]. Raises `TaskError`
    where too few turn up."""
    pairs = n * (n - 1) // 2
    found = np.empty((0, pairs), dtype=np.uint8)
    drawn = 0
    while len(found) < count:
        if drawn > DRAWS * count:
            raise TaskError(
                f"{count} different 3-colourable graphs of {n} vertices asked for, {drawn} draws "
                f"with edge probability {p} gave {len(found)}; ask for fewer or change it"
            )
        graphs = (rng.random((2 * count, pairs)) < p).astype(np.uint8)
        drawn += len(graphs)
        found = np.concatenate([found, graphs[colouring_counts(graphs, n, 1) > 0]])
        _, first = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(first)]
    return found[:count]


def colouring_counts(graphs: np.ndarray, n: int, limit: int = 1 << 30) -> np.ndarray:
    """Canonical proper colourings of each graph, at most about `limit`, int64 [N]."""
    counts: np.ndarray = _colour_all(graphs, n, limit, np.empty((0, n), dtype=np.uint8))
    return counts


def colourings(graphs: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """All canonical proper colourings: each one's graph, int64 [M], and colours 0 to 2,
    uint8 [M, n], graph by graph in lexicographic order. Raises `TaskError` where they are more than
    this machine's memory."""
    counts = colouring_counts(graphs, n)
    larger = "ask for fewer graphs, or a larger edge_probability"
    check_rows(int(counts.sum()), n * (n - 1) // 2, larger)
    out = np.empty((int(counts.sum()), n), dtype=np.uint8)
    _colour_all(graphs, n, 1 << 30, out)
    return np.arange(len(graphs)).repeat(counts), out


@numba.njit(cache=True)
def _colour_all(graphs, n, limit, out):  # type: ignore[no-untyped-def]
    """Depth-first over vertices; a vertex may take a colour in use or the next unused one. Writes
    the colourings to `out` where it has rows; returns their number for each graph."""
    counts = np.zeros(len(graphs), dtype=np.int64)
    colour = np.zeros(n, dtype=np.int64)
    neighbours = np.zeros(n, dtype=np.int64)  # earlier ones, as bits
    taken = np.zeros((n + 1, 3), dtype=np.int64)  # vertices of each colour, as bits
    used = np.zeros(n + 1, dtype=np.int64)
    written = 0
    for g in range(len(graphs)):
        neighbours[:] = 0
        place = 0
        for i in range(n):
            for j in range(i + 1, n):
                if graphs[g, place]:
                    neighbours[j] |= 1 << i
                place += 1
        vertex = 0
        colour[0] = -1
        taken[0] = 0
        while vertex >= 0:
            colour[vertex] += 1
            c = colour[vertex]
            if c >= 3 or c > used[vertex]:
                vertex -= 1
                continue
            if taken[vertex, c] & neighbours[vertex]:
                continue
            if vertex == n - 1:
                if len(out):
                    for i in range(n):
                        out[written, i] = colour[i]
                    written += 1
                counts[g] += 1
                if counts[g] >= limit:
                    break
                continue
            taken[vertex + 1] = taken[vertex]
            taken[vertex + 1, c] |= 1 << vertex
            used[vertex + 1] = max(used[vertex], c + 1)
            vertex += 1
            colour[vertex] = -1
    return counts


def adjacency(graphs: np.ndarray, n: int) -> np.ndarray:
    """Upper triangles [N, S] as symmetric matrices uint8 [N, n, n]."""
    matrix = np.zeros((len(graphs), n, n), dtype=np.uint8)
    row, column = np.triu_indices(n, 1)
    matrix[:, row, column] = matrix[:, column, row] = graphs
    return matrix


def isomorphic_to_any(graphs: np.ndarray, others: np.ndarray, n: int) -> np.ndarray:
    """Which graphs are isomorphic to one of `others`, bool [N]. Candidates share the sorted
    numbers of walks of lengths 2 to n + 1 from each vertex; networkx decides among them."""
    import networkx as nx  # half a second, which only whoever makes the tables shall wait for

    def walks(triangles: np.ndarray) -> list[bytes]:
        matrix = adjacency(triangles, n).astype(np.int64)
        counts = [matrix.sum(-1)]
        for _ in range(n):
            counts.append(np.einsum("gij,gj->gi", matrix, counts[-1]))
        vertices = np.stack(counts, axis=-1)
        order = np.lexsort(tuple(vertices[..., k] for k in range(n, -1, -1)), axis=-1)
        ranked = np.take_along_axis(vertices, order[..., None], axis=1)
        return [g.tobytes() for g in ranked]

    candidates: dict[bytes, list[int]] = {}
    for number, key in enumerate(walks(others)):
        candidates.setdefault(key, []).append(number)

    def graph(triangle: np.ndarray) -> nx.Graph:
        return nx.from_numpy_array(adjacency(triangle[None], n)[0])

    found = [
        any(nx.is_isomorphic(graph(triangle), graph(others[k])) for k in candidates.get(key, ()))
        for triangle, key in zip(graphs, walks(graphs), strict=True)
    ]
    return np.array(found, dtype=bool)


def graph_id(graph: np.ndarray) -> str:
    """The graph's name: its upper triangle as 0 and 1."""
    return "".join("01"[edge] for edge in graph)


class GraphColoring(Task):
    """The graph colouring task."""

    vocab = FIRST_COLOUR + COLOURS

    def __init__(self, config: GraphColoringConfig) -> None:
        self.config: GraphColoringConfig = config
        self.n = config.vertices
        self.length = self.n * (self.n - 1) // 2
        first, second = np.triu_indices(self.n, 1)
        self._first, self._second = torch.from_numpy(first), torch.from_numpy(second)

    def generate(self, fetch: Fetch) -> Split:
        """Distinct random graphs with all their colourings. Raises `TaskError`."""
        config = self.config
        rng = np.random.default_rng(config.seed)
        graphs = random_graphs(config.train + config.test, self.n, config.probability, rng)
        train, test = graphs[: config.train], graphs[config.train :]
        tables = [self._table(part) for part in (train, test)]
        counts = colouring_counts(test, self.n)
        metadata = {
            "train_inputs": len(train),
            "train_pairs": len(tables[0]),
            "test_inputs": len(test),
            "test_pairs": len(tables[1]),
            "test_single_solution_inputs": int((counts == 1).sum()),
            "max_solutions": int(max(counts.max(), colouring_counts(train, self.n).max())),
            "test_inputs_with_twin_in_train": int(isomorphic_to_any(test, train, self.n).sum()),
        }
        return Split(tables[0], tables[1], metadata)

    def _table(self, graphs: np.ndarray) -> pa.Table:
        graph, colours = colourings(graphs, self.n)
        ids = np.array([graph_id(g) for g in graphs])[graph]
        target = np.zeros((len(graph), self.length), dtype=np.uint8)
        target[:, : self.n] = colours + FIRST_COLOUR
        counts = np.bincount(graph, minlength=len(graphs))[graph]
        column = pa.array(ids)
        return pa.table(
            {
                "puzzle_id": column,
                "inputs": tokens_array((graphs + NO_EDGE)[graph]),
                "target": tokens_array(target),
                "solution_count": pa.array(counts, pa.uint32()),
                "group_id": column,
                "augmentation": pa.array(np.full(len(graph), "")),
            },
            schema=dataset_schema(self.length, self.length),
        )

    def conflicts(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Float[Tensor, " B"]:
        """Edges whose ends do not have two different colours."""
        colours = answers[:, : self.n]
        first = colours[:, self._first.to(answers.device)]
        second = colours[:, self._second.to(answers.device)]
        apart = (first != second) & (first >= FIRST_COLOUR) & (second >= FIRST_COLOUR)
        return ((inputs == EDGE) & ~apart).sum(-1).float()

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """Every vertex coloured, no edge between two of one colour."""
        coloured = (answers[:, : self.n] >= FIRST_COLOUR).all(-1)
        return coloured & (self.conflicts(inputs, answers) == 0)

    def measure(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> dict[str, Float[Tensor, " B"]]:
        """`conflicts`: see there."""
        return {"conflicts": self.conflicts(inputs, answers)}

    def canonical(self, answers: np.ndarray) -> np.ndarray:
        """Colours renamed in order of appearance, padding behind the n vertices."""
        colours = answers[:, : self.n]
        out = np.zeros_like(answers)
        names = np.zeros((len(answers), self.vocab), dtype=np.uint8)
        names[:, :FIRST_COLOUR] = np.arange(FIRST_COLOUR)
        following = np.full(len(answers), FIRST_COLOUR, dtype=np.uint8)
        rows = np.arange(len(answers))
        for vertex in range(self.n):
            token = colours[:, vertex]
            fresh = names[rows, token] == 0
            fresh &= token >= FIRST_COLOUR
            names[rows[fresh], token[fresh]] = following[fresh]
            following[fresh] += 1
            out[:, vertex] = names[rows, token]
        return out

    def parse(self, text: str) -> np.ndarray:
        """Edges such as `1-2 1-3 2-4` (vertices from 1; blanks or commas between), uint8 [S]."""
        graph = np.full((self.n, self.n), NO_EDGE, dtype=np.uint8)
        for edge in text.replace(",", " ").split():
            match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", edge)
            if match is None:
                raise TaskError(f"{edge!r} is no edge; write edges as 1-2 1-3, vertices from 1")
            ends = sorted(int(end) for end in match.groups())
            if not 1 <= ends[0] < ends[1] <= self.n:
                raise TaskError(f"edge {edge}: the ends must be two of the vertices 1-{self.n}")
            graph[ends[0] - 1, ends[1] - 1] = EDGE
        return graph[np.triu_indices(self.n, 1)]

    def render(self, tokens: np.ndarray) -> str:
        """A graph as its edges, an answer as one letter a vertex (`?` where there is no colour)."""
        tokens = np.asarray(tokens)
        if (tokens[: self.n] >= FIRST_COLOUR).any():
            signs = "???" + NAMES
            return "".join(signs[token] for token in tokens[: self.n])
        edges = zip(self._first.tolist(), self._second.tolist(), tokens, strict=True)
        return " ".join(f"{i + 1}-{j + 1}" for i, j, token in edges if token == EDGE)
