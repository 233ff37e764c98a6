"""Datasets, trajectories and checkpoints straight to and from an S3 server, and what goes wrong."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from s3 import FaultProxy, S3Server
from workspace import PARAMS, child_environment, contents, make_data, params, write_params

from gram_core.errors import GramError
from gram_core.train.checkpoint import META, CheckpointError, Found
from pipelines import storage
from pipelines.blocks import Block, BlockStore, packed
from pipelines.dataset import publish, published
from pipelines.params import load_run, load_storage, run_of
from pipelines.sample import sample_run
from pipelines.storage import StorageConfig, StorageError
from pipelines.stores import ObjectStore
from pipelines.train import Job, checkpoint_store, train_run

BUCKET = "place"
FILES = {"a.safetensors": b"a" * 1000, META: b"{}", "z.safetensors": b"z"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("objects") / "buckets") as server:
        server.bucket(BUCKET)
        yield server


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, and this process its client."""
    at(server.environment(), monkeypatch)
    return server


def at(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.s3
def test_objects_are_written_listed_read_and_removed(s3: S3Server) -> None:
    folder = f"s3://{BUCKET}/some/where"
    assert storage.names(folder) == []
    storage.write(f"{folder}/one", b"1")
    storage.write(f"{folder}/deep/two", b"2" * 100_000)
    assert storage.names(folder) == ["deep", "one"]
    assert storage.read(f"{folder}/deep/two") == b"2" * 100_000
    storage.remove(folder)
    storage.remove(folder)
    assert storage.names(folder) == []
    with pytest.raises(StorageError, match=f"^{folder}/one: not there$"):
        storage.read(f"{folder}/one")


def test_local_paths_and_file_addresses_work_alike(tmp_path: Path) -> None:
    for address in (str(tmp_path / "a"), f"file://{tmp_path}/b"):
        storage.write(f"{address}/one", b"1")
        assert storage.read(f"{address}/one") == b"1"
        assert storage.names(address) == ["one"]
        storage.remove(address)
        assert storage.names(address) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/file", "cannot use ftp://; use a path or s3://"),
        ("http://169.254.169.254/latest", "cannot use http://"),
        ("s3://KEY:HUSH@bucket/x", "must not hold credentials"),
        ("s3://KEY:a/HUSH@bucket/x", r"^s3://\.\.\.@bucket/x: an address must not hold"),
        ("s3://KEY:HUSH/bucket", "must not hold credentials"),
        ("s3://KEY:12/HUSH@bucket/x", r"^s3://\.\.\.@bucket/x: an address must not hold"),
        ("s3://KEY:12/HUSH", r"^s3://\.\.\.: an address must not hold"),
        ("s3://bucket/a/../../b", r"must not contain '\.\.'"),
        ("../outside", r"must not contain '\.\.'"),
        ("s3://", "not of the form s3://BUCKET/KEY"),
        ("s3://UPPER CASE/x", "not of the form s3://BUCKET/KEY"),
        ("s3://bucket/exp[1]", r"must not contain any of \* \? \[ \]"),
        ("s3://bucket/*", "which would name others too"),
    ],
)
def test_addresses_of_other_kinds_are_refused(address: str, words: str) -> None:
    for use in (storage.read, storage.names, storage.remove, lambda a: storage.write(a, b"")):
        with pytest.raises(StorageError, match=words) as caught:
            use(address)
        assert "HUSH" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["https://host/x", "s3://me:HUSH@bucket/x", "s3://me:1/HUSH@bucket/x", "here"]
)
def test_settings_name_buckets_only(folder: Path, address: str) -> None:
    write_params({**PARAMS, "storage": {"checkpoints": address}})
    with pytest.raises(GramError, match=r"^params.yaml: storage: ") as caught:
        load_storage()
    assert "HUSH" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.s3
def test_a_checkpoint_without_its_mark_is_not_there(s3: S3Server) -> None:
    store = ObjectStore(f"s3://{BUCKET}/marks")
    assert store.newest() is None
    store.write("step-0000001", FILES)
    address = f"s3://{BUCKET}/marks/step-0000001"
    assert store.newest() == Found(address, FILES)
    # A newer one was cut off before its mark came.
    storage.write(f"s3://{BUCKET}/marks/step-0000002/a.safetensors", b"half")
    assert store.newest() == Found(address, FILES)
    store.write("step-0000003", FILES)
    assert storage.names(f"s3://{BUCKET}/marks") == ["step-0000003"]
    store.clear()
    assert store.newest() is None


@pytest.mark.s3
def test_published_tables_are_checked(s3: S3Server, data: Path) -> None:
    address = publish("queens", f"s3://{BUCKET}/tables")
    assert publish("queens", f"s3://{BUCKET}/tables") == address
    with published(address) as folder:
        assert contents(folder) == {
            name: Path("data/queens", name).read_bytes()
            for name in ("train.parquet", "test.parquet")
        }
    storage.write(f"{address}/test.parquet", b"another")
    with pytest.raises(StorageError, match="not those that were put there"), published(address):
        pass
    # The next run that wants them puts them there again.
    assert publish("queens", f"s3://{BUCKET}/tables") == address
    with published(address):
        pass


