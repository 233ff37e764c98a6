"""Where checkpoints of workers lie: with the driver, reached through Ray, or in an object store.

Both are a `gram_core.train.checkpoint.Store`. No worker needs the driver's disk.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from gram_core.train.checkpoint import META, CheckpointError, FolderStore, Found
from pipelines import storage
from pipelines.storage import StorageError


class Keep(NamedTuple):
    """A worker's message: keep this checkpoint."""

    name: str
    files: Mapping[str, bytes]


class _Asks(Protocol):
    def ask(self, message: Any) -> Any: ...


class DriverStore:
    """Checkpoints that travel through Ray to the driver, which keeps them; the newest one came
    with the job."""

    def __init__(self, board: _Asks, found: Found | None) -> None:
        self.board = board
        self.found = found

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        self.board.ask(Keep(name, files))

    def newest(self) -> Found | None:
        return self.found

    def clear(self) -> None:
        """The driver does it."""


def kept(message: Any, store: FolderStore) -> bool:
    """Whether the driver was asked to keep a checkpoint, and did. Raises `CheckpointError`."""
    if isinstance(message, Keep):
        store.write(message.name, message.files)
        return True
    return False


class ObjectStore:
    """Checkpoints below an s3:// address, which is of one run with one set of settings: others may
    be at work beside it. `meta.json` goes last and holds the checksums of all files: a checkpoint
    without it is half-written and never read."""

    def __init__(self, address: str) -> None:
        self.address = address

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        folder = storage.join(self.address, name)
        try:
            # One of other settings may lie there; without its mark it is not whole.
            storage.remove(storage.join(folder, META))
            storage.remove(folder)
            for file in sorted(files, key=lambda file: file == META):
                storage.write(storage.join(folder, file), files[file])
            for old in storage.names(self.address):
                if old != name:
                    storage.remove(storage.join(self.address, old))
        except StorageError as error:
            raise CheckpointError(f"checkpoint not written: {error}") from None

    def newest(self) -> Found | None:
        try:
            for name in reversed(storage.names(self.address)):
                folder = storage.join(self.address, name)
                files = storage.names(folder)
                if META in files:
                    return Found(
                        folder, {file: storage.read(storage.join(folder, file)) for file in files}
                    )
        except StorageError as error:
            raise CheckpointError(f"checkpoint not read: {error}") from None
        return None

    def clear(self) -> None:
        storage.remove(self.address)
