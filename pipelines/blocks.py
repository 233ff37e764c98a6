"""How sampling is cut into blocks, and where finished ones lie until the table is whole.

The cut is a function of puzzles and settings, never of the workers. A finished block is one Parquet
file whose name carries its number and checksum: what a killed run had finished is found again,
nothing is drawn twice, and a damaged block is never taken.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from gram_core.sample.trajectory import SampleConfig
from pipelines import storage
from pipelines.storage import StorageError

# A block is at most so many full batches, and the run at least some blocks.
BATCHES, BLOCKS = 16, 16
# Towards the end blocks get smaller, so that no worker is long at its last one when the others have
# none left: a block is a quarter of what is left, but at least some full batches.
LEFT, LEAST = 4, 4
NAME = re.compile(r"block-(\d{6})-([0-9a-f]{16})\.parquet")


@dataclass(frozen=True)
class Block:
    """`count` trajectories, from number `first`, of each of the puzzles start .. stop - 1."""

    number: int
    start: int
    stop: int
    first: int
    count: int

    @property
    def trajectories(self) -> int:
        """How many trajectories the block is."""
        return (self.stop - self.start) * self.count


def cut(puzzles: int, config: SampleConfig) -> list[Block]:
    """The blocks of a run, in the order of its table: by puzzle, then by trajectory."""
    full = BATCHES * config.batch
    most = min(full, max(config.batch, puzzles * config.width // BLOCKS))
    least = min(most, LEAST * config.batch)
    # A puzzle that the first accepted answer ends is one block's, if one can hold it.
    if config.width <= (full if config.stop_when_verified else most):
        pieces = _pieces(puzzles, least // config.width, most // config.width)
        spans = [(start, stop, 0, config.width) for start, stop in pieces]
    else:
        spans = [
            (puzzle, puzzle + 1, first, stop - first)
            for puzzle in range(puzzles)
            for first, stop in _pieces(config.width, least, most)
        ]
    return [Block(number, *span) for number, span in enumerate(spans)]


def _pieces(total: int, least: int, most: int) -> Iterator[tuple[int, int]]:
    """0 .. total - 1 in pieces, from one number to before the other."""
    start = 0
    while start < total:
        wanted = max(least, min(most, (total - start) // LEFT), 1)
        stop = min(start + wanted, total)
        yield start, stop
        start = stop


def packed(number: int, table: pa.Table) -> tuple[str, bytes]:
    """The name and content of a finished block."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return f"block-{number:06d}-{_checksum(content)}.parquet", content


class BlockStore:
    """The finished blocks of one run at `address`, a folder or an s3:// prefix; `key` identifies
    all that the rows depend on, so that blocks of other settings are never taken."""

    def __init__(self, address: str, key: str) -> None:
        self.address = address
        self.folder = storage.join(address, key)
        self.names: dict[int, str] = {}
        for name in storage.names(self.folder):
            match = NAME.fullmatch(name)
            if match is not None:
                self.names[int(match[1])] = name

    def put(self, name: str, content: bytes) -> None:
        """Keep a finished block whole. Raises `StorageError`."""
        storage.write(storage.join(self.folder, name), content)

    def add(self, name: str) -> int:
        """Take note of a block that was put there; its number."""
        match = NAME.fullmatch(name)
        assert match is not None
        number = int(match[1])
        self.names[number] = name
        return number

    def tables(self, blocks: list[Block]) -> Iterator[pa.Table]:
        """The blocks' rows in order. Raises `StorageError` where one is missing or damaged."""
        for block in blocks:
            address = storage.join(self.folder, self.names[block.number])
            content = storage.read(address)
            if _checksum(content) not in self.names[block.number]:
                storage.remove(address)
                raise StorageError(
                    f"{address}: does not match its checksum; it was removed, run the stage again"
                )
            yield pq.read_table(pa.BufferReader(content))

    def clear(self) -> None:
        """Remove this run's blocks; on this machine those of other settings too, which elsewhere
        may be somebody's who is at work."""
        storage.remove(self.folder if storage.local(self.address) is None else self.address)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
