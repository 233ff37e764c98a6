"""Sources: local files, HTTP, and the Hub's layout on a stand-in server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import sources
from pipelines.sources import SourceError, fetch
from pipelines.storage import secret, shown

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CSV = b"source,question,answer,rating\n"


class Hub(BaseHTTPRequestHandler):
    """The two addresses that the Hub's client asks for a file of a dataset, and one plain file."""

    hits: list[str]

    def answer(self, body: bool) -> None:
        type(self).hits.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path == "/plain/cut.csv":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CSV) + 1))
            self.end_headers()
            self.wfile.write(CSV)  # and the connection ends
            return
        if path in ("/plain/file.csv", "/datasets/owner/name/resolve/v1/train.csv"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CSV)))
            self.send_header("ETag", '"abc123"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(CSV)
            return
        content = json.dumps({"error": "not here"}).encode()
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self.answer(True)

    def do_HEAD(self) -> None:
        self.answer(False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.hits = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{httpd.server_address[1]}"
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    yield address
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV)
    assert fetch(str(path)) == path
    with pytest.raises(SourceError, match=r"b\.csv: no such file"):
        fetch(str(tmp_path / "b.csv"))


def test_http_is_fetched_once_and_whole(server: str) -> None:
    path = fetch(f"{server}/plain/file.csv")
    assert path.read_bytes() == CSV
    hits = len(Hub.hits)
    assert fetch(f"{server}/plain/file.csv") == path
    assert len(Hub.hits) == hits
    with pytest.raises(SourceError, match="no such file there"):
        fetch(f"{server}/plain/other.csv")
    assert [p.name for p in sources.CACHE.iterdir()] == [path.name]


def test_a_part_of_a_file_is_not_taken_for_it(server: str) -> None:
    with pytest.raises(SourceError, match=r"cut\.csv: cannot be fetched"):
        fetch(f"{server}/plain/cut.csv")
    assert list(sources.CACHE.iterdir()) == []


def test_a_long_query_is_no_part_of_the_cached_name(server: str) -> None:
    path = fetch(f"{server}/plain/file.csv?page={'9' * 300}")
    assert path.name.endswith("_file.csv")
    with pytest.raises(SourceError, match="no such file there"):
        fetch(f"{server}/{'n' * 400}.csv")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x.csv", "n" * 400])
def test_a_path_that_cannot_be_is_no_file(source: str) -> None:
    with pytest.raises(SourceError, match=r"no such file$"):
        fetch(source)


def test_an_address_that_cannot_be_reached_is_named(server: str) -> None:
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:9/x\.csv: cannot be fetched"):
        fetch("http://127.0.0.1:9/x.csv")
    with pytest.raises(SourceError, match="cannot be fetched \\(Port out of range"):
        fetch("http://127.0.0.1:99999/x.csv")
    with pytest.raises(SourceError, match="cannot read ftp://"):
        fetch("ftp://somewhere/x.csv")


@pytest.mark.parametrize(
    "source",
    [
        "https://me:HUSH@host/x.csv", "s3://KEY:1/HUSH@bucket/x", "s3://KEY:HUSH/bucket/x",
        "https://host/x.csv?X-Amz-Credential=KEY&X-Amz-Signature=HUSH", "https://h/x?token=HUSH",
    ],
)  # fmt: skip
def test_an_address_with_a_credential_is_refused_and_not_repeated(source: str) -> None:
    """What a task is made from is written beside its tables."""
    with pytest.raises(SourceError, match="must not hold credentials") as caught:
        fetch(source)
    assert "HUSH" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["https://host:8080/a@b", "hf://datasets/o/n@v1/x", "s3://b/x", "https://h/x?page=2"]
)
def test_plain_addresses_are_shown_as_they_are(address: str) -> None:
    assert not secret(address)
    assert shown(address) == address


def test_the_hub(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client against a server with the Hub's addresses and headers."""
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        for name, value in (
            ("ENDPOINT", server),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "hub")),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    path = fetch("hf://datasets/owner/name@v1/train.csv")
    assert path.read_bytes() == CSV
    assert any("/datasets/owner/name/resolve/v1/train.csv" in hit for hit in Hub.hits)
    with pytest.raises(SourceError, match=r"name@v1/test\.csv: the Hub did not give it"):
        fetch("hf://datasets/owner/name@v1/test.csv")
    with pytest.raises(SourceError, match="expected hf://datasets/OWNER"):
        fetch("hf://owner/name/train.csv")
