"""A Ray cluster of two nodes on this machine; the second does not see the driver's disk."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from s3 import free_port
from workspace import REPOSITORY, child_environment

from pipelines.runtime import LOCAL

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
# Without it no one talks to the cluster.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
RAY = Path(sys.executable).with_name("ray")


@contextmanager
def two_nodes(hidden: Sequence[Path], environment: dict[str, str]) -> Iterator[str]:
    """The address of a head and a second node, each with one CPU. The second has a mount namespace
    of its own, in which the folders `hidden` and the project's packages are empty: what its workers
    know of them came through Ray or object storage."""
    port = free_port()
    base = {**child_environment(), **environment, **TOKEN}
    for name in (*LOCAL, "RAY_ADDRESS", "PYTHONPATH"):
        base.pop(name, None)
    base["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
    address = f"127.0.0.1:{port}"
    common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=200000000", "--block"]
    empty = [*hidden, REPOSITORY / "gram_core", REPOSITORY / "pipelines", REPOSITORY / "stages"]
    mounts = " && ".join(f"mount -t tmpfs none '{folder}'" for folder in empty)
    join = f"'{RAY}' start --address=$ADDRESS {' '.join(common)}"
    head = [str(RAY), "start", "--head", f"--port={port}", "--include-dashboard=false", *common]
    nodes = [subprocess.Popen(head, env=base, **QUIET)]
    try:
        address = _wait(port, nodes[0])
        nodes.append(
            subprocess.Popen(
                ["unshare", "-m", "bash", "-c", f"cd / && {mounts} && {join}"],
                env={**base, "ADDRESS": address},
                **QUIET,
            )
        )
        _joined(address)
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def _wait(port: int, head: subprocess.Popen[bytes]) -> str:
    """The head's own address, once it answers."""
    import socket

    from ray._private.services import node_ip_address_from_perspective

    host = node_ip_address_from_perspective(None)
    for _ in range(300):
        assert head.poll() is None, "the head ended"
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return f"{host}:{port}"
    raise AssertionError("the head did not start")


def _joined(address: str) -> None:
    """Wait until both nodes are there."""
    for _ in range(60):
        done = subprocess.run(
            [str(RAY), "status", "--address", address],
            env=environment_at(address, {}), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "/2.0 CPU" in done.stdout:
            return
        time.sleep(1)
    raise AssertionError(f"the second node did not join: {done.stdout} {done.stderr}")


def environment_at(address: str, more: dict[str, str]) -> dict[str, str]:
    """For a driver of that cluster."""
    found = {**os.environ, **child_environment(), **more, **TOKEN, "RAY_ADDRESS": address}
    return {name: value for name, value in found.items() if name not in LOCAL}
