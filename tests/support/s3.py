"""A real S3 server on loopback, and a proxy in front of it that misbehaves.

    with S3Server(folder) as server:
        server.bucket("remote")                       # a folder in `folder`
        run(..., env={**os.environ, **server.environment()})
        server.stop(); server.start()                 # the same port, the same objects
        with FaultProxy(server, every=5) as proxy:
            run(..., env={**os.environ, **proxy.environment()})
            assert proxy.counts["503"] and proxy.counts["slow"]

Both are safe to stop twice; the server dies with the process that started it.
"""

import ctypes
import http.client
import itertools
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

RCLONE = Path(sys.executable).with_name("rclone")
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def client_environment(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """What boto, s3fs and DVC need to talk to `endpoint` alone, whatever files the user has."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        # rclone sends the checksum of the whole object with a part of it.
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent/aws/config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/aws/credentials",
    }


def _die_with_parent() -> None:
    """In the child before exec: SIGKILL when the parent ends, whatever ended it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class S3Server:
    """`rclone serve s3` over `folder`, whose sub-folders are the buckets. Key and secret are new
    ones each time; the log is `folder`.log. `start` returns once the server answers, `stop` once
    it is gone; `start` after `stop` is at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self.key = f"key{secrets.token_hex(8)}"
        self.secret = f"secret{secrets.token_hex(16)}"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        """http://127.0.0.1:PORT."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """For a client process."""
        return client_environment(self.endpoint, self.key, self.secret)

    def bucket(self, name: str) -> Path:
        """The folder of a bucket, made if it is not there."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def start(self) -> None:
        assert self.process is None, "started already"
        command = [
            str(RCLONE), "serve", "s3", "--config", os.devnull, "-v",
            "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{self.key},{self.secret}",
            str(self.folder),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        for _ in range(400):
            if self._answers():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"rclone does not answer:\n{self.log.read_text()[-2000:]}")

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status > 0
        except OSError:
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the server in the middle of whatever it does."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class FaultProxy:
    """Passes requests on to a server, but every `every`-th one gets one of `faults` in turn:
    "503" is answered `SlowDown` without being passed on, "slow" is passed on after `delay`
    seconds. Object bodies whose path matches the pattern `corrupt` come back with one byte
    changed. `counts` has how often: "requests", "503", "slow", "corrupt"."""

    def __init__(
        self,
        server: S3Server,
        every: int = 5,
        faults: Sequence[str] = ("503", "slow"),
        delay: float = 2.0,
        corrupt: str | None = None,
    ) -> None:
        self.server = server
        self.every = every
        self.delay = delay
        self.corrupt = corrupt
        self.counts: Counter[str] = Counter()
        self.port = free_port()
        self._faults = itertools.cycle(faults)
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """http://127.0.0.1:PORT."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """For a client process that goes through the proxy."""
        return client_environment(self.endpoint, self.server.key, self.server.secret)

    def start(self) -> None:
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._http is None or self._thread is None:
            return
        self._http.shutdown()
        self._http.socket.close()
        self._thread.join()
        self._http = self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fault(self) -> str | None:
        """Count a request and say what becomes of it."""
        with self._lock:
            self.counts["requests"] += 1
            chosen = next(self._faults) if self.counts["requests"] % self.every == 0 else None
            if chosen:
                self.counts[chosen] += 1
        return chosen

    def changed(self, path: str, body: bytes) -> bytes:
        """An object's body as the client is to see it."""
        if self.corrupt is None or not body or not re.search(self.corrupt, path):
            return body
        with self._lock:
            self.counts["corrupt"] += 1
        return body[:-1] + bytes([body[-1] ^ 1])


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client. Method, path and headers (Host too, which is signed) go on as
    they came."""

    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.fault()
        if fault == "503":
            self.answer(503, "Slow Down", [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if fault == "slow":
            time.sleep(self.proxy.delay)
        try:
            self.forward(body)
        except (OSError, http.client.HTTPException):
            # The server is gone: so is this connection, without an answer.
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def forward(self, body: bytes) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.server.port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            content = response.read()
            if self.command == "GET" and response.status in (200, 206) and "?" not in self.path:
                content = self.proxy.changed(self.path, content)
            self.answer(response.status, response.reason, response.getheaders(), content)
        finally:
            upstream.close()

    def answer(
        self, status: int, reason: str, headers: Sequence[tuple[str, str]], body: bytes
    ) -> None:
        self.send_response_only(status, reason)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length":
                # Of a HEAD: the object's, though no body comes.
                length = value
            elif name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `counts` has it."""
