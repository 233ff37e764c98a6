"""How sampling is cut into blocks, and where finished ones lie until the table is whole.

The cut is a function of puzzles and settings, never of the workers. A finished block is one Parquet
file whose name carries its number and checksum: what a killed run had finished is found again,
nothing is drawn twice, and a damaged block is never taken.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gram_core.sample.trajectory import SampleConfig
from pipelines import storage
from pipelines.storage import StorageError

# A block is at most so many full batches; a run of many has at least some blocks.
BATCHES, BLOCKS = 16, 16
# Towards the end of a run of large blocks they get smaller, so that no worker is long at its last
# one when the others have none left: a quarter of what is left, but at least some full batches.
LEFT, LEAST = 4, 4
COMPUTER = b"gram.computer"
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
    width, full = config.width, BATCHES * config.batch
    batches = min(BATCHES, math.ceil(puzzles * width / (BLOCKS * config.batch)))
    most, least = batches * config.batch, min(batches, LEAST) * config.batch
    # Where the first accepted answer ends a puzzle, each part of it would end by itself: as few
    # parts as can be.
    smallest, largest = (full, full) if config.stop_when_verified else (least, most)
    if width <= largest:
        pieces = _pieces(puzzles, 0, least // width, most // width)
        spans = [(start, stop, 0, width) for start, stop in pieces]
    else:
        spans = [
            (puzzle, puzzle + 1, first, stop - first)
            for puzzle in range(puzzles)
            for first, stop in _pieces(width, (puzzles - 1 - puzzle) * width, smallest, largest)
        ]
    return [Block(number, *span) for number, span in enumerate(spans)]


def _pieces(total: int, later: int, least: int, most: int) -> Iterator[tuple[int, int]]:
    """0 .. total - 1, after which `later` ones follow, in pieces from one number to before the
    other."""
    start = 0
    while start < total:
        wanted = max(least, min(most, (total - start + later) // LEFT), 1)
        stop = min(start + wanted, total)
        yield start, stop
        start = stop


def packed(number: int, table: pa.Table, computer: Mapping[str, Any]) -> tuple[str, bytes]:
    """The name and content of a finished block, and in it what it was computed on."""
    table = table.replace_schema_metadata({COMPUTER: json.dumps(computer)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return f"block-{number:06d}-{_checksum(content)}.parquet", content


class BlockStore:
    """The finished blocks of one run at `address`, a folder or an s3:// prefix; `key` identifies
    the cut and all that the rows depend on, so that no other blocks are ever taken."""

    def __init__(self, address: str, key: str) -> None:
        self.address = address
        self.folder = storage.join(address, key)
        self.names: dict[int, str] = {}
        self.made: dict[int, Mapping[str, Any]] = {}
        for name in storage.names(self.folder):
            match = NAME.fullmatch(name)
            if match is not None:
                self.names[int(match[1])] = name

    def put(self, name: str, content: bytes) -> None:
        """Keep a finished block whole. Raises `StorageError`."""
        storage.write(storage.join(self.folder, name), content)

    def add(self, name: str, computer: Mapping[str, Any]) -> int:
        """Take note of a block that was put there, and of what it was computed on; its number."""
        match = NAME.fullmatch(name)
        assert match is not None
        number = int(match[1])
        self.names[number], self.made[number] = name, computer
        return number

    def computers(self, blocks: list[Block]) -> Iterator[Mapping[str, Any]]:
        """What the blocks were computed on; those that a former attempt had finished say it
        themselves. Raises `StorageError` as `tables` does."""
        yield from self.made.values()
        for content in self._contents([b for b in blocks if b.number not in self.made]):
            metadata = pq.read_schema(pa.BufferReader(content)).metadata or {}
            if COMPUTER in metadata:  # an older program's say nothing
                yield json.loads(metadata[COMPUTER])

    def tables(self, blocks: list[Block]) -> Iterator[pa.Table]:
        """The blocks' rows in order. Raises `StorageError` where one is missing or damaged."""
        for content in self._contents(blocks):
            yield pq.read_table(pa.BufferReader(content))

    def _contents(self, blocks: list[Block]) -> Iterator[bytes]:
        for block in blocks:
            address = storage.join(self.folder, self.names[block.number])
            content = storage.read(address)
            if _checksum(content) not in self.names[block.number]:
                storage.remove(address)
                raise StorageError(
                    f"{address}: does not match its checksum; it was removed, run the stage again"
                )
            yield content

    def clear(self) -> None:
        """Remove this run's blocks; on this machine those of other settings too, which elsewhere
        may be somebody's who is at work."""
        storage.remove(self.folder if storage.local(self.address) is None else self.address)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
