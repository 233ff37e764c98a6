"""Work of which one process at a time may do one in a checkout."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gram_core.errors import GramError
from pipelines.params import WORK


@contextmanager
def alone(name: str, what: str, root: Path = Path()) -> Iterator[None]:
    """Hold the lock `name` of the checkout at `root`, which ends with the process. Raises
    `GramError` where another process holds it; `what` says what that one does."""
    path = root / WORK / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GramError(f"{path}: {what} is running in this checkout; wait for it") from None
        yield