@pytest.mark.s3
def test_a_run_whose_checkpoints_and_blocks_lie_in_s3(
    s3: S3Server, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(load_run("tiny"))
    sample_run(load_run("tiny"))
    weights = Path("models/tiny/model.safetensors").read_bytes()
    rows = pl.read_parquet("results/tiny/trajectories.parquet")
    place = {name: f"s3://{BUCKET}/{name}" for name in ("checkpoints", "trajectories")}
    write_params({**PARAMS, "storage": place})
    seen: list[str] = []
    write = storage.write

    def spy(address: str, content: bytes) -> None:
        seen.append(address)
        write(address, content)

    monkeypatch.setattr(storage, "write", spy)
    train_run(load_run("tiny"))
    sample_run(load_run("tiny"))
    assert Path("models/tiny/model.safetensors").read_bytes() == weights
    assert pl.read_parquet("results/tiny/trajectories.parquet").equals(rows)
    assert all(address.startswith(tuple(place.values())) for address in seen)
    assert any("/step-" in address for address in seen)
    assert any("/block-" in address for address in seen)
    for address in place.values():
        assert storage.names(address) == [], "what was in progress is gone"
    assert not list(Path(".gram/checkpoints").iterdir())
    assert not list(Path(".gram/samples").iterdir())


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_read_and_write_s3_by_themselves(s3: S3Server, data: Path) -> None:
    changes = {"runs__tiny__train__engine": "deepspeed", "runs__tiny__sample__concurrency": 1}
    place = {n: f"s3://{BUCKET}/ray/{n}" for n in ("datasets", "checkpoints", "trajectories")}
    train_run(load_run("tiny"))
    sample_run(load_run("tiny"))
    curve = pl.read_csv("models/tiny/history.csv")
    write_params({**params(**changes), "storage": place})
    train_run(load_run("tiny"))
    rows = sample_run(load_run("tiny"))
    again = pl.read_csv("models/tiny/history.csv")
    assert again["kl"].to_list() == pytest.approx(curve["kl"].to_list(), rel=1e-4)
    assert rows == len(pl.read_parquet("results/tiny/trajectories.parquet"))
    assert len(list((s3.folder / BUCKET / "ray/datasets").rglob("*.parquet"))) == 2


@pytest.mark.s3
def test_slow_and_refused_answers_are_tried_again(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(server, every=5) as proxy:
        at(proxy.environment(), monkeypatch)
        for number in range(12):
            storage.write(f"s3://{BUCKET}/faults/{number}", bytes([number]) * 50_000)
        for number in range(12):
            assert storage.read(f"s3://{BUCKET}/faults/{number}") == bytes([number]) * 50_000
        assert len(storage.names(f"s3://{BUCKET}/faults")) == 12
        assert proxy.counts["503"] and proxy.counts["slow"]


@pytest.mark.s3
def test_a_server_that_comes_back_is_waited_for(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.stop()
    writer = threading.Thread(target=storage.write, args=(f"s3://{BUCKET}/back", b"again"))
    writer.start()
    time.sleep(3)
    s3.start()
    writer.join()
    assert storage.read(f"s3://{BUCKET}/back") == b"again"


@pytest.mark.s3
@pytest.mark.parametrize(
    "wrong", ["secret", "bucket", pytest.param("server", marks=pytest.mark.slow)]
)
def test_what_cannot_be_reached_is_one_line_without_the_secret(
    server: S3Server, data: Path, wrong: str
) -> None:
    environment = server.environment()
    bucket = BUCKET
    if wrong == "secret":
        environment["AWS_SECRET_ACCESS_KEY"] = "hushhushhush"
    elif wrong == "bucket":
        bucket = "nowhere"
    else:
        environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    write_params({**PARAMS, "storage": {"checkpoints": f"s3://{bucket}/x"}})
    before = {k: v for k, v in contents(data).items() if "live" not in k}
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", "tiny"],
        env={**child_environment(), **environment},
        capture_output=True, text=True, timeout=150, check=False,  # nobody tries for ever
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"s3://{bucket}/x" in lines[0]
    assert "Traceback" not in done.stderr
    for secret in (environment["AWS_SECRET_ACCESS_KEY"], server.secret):
        assert secret not in done.stdout + done.stderr
    after = {k: v for k, v in contents(data).items() if "live" not in k}
    assert after == before


def test_who_never_answers_is_one_line_after_the_last_attempt(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    silent = S3Server(tmp_path / "silent" / "buckets")  # not started
    at(silent.environment(), monkeypatch)
    write_params({**PARAMS, "storage": {"checkpoints": f"s3://{BUCKET}/x"}})
    with pytest.raises(GramError, match=f"s3://{BUCKET}/x") as caught:
        train_run(load_run("tiny"))
    assert "\n" not in str(caught.value)
    assert silent.secret not in str(caught.value)
    assert not Path("models/tiny/model.safetensors").exists()


@pytest.mark.s3
def test_no_secret_reaches_what_a_run_writes(s3: S3Server, data: Path) -> None:
    write_params({**PARAMS, "storage": {"trajectories": f"s3://{BUCKET}/quiet"}})
    train_run(load_run("tiny"))
    sample_run(load_run("tiny"))
    for path, content in contents(data).items():
        assert s3.secret.encode() not in content, path
        assert s3.key.encode() not in content, path


def test_a_half_written_checkpoint_in_s3_cannot_pass_for_whole() -> None:
    """The mark is written last, and the first thing to go."""
    order: list[str] = []

    class Recorded(ObjectStore):
        pass

    patch = pytest.MonkeyPatch()
    patch.setattr(storage, "write", lambda address, content: order.append(f"+{address}"))
    patch.setattr(storage, "remove", lambda address: order.append(f"-{address}"))
    patch.setattr(storage, "names", lambda address: ["step-0000001", "step-0000002"])
    try:
        Recorded("s3://bucket/run").write("step-0000002", FILES)
    finally:
        patch.undo()
    new, old = "s3://bucket/run/step-0000002", "s3://bucket/run/step-0000001"
    assert order == [
        f"-{new}/{META}", f"-{new}", f"+{new}/a.safetensors", f"+{new}/z.safetensors",
        f"+{new}/{META}", f"-{old}",
    ]  # fmt: skip


@pytest.mark.s3
def test_jobs_beside_each_other_leave_each_others_blocks_and_checkpoints(s3: S3Server) -> None:
    """Two experiments of one run, below one prefix."""
    place = StorageConfig(checkpoints=f"s3://{BUCKET}/many")
    jobs = [Job.of(run_of(params(runs__tiny__train__seed=seed), "tiny")) for seed in (0, 1)]
    stores = [checkpoint_store(job, place) for job in jobs]
    one, other = stores
    one.write("step-0000005", FILES)
    other.write("step-0000010", FILES)
    found = one.newest()
    assert found is not None and found.where.endswith("step-0000005")
    other.clear()
    assert one.newest() == found
    first, second = (BlockStore(f"s3://{BUCKET}/blocks/tiny", key) for key in ("a", "b"))
    name, content = packed(0, pa.table({"x": [1]}), {})
    for store in (first, second):
        store.put(name, content)
        store.add(name, {})
    second.clear()
    assert [t.to_pydict() for t in first.tables([Block(0, 0, 1, 0, 1)])] == [{"x": [1]}]


def test_a_body_that_is_cut_short_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import ClientPayloadError

    class Cut:
        def cat_file(self, address: str) -> bytes:
            raise ClientPayloadError("Response payload is not completed")

    monkeypatch.setattr(storage, "filesystem", Cut)
    with pytest.raises(StorageError, match=r"^s3://bucket/x: Response payload is not completed"):
        storage.read("s3://bucket/x")


def test_make_data_is_untouched_by_storage(folder: Path) -> None:
    write_params({**PARAMS, "storage": {"datasets": f"s3://{BUCKET}/x"}})
    make_data()
    assert Path("data/queens/train.parquet").is_file()


def test_a_store_that_refuses_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise StorageError(f"{address}: access refused")

    monkeypatch.setattr(storage, "names", refuse)
    with pytest.raises(CheckpointError, match="not read: s3://bucket/run: access refused"):
        ObjectStore("s3://bucket/run").newest()


def test_a_section_that_is_an_address_is_not_repeated(folder: Path) -> None:
    write_params({**PARAMS, "storage": "s3://KEY:HUSH@bucket/x"})
    with pytest.raises(GramError, match=r"storage: expected a mapping of settings, got a str$"):
        load_storage()


def test_an_endpoint_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "x")
    at({"AWS_ENDPOINT_URL": "localhost:9000", **keys}, monkeypatch)
    with pytest.raises(StorageError, match=r"^s3://bucket/x: Invalid endpoint: localhost:9000$"):
        storage.read("s3://bucket/x")


def test_what_this_machine_refuses_is_not_told_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"^here/x: Permission denied$"):
        storage.read("here/x")


def test_what_a_server_does_not_delete_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs does not look at the errors in the answer to a deletion of many."""

    class Keeping:
        def rm(self, address: str, *, recursive: bool) -> None:
            return

        def find(self, address: str) -> list[str]:
            return [f"{address}/one"]

    monkeypatch.setattr(storage, "filesystem", Keeping)
    with pytest.raises(StorageError, match=r"^s3://bucket/x: access refused"):
        storage.remove("s3://bucket/x")


def test_a_bucket_of_which_a_prefix_alone_may_be_listed_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Prefix:
        def ls(self, address: str, *, detail: bool) -> list[str]:
            raise FileNotFoundError(address)

        def call_s3(self, method: str, **settings: Any) -> None:
            asked.append((method, settings["Bucket"], settings["Prefix"]))

        def exists(self, address: str) -> bool:
            return False  # as s3fs says where the bucket itself may not be asked for

    monkeypatch.setattr(storage, "filesystem", Prefix)
    assert storage.names("s3://bucket/mine/x") == []
    assert asked == [("list_objects_v2", "bucket", "mine/x")]
