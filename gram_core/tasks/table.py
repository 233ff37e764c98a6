"""A task of one's own: rows of inputs and targets from Parquet, and a rule that says what is valid.

Tables have the columns `inputs` and `target`, lists of `length` token numbers below `vocab`;
token 0 is padding, which an input may hold and a target may not: no loss falls on it, so a model
would never learn where an answer ends, and no two answers would be alike. The verifier is a
function named by its import path, `package.module:function`, from uint8 arrays inputs and answers
[B, S] to bool [B]; without one an answer is valid where it equals a known target of its input.
docs/tasks.md has an example.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config, Fraction, PositiveInt, Seed
from gram_core.shape import Verifier
from gram_core.tables import dataset_schema, tokens_array
from gram_core.tasks.base import Fetch, Split, Task, TaskError

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


class TableConfig(Config, frozen=True, kw_only=True, tag="table", tag_field="kind"):
    """Where rows come from, how long they are and what their tokens are.

    Without a `test` file, a share `test_share` of the unique inputs is held out. `complete` says
    that the files hold every valid target of each input, so that coverage means something.
    `symbols` are the characters of tokens 1, 2, ... for typing and showing puzzles, `columns` the
    tokens of a shown line; without symbols, tokens are numbers with blanks between.
    """

    length: PositiveInt
    vocab: Annotated[int, msgspec.Meta(ge=2, le=256)]
    train: str
    test: str | None = None
    test_share: Fraction = 0.15
    seed: Seed = 0
    verifier: str | None = None
    complete: bool = False
    symbols: str | None = None
    columns: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.symbols is not None and (
            not len(self.symbols) == len(set(self.symbols)) == self.vocab - 1
            or any(symbol.isspace() or symbol == "|" for symbol in self.symbols)
        ):
            raise ValueError(
                f"symbols: {self.symbols!r} should be {self.vocab - 1} different characters, one "
                f"for each token 1..{self.vocab - 1}, none of them blank or |"
            )
        if self.verifier is not None and self.verifier.count(":") != 1:
            raise ValueError(f"verifier: {self.verifier!r} is not package.module:function")


class Table(Task):
    """The task of a table."""

    def __init__(self, config: TableConfig) -> None:
        self.config: TableConfig = config
        self.length = config.length
        self.vocab = config.vocab
        self.verifies = config.verifier is not None
        self._rule = None if config.verifier is None else _rule(config.verifier)

    def generate(self, fetch: Fetch) -> Split:
        """The rows of the files, every known target of an input on one side. Raises `TaskError`."""
        config = self.config
        train = self._read(fetch(config.train), config.train)
        if config.test is not None:
            test = self._read(fetch(config.test), config.test)
            known = {row.tobytes() for row in train[0]}
            for number, row in enumerate(test[0], 1):
                if row.tobytes() in known:
                    raise TaskError(f"{config.test}: input of row {number} is a training input too")
        else:
            train, test = self._hold_out(*train)
        tables = self._table(*train), self._table(*test)
        counts = {"train_pairs": len(tables[0]), "test_pairs": len(tables[1])}
        return Split(*tables, counts)

    def _read(self, path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, uint8 [N, S]."""
        try:
            rows = pl.read_parquet(path, glob=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise TaskError(f"{name}: not a readable Parquet file ({reason})") from None
        if rows.is_empty():
            raise TaskError(f"{name}: the table has no rows")
        inputs, target = (self._tokens(rows, column, name) for column in ("inputs", "target"))
        padded = (target == 0).any(1)
        if padded.any():
            raise TaskError(
                f"{name}: target of row {int(padded.argmax()) + 1} has token 0, padding, which is "
                "never learned; fill up answers with a token of their own"
            )
        if self._rule is not None:
            valid = self._apply(inputs, target)
            if not valid.all():
                row = int(valid.argmin()) + 1
                raise TaskError(f"{name}: target of row {row} is not valid by the verifier")
        return inputs, target

    def _tokens(self, rows: pl.DataFrame, column: str, name: str) -> np.ndarray:
        if column not in rows.columns:
            raise TaskError(
                f"{name}: column {column!r} is missing; there are {', '.join(rows.columns)}"
            )
        series = rows[column]
        inner = getattr(series.dtype, "inner", None)
        if inner is None or not (inner.is_integer() or inner == pl.Null):
            raise TaskError(
                f"{name}: column {column!r} is {series.dtype}, expected lists of whole numbers"
            )
        lists = series.cast(pl.List(pl.Int64), strict=False)
        lengths = lists.list.len().fill_null(0).to_numpy()
        if (lengths != self.length).any():
            row = int((lengths != self.length).argmax())
            raise TaskError(
                f"{name}: {column} of row {row + 1} has {lengths[row]} tokens, expected "
                f"{self.length}"
            )
        flat = lists.explode()
        tokens = flat.fill_null(-1).to_numpy().reshape(-1, self.length)
        wrong = ((tokens < 0) | (tokens >= self.vocab)).any(1)
        if wrong.any():
            row = int(wrong.argmax())
            bad = next(int(t) for t in tokens[row] if not 0 <= t < self.vocab)
            raise TaskError(
                f"{name}: {column} of row {row + 1} has token {bad}, the vocabulary is "
                f"0..{self.vocab - 1}"
            )
        out: np.ndarray = tokens.astype(np.uint8)
        return out

    def _hold_out(
        self, inputs: np.ndarray, target: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        unique, owner = np.unique(inputs, axis=0, return_inverse=True)
        count = round(len(unique) * self.config.test_share)
        if not 0 < count < len(unique):
            raise TaskError(
                f"test_share {self.config.test_share} of {len(unique)} different inputs leaves one "
                "side empty; use another share, or a test file"
            )
        chosen = np.random.default_rng(self.config.seed).permutation(len(unique))[:count]
        out = np.isin(owner.reshape(-1), chosen)
        return (inputs[~out], target[~out]), (inputs[out], target[out])

    def _table(self, inputs: np.ndarray, target: np.ndarray) -> pa.Table:
        pairs = np.unique(np.concatenate([inputs, target], axis=1), axis=0)
        inputs, target = pairs[:, : self.length], pairs[:, self.length :]
        _, owner, counts = np.unique(inputs, axis=0, return_inverse=True, return_counts=True)
        ids = [row.tobytes().hex() for row in inputs]
        known = counts[owner.reshape(-1)] * self.config.complete
        return pa.table(
            {
                "puzzle_id": ids,
                "inputs": tokens_array(np.ascontiguousarray(inputs)),
                "target": tokens_array(np.ascontiguousarray(target)),
                "solution_count": pa.array(known, pa.uint32()),
                "group_id": ids,
                "augmentation": [""] * len(ids),
            },
            schema=dataset_schema(self.length, self.length),
        )

    def _apply(self, inputs: np.ndarray, answers: np.ndarray) -> np.ndarray:
        assert self._rule is not None, "only a task with a verifier asks it"
        try:
            # Copies: what a rule writes into is its own.
            valid = np.asarray(self._rule(inputs.copy(), answers.copy()))
        except Exception as error:  # a user's code
            raise TaskError(
                f"verifier {self.config.verifier}: raised {type(error).__name__}: {error}"
            ) from error
        if valid.shape != (len(inputs),) or valid.dtype != np.bool_:
            raise TaskError(
                f"verifier {self.config.verifier}: gave {valid.dtype} {list(valid.shape)} for "
                f"{len(inputs)} answers, expected bool [{len(inputs)}]"
            )
        return valid

    @property
    def verify(self) -> Verifier:
        """What the verifier says of inputs and answers, uint8 [B, S]; called uncompiled, for a rule
        may do what no compiler can follow."""
        # Not a decorator: it imports the compiler, which takes as long as torch, in every process.
        rule: Verifier = torch.compiler.disable(self._verify)  # type: ignore[no-untyped-call]
        return rule

    def _verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        valid = self._apply(inputs.cpu().numpy(), answers.cpu().numpy())
        return torch.from_numpy(valid).to(answers.device)

    def parse(self, text: str) -> np.ndarray:
        """Token numbers, or symbols without blanks between, uint8 [S]."""
        symbols = self.config.symbols
        words = text.replace("|", " ").split()
        if symbols is not None:
            words = list("".join(words))
            unknown = next((word for word in words if word not in symbols), None)
            if unknown is not None:
                raise TaskError(f"{unknown!r} is no symbol; use {symbols}")
            tokens = [symbols.index(word) + 1 for word in words]
        else:
            wrong = next((w for w in words if not self._is_token(w)), None)
            if wrong is not None:
                raise TaskError(f"{wrong!r} is no token; use numbers 0..{self.vocab - 1}")
            tokens = [int(word) for word in words]
        if len(tokens) != self.length:
            raise TaskError(f"puzzle has {len(tokens)} tokens, expected {self.length}")
        return np.array(tokens, dtype=np.uint8)

    def _is_token(self, word: str) -> bool:
        # Python does not read thousands of digits.
        return word.isdecimal() and len(word) <= 9 and int(word) < self.vocab

    def render(self, tokens: np.ndarray) -> str:
        """The same notation, `columns` tokens a line; `?` for padding among symbols."""
        symbols, width = self.config.symbols, self.config.columns or self.length
        if symbols is None:
            words = [str(int(token)) for token in tokens]
        else:
            words = [("?" + symbols)[int(token)] for token in tokens]
        gap = " " if symbols is None else ""
        lines = [gap.join(words[i : i + width]) for i in range(0, len(words), width)]
        return "\n".join(lines)


def _rule(path: str) -> Rule:
    """The function that an import path names. Raises `ValueError`."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's code
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"verifier: {path!r} cannot be imported ({reason})") from None
    if not callable(found):
        raise ValueError(f"verifier: {path!r} is not a function")
    rule: Rule = found
    return rule
