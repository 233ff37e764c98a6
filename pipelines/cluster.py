"""Ray: connecting or starting it, quietly, and the board that carries progress to the driver."""

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from gram_core.errors import GramError
from pipelines.runtime import environment, threads


@contextmanager
def cluster(cpus: int | None = None) -> Iterator[None]:
    """A connection to `RAY_ADDRESS` if it is set, else a local Ray of this machine's size on
    loopback, stopped at the end."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _reach(address)
    local = {} if address else {"num_cpus": cpus or threads(), "include_dashboard": False}
    quiet = ("ray", "ray.data", "ray.train", "ray.tune")
    for name in quiet:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": environment()},
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise GramError(f"cannot start {where}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise `GramError` where nobody listens at HOST:PORT, for which Ray itself waits minutes."""
    found = re.fullmatch(r"(?:ray://)?([^/\s]+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise GramError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); correct it, or unset it "
            "to use this machine alone"
        ) from None


class _Messages:
    """Messages of the workers, in the order they came."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def put(self, message: Any) -> None:
        self.messages.append(message)

    def take(self) -> list[Any]:
        taken, self.messages = self.messages, []
        return taken


class Board:
    """A one-way channel from workers to the driver: workers `post`, and while the driver is
    inside `listening`, each message is handed to its function in a thread of the driver."""

    def __init__(self) -> None:
        self.actor = ray.remote(num_cpus=0)(_Messages).remote()

    def post(self, message: Any) -> None:
        """Send from a worker; arrives once."""
        ray.get(self.actor.put.remote(message))

    @contextmanager
    def listening(self, receive: Callable[[Any], None]) -> Iterator[None]:
        """Deliver messages to `receive` until the block ends, the last ones included."""
        stop = threading.Event()

        def deliver() -> None:
            for message in ray.get(self.actor.take.remote()):
                receive(message)

        def loop() -> None:
            while not stop.wait(0.5):
                deliver()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            deliver()
            ray.kill(self.actor)
