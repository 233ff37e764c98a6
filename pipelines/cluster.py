"""Ray: connecting or starting it, quietly, and the board between workers and driver."""

import asyncio
import itertools
import logging
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gram_core.errors import GramError
from pipelines.alone import few_processes
from pipelines.runtime import cluster_address, environment, local, threads

PARTS = 10_000  # of a GPU, that Ray counts
OURS = ("__main__", "gram_core", "pipelines", "stages", "tests", "benchmarks")


@contextmanager
def cluster(cpus: int | None = None) -> Iterator[None]:
    """A connection to `RAY_ADDRESS` if it is set, else a local Ray of this machine's size on
    loopback, stopped at the end. Raises `GramError` where there is none."""
    if ray.is_initialized():
        yield
        return
    address = cluster_address()
    if address:
        _reach(address)
    carry_own_modules()
    alone = {} if address else {"num_cpus": cpus or threads(), "include_dashboard": False}
    if not address:
        # For the processes that Ray starts; and what it has read of it in this one.
        os.environ.update(local())
        ray_constants.ENABLE_RAY_CLUSTER = False
    quiet = ("ray", "ray.data", "ray.train", "ray.tune")
    for name in quiet:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with nullcontext() if address else few_processes():
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": environment(), **(_code() if address else {})},
                **alone,
            )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise GramError(f"cannot start {where}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _code() -> dict[str, Any]:
    """What a cluster's workers get from the driver: the code, and nothing else of its disk."""
    import gram_core
    import pipelines

    packages = [str(Path(package.__path__[0])) for package in (gram_core, pipelines)]
    return {"py_modules": packages, "excludes": ["**/__pycache__"]}


def carry_own_modules() -> None:
    """Have modules that were imported from the working folder and are not the project's, such as
    the rule of a `table` task, travel with what is made of them."""
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        file = getattr(sys.modules.get(top), "__file__", None)
        if file and top not in OURS:
            place = Path(file).parent
            if (place.parent if Path(file).name == "__init__.py" else place) == Path.cwd():
                ray.cloudpickle.register_pickle_by_value(module)


def worker_cores(
    workers: int, wanted: int | None, least: int | None = None, gpus: float = 0.0
) -> int:
    """CPU cores of each of `workers`: `wanted`, or the most with which the cluster's nodes have
    places for as many of them as they can, each with `gpus` GPUs; an equal share where these are
    not the `least` (by default all). Raises `GramError` where a local Ray has no place for `least`;
    a cluster may grow."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    rooms = [_rooms(node.get("GPU", 0.0), gpus) for node in nodes]
    least = least or workers

    def places(cores: int) -> int:
        return sum(int(min(c // cores, room)) for c, room in zip(cpus, rooms, strict=True))

    some = min(workers, places(1))
    if wanted:
        cores = wanted
    elif some >= least:
        cores = next(c for c in range(int(max(cpus)), 0, -1) if places(c) >= some)
    else:
        cores = max(1, int(min(max(cpus), sum(cpus) // workers)))
    if places(cores) < least and not cluster_address():
        raise GramError(
            f"{least} workers of {cores} CPU cores do not fit on this machine, whose Ray has "
            f"{sum(cpus):.0f}; ask for fewer workers or cores"
        )
    return cores


def _rooms(have: float, each: float) -> float:
    """How many workers of `each` GPUs a node with so many has room for: Ray cuts up every GPU by
    itself, and gives no parts of several."""
    if not each:
        return math.inf
    return have // each if each >= 1 else have * (PARTS // max(1, round(PARTS * each)))


def check_gpus(workers: int, each: float) -> None:
    """Raise `GramError` where a local Ray has not the GPUs that so many workers ask for: they would
    be waited for without end. A cluster may grow."""
    if not each or cluster_address():
        return
    have = ray.cluster_resources().get("GPU", 0)
    if workers > _rooms(have, each):
        raise GramError(
            f"{workers} workers of {each:g} GPUs do not fit on this machine, whose Ray has "
            f"{have:g}; ask for fewer workers or GPUs"
        )


def has_gpus() -> bool:
    """Whether any node has a GPU for workers."""
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


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


class _Desk:
    """Messages of the workers in the order they came, and the driver's answers. It reads neither:
    to know what they are made of, its process would import torch while a worker waits."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, bytes]] = []
        self.arrived = asyncio.Event()
        self.numbers = itertools.count()
        self.waiting: dict[int, asyncio.Future[bytes]] = {}

    async def put(self, message: bytes) -> None:
        self.messages.append((-1, message))
        self.arrived.set()

    async def ask(self, message: bytes) -> bytes:
        number = next(self.numbers)
        answer = self.waiting[number] = asyncio.get_running_loop().create_future()
        self.messages.append((number, message))
        self.arrived.set()
        return await answer

    async def take(self, wait: bool) -> list[tuple[int, bytes]]:
        if wait:
            await self.arrived.wait()
        self.arrived.clear()
        taken, self.messages = self.messages, []
        return taken

    async def wake(self) -> None:
        self.arrived.set()

    async def answer(self, number: int, value: bytes) -> None:
        self.waiting.pop(number).set_result(value)


class Board:
    """The way from workers to the driver, whatever node they are on: while the driver is inside
    `listening`, each message is handed to its function in a thread of the driver."""

    def __init__(self) -> None:
        # On the driver's own node: it must not be lost with a worker's.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        desk = ray.remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=here)(_Desk)
        self.actor = desk.remote()

    def post(self, message: Any) -> None:
        """Send from a worker and go on; arrives once."""
        ray.get(self.actor.put.remote(cloudpickle.dumps(message)))

    def ask(self, message: Any) -> Any:
        """Send from a worker and wait for what the driver's function returns; a `GramError` that
        it raises is raised here."""
        answer = cloudpickle.loads(ray.get(self.actor.ask.remote(cloudpickle.dumps(message))))
        if isinstance(answer, GramError):
            raise answer
        return answer

    @contextmanager
    def listening(self, receive: Callable[[Any], Any]) -> Iterator[None]:
        """Deliver messages to `receive` until the block ends, the last ones included."""
        stop = threading.Event()

        def deliver(wait: bool) -> None:
            for number, message in ray.get(self.actor.take.remote(wait)):
                try:
                    answer = receive(cloudpickle.loads(message))
                except Exception as error:
                    # Whoever waits must hear of it, whatever it is.
                    answer = error if isinstance(error, GramError) else GramError(repr(error))
                if number >= 0:
                    ray.get(self.actor.answer.remote(number, cloudpickle.dumps(answer)))

        def loop() -> None:
            while not stop.is_set():
                deliver(wait=True)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            # With a cluster that is gone there is nothing to hear, and what went wrong is known.
            with suppress(ray.exceptions.RayError):
                self.actor.wake.remote()
                thread.join()
                deliver(wait=False)
                ray.kill(self.actor)
