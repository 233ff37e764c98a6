"""The tasks by the `kind` that params.yaml names them with."""

from collections.abc import Callable, Mapping
from typing import Any

from gram_core.config import Config, ConfigError, load
from gram_core.tasks.arc import Arc, ArcConfig
from gram_core.tasks.base import Task
from gram_core.tasks.digits import Digits, DigitsConfig
from gram_core.tasks.graph_coloring import GraphColoring, GraphColoringConfig
from gram_core.tasks.nqueens import NQueens, NQueensConfig
from gram_core.tasks.sudoku import Sudoku, SudokuConfig
from gram_core.tasks.sudoku_boards import SudokuBoards, SudokuBoardsConfig
from gram_core.tasks.table import Table, TableConfig

TASKS: dict[str, tuple[type[Config], Callable[[Any], Task]]] = {
    "nqueens": (NQueensConfig, NQueens),
    "sudoku": (SudokuConfig, Sudoku),
    "sudoku_boards": (SudokuBoardsConfig, SudokuBoards),
    "graph_coloring": (GraphColoringConfig, GraphColoring),
    "arc": (ArcConfig, Arc),
    "digits": (DigitsConfig, Digits),
    "table": (TableConfig, Table),
}


def make_task(mapping: Mapping[str, Any], where: str) -> Task:
    """The task that a mapping with the key `kind` describes. Raises `ConfigError`."""
    kind = mapping.get("kind") if isinstance(mapping, Mapping) else None
    if not isinstance(kind, str) or kind not in TASKS:
        raise ConfigError(f"{where}.kind: expected one of {', '.join(TASKS)}, got {kind!r}")
    config_class, task = TASKS[kind]
    try:
        return task(load(config_class, mapping, where))
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None
