"""What really happens: killed workers, full disks, files from an untrusted place, a large table."""

import io
import json
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pytest
from workspace import (
    child_environment,
    contents,
    make_data,
    may_mount,
    params,
    trained,
    write_params,
)

from gram_core import tables
from gram_core.errors import GramError
from gram_core.sample.trajectory import SampleConfig
from gram_core.train.checkpoint import FolderStore
from pipelines.blocks import cut
from pipelines.dataset import held_out
from pipelines.evaluate import evaluate
from pipelines.params import load_run
from pipelines.sample import sample_run
from pipelines.storage import StorageConfig
from pipelines.train import train_run

TABLE = Path("results/tiny/trajectories.parquet")


@contextmanager
def killing(names: str, times: int, ready: Callable[[], bool]) -> Iterator[list[int]]:
    """In the block, kill processes of that name that this one started, with SIGKILL, so many of
    them, each when `ready` says so; gives the list of those killed."""
    killed: list[int] = []
    over = threading.Event()

    def loop() -> None:
        while not over.is_set() and len(killed) < times:
            time.sleep(0.3)
            if not ready():
                continue
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    line = " ".join(process.cmdline())
                    if line.startswith(names) and process.pid not in killed:
                        # In the middle of its work, not as it starts.
                        time.sleep(0.7)
                        process.kill()
                        killed.append(process.pid)
                        break

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.ray
@pytest.mark.slow
def test_sampling_survives_five_killed_workers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sample.LONG", 0.0)  # the dying tell of their blocks, too
    changes = {
        "runs__tiny__model__dim": 32,
        "runs__tiny__model__ffn": 64,
        "runs__tiny__model__K": 30,  # seconds of work, that five are killed before it is done
        "runs__tiny__sample__width": 30,
        "runs__tiny__sample__depth": 10,
        "runs__tiny__sample__depths": [1],
        "runs__tiny__sample__halting": False,
        "runs__tiny__sample__batch": 120,
        "runs__tiny__evaluate__widths": [1],
    }
    write_params(params(**changes))
    train_run(load_run("tiny"))
    sample_run(load_run("tiny"))
    calm = tables.read(TABLE, "trajectories")
    write_params(params(**changes, runs__tiny__sample__concurrency=2))
    with killing("ray::MapWorker(MapBatches(Sampler)).submit", 5, lambda: True) as killed:
        sample_run(load_run("tiny"))
    assert len(killed) == 5
    rough = tables.read(TABLE, "trajectories")
    here, there = (pl.from_arrow(table) for table in (calm, rough))
    assert isinstance(here, pl.DataFrame) and isinstance(there, pl.DataFrame)
    assert there.drop("value").equals(here.drop("value"))
    assert there["value"].to_list() == pytest.approx(here["value"].to_list(), abs=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_block_that_always_kills_its_worker_ends_with_one_line(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that needs more memory than there is."""
    from pipelines import sample

    monkeypatch.setattr(sample, "RETRIES", 2)
    # Blocks that take seconds: it is killed in its first, wherever that begins.
    changes = {
        "runs__tiny__sample__width": 3000,
        "runs__tiny__sample__batch": 9000,
        "runs__tiny__sample__concurrency": 1,
        "runs__tiny__sample__compile": False,
    }
    write_params(params(**changes))
    with (
        killing("ray::MapWorker(MapBatches(Sampler)).submit", 100, lambda: True) as killed,
        pytest.raises(GramError, match="the workers of a block died 3 times") as error,
    ):
        sample_run(load_run("tiny"))
    assert len(killed) >= 3
    assert "\n" not in str(error.value)


def test_a_killed_sampling_run_keeps_the_blocks_it_had(whole: Path) -> None:
    write_params(params(runs__tiny__sample__width=40, runs__tiny__sample__depth=12))
    sample_run(load_run("tiny"))
    calm = pl.read_parquet(TABLE)
    TABLE.unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.sample", "tiny"],
        env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = Path(".gram/samples/tiny")
    while not list(folder.rglob("block-*.parquet")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not TABLE.exists()
    kept = {int(path.name[6:12]) for path in folder.rglob("block-*.parquet")}
    done = subprocess.run(
        [sys.executable, "-m", "stages.sample", "tiny"],
        env=child_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    run = load_run("tiny")
    puzzles, _ = held_out(run.task_name, run.task, [])
    blocks = cut(len(puzzles.ids), run.section("sample", SampleConfig))
    found = sum(block.trajectories for block in blocks if block.number in kept)
    assert 0 < found < 40 * len(puzzles.ids)
    assert f"{found:,} of {40 * len(puzzles.ids):,} trajectories found finished" in done.stderr
    assert pl.read_parquet(TABLE).equals(calm)
    assert not folder.exists()


def test_a_damaged_block_is_not_taken(whole: Path) -> None:
    from pipelines import sample
    from pipelines.storage import StorageError

    patch = pytest.MonkeyPatch()
    patch.setattr(sample.tables, "write_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    calm = TABLE.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        sample_run(load_run("tiny"))
    patch.undo()
    block = min(Path(".gram/samples/tiny").rglob("block-*.parquet"))
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(StorageError, match="does not match its checksum; it was removed"):
        sample_run(load_run("tiny"))
    assert pl.read_parquet(TABLE).equals(pl.read_parquet(io.BytesIO(calm)))
    sample_run(load_run("tiny"))
    assert pl.read_parquet(TABLE).equals(pl.read_parquet(io.BytesIO(calm)))


@pytest.mark.ray
@pytest.mark.slow
def test_training_goes_on_after_a_killed_worker(data: Path, capfd: pytest.CaptureFixture) -> None:
    write_params(params(runs__tiny__train__engine="deepspeed", runs__tiny__train__steps=800))
    train_run(load_run("tiny"))
    calm = trained()
    folder = Path(".gram/checkpoints/tiny")
    with killing("ray::RayTrainWorker", 1, lambda: bool(list(folder.glob("step-*")))) as killed:
        train_run(load_run("tiny"))
    assert len(killed) == 1
    assert trained() == calm
    said = capfd.readouterr().err
    assert "a worker died; all go on from the newest checkpoint (restart 1 of 3)" in said
    history = pl.read_csv("models/tiny/live/plots/metrics/reconstruction.tsv", separator="\t")
    assert history["step"].is_unique().all(), "no row is told twice"


class Starts:
    """Ray Train's trainer, of which a machine is taken away twice; then it is done."""

    taken = 2
    settings: ClassVar[list[Any]] = []

    def __init__(self, worker: Any, **settings: Any) -> None:
        self.settings.append(settings)

    def fit(self) -> Any:
        from ray.train import PreemptionError, PreemptionInfo

        if len(self.settings) <= self.taken:
            raise PreemptionError(PreemptionInfo(0, {}))
        return SimpleNamespace(return_value="trained")


@pytest.mark.parametrize(("restarts", "ends"), [(2, "trained"), (1, "a worker died, after 1")])
def test_a_machine_that_is_taken_away_is_a_death_that_ray_leaves_to_us(
    data: Path, monkeypatch: pytest.MonkeyPatch, restarts: int, ends: str
) -> None:
    """Ray Train by itself would start workers again with what was found before their first start,
    as often as it happens, and what was saved since would give way."""
    from pipelines import cluster, train, trainer

    write_params(
        params(runs__tiny__train__engine="deepspeed", runs__tiny__train__restarts=restarts)
    )
    monkeypatch.setattr(cluster, "cluster", nullcontext)
    monkeypatch.setattr(cluster, "has_gpus", lambda: False)
    monkeypatch.setattr(cluster, "worker_cores", lambda *_, **__: 1)
    monkeypatch.setattr(cluster, "Board", lambda: SimpleNamespace(listening=nullcontext))
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr(trainer, "Trainer", Starts)
    monkeypatch.setattr(Starts, "settings", [])
    job, place = train.job_of(load_run("tiny"), ()), StorageConfig()
    if ends == "trained":
        assert train.train_on_ray(job, place, lambda row: None) == "trained"
    else:
        with pytest.raises(GramError, match=ends):
            train.train_on_ray(job, place, lambda row: None)
    assert len(Starts.settings) == restarts + 1
    for settings in Starts.settings:
        failures = settings["run_config"].failure_config
        assert (failures.max_failures, failures.max_preemption_failures) == (0, 0)


def test_more_workers_than_gpus_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train would wait twenty minutes for them."""
    from pipelines import cluster, train

    few = {"engine": "deepspeed", "workers": 2, "batch": 16}
    write_params(params(**{f"runs__tiny__train__{key}": value for key, value in few.items()}))
    monkeypatch.setattr(cluster, "cluster", nullcontext)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    job = train.job_of(load_run("tiny"), ())
    with pytest.raises(GramError, match="2 workers of 1 GPUs do not fit on this machine"):
        train.train_on_ray(job, StorageConfig(), lambda row: None)


SURVIVOR = """
import os, sys, torch
from pipelines.train import _is_death
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank,
                                     world_size=2)
torch.distributed.barrier()
if rank == 1:
    os.kill(os.getpid(), 9)
try:
    for _ in range(1000):
        torch.distributed.all_reduce(torch.ones(1000))
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(0 if _is_death(error) and not _is_death(RuntimeError("of its own")) else 1)
"""


def test_what_a_survivor_says_is_the_other_workers_death(tmp_path: Path) -> None:
    """Where its error comes before Ray has missed the dead worker, the run must go on too."""
    survivor, dead = (
        subprocess.Popen(
            [sys.executable, "-c", SURVIVOR, str(rank), str(tmp_path / "meeting")],
            env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    )  # fmt: skip
    said, _ = survivor.communicate(timeout=60)
    assert dead.wait(timeout=60) == -signal.SIGKILL
    assert survivor.returncode == 0, said


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_workers_keep_dying_ends_with_one_line(data: Path) -> None:
    changes = {"engine": "deepspeed", "steps": 20000, "restarts": 0}
    write_params(params(**{f"runs__tiny__train__{k}": v for k, v in changes.items()}))
    folder = Path(".gram/checkpoints/tiny")
    ready = lambda: bool(list(folder.glob("step-*")))  # noqa: E731
    with (
        killing("ray::RayTrainWorker", 1, ready),
        pytest.raises(GramError, match="a worker died, after 0 restarts"),
    ):
        train_run(load_run("tiny"))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many bytes at the folder; gives the way to make it larger."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield lambda more: subprocess.run(
            ["mount", "-o", f"remount,size={more}", folder], check=True
        ) and None  # fmt: skip
    finally:
        subprocess.run(["umount", folder], check=True)


def failing(stage: str, name: str) -> subprocess.CompletedProcess[str]:
    """A stage that ends with exit code 1 and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", name],
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.skipif(not may_mount(), reason="this process may not mount a disk of its own")
@pytest.mark.parametrize(
    "engine", ["plain", pytest.param("deepspeed", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    data: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"engine": engine, "steps": 40, "checkpoint_every": 10}
    write_params(params(**{f"runs__tiny__train__{k}": v for k, v in changes.items()}))
    sizes: list[int] = []
    write = FolderStore.write

    def measured(self: FolderStore, name: str, files: Mapping[str, bytes]) -> None:
        sizes.append(sum(len(content) for content in files.values()))
        write(self, name, files)

    monkeypatch.setattr(FolderStore, "write", measured)
    train_run(load_run("tiny"))
    monkeypatch.undo()
    monkeypatch.chdir(data)
    calm = trained()
    for path in Path("models/tiny").glob("*.*"):
        path.unlink()
    shutil.rmtree(".gram", ignore_errors=True)
    # One checkpoint fits, a second beside it does not.
    with small_disk(Path(".gram/checkpoints").absolute(), int(1.6 * max(sizes))) as grow:
        done = failing("train", "tiny")
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "step-0000020: checkpoint not written: " in lines[0]
        assert "No space left on device" in lines[0]
        assert not Path("models/tiny/model.safetensors").exists()
        assert [p.name for p in Path(".gram/checkpoints/tiny").iterdir()] == ["step-0000010"]
        grow(64 << 20)
        train_run(load_run("tiny"))
    assert trained() == calm


@pytest.mark.skipif(not may_mount(), reason="this process may not mount a disk of its own")
@pytest.mark.parametrize(
    "engine", ["plain", pytest.param("deepspeed", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_a_disk_full_of_logged_rows_is_one_line(data: Path, engine: str) -> None:
    """Rows are written more often than checkpoints, and to another place."""
    write_params(params(runs__tiny__train__engine=engine))
    with small_disk(Path("models").absolute(), 10 * 4096):  # ten files at most
        done = failing("train", "tiny")
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert lines == ["error: models/tiny/live: not written: No space left on device"]
        assert not Path("models/tiny/model.safetensors").exists()


@pytest.mark.skipif(not may_mount(), reason="this process may not mount a disk of its own")
def test_a_disk_full_of_tables_is_one_line(folder: Path) -> None:
    write_params(params())
    with small_disk(Path("data").absolute(), 4096):
        done = failing("generate", "queens")
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and "No space left on device" in last
        assert not list(Path("data").rglob("*.parquet"))


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def huge_header() -> bytes:
    """A safetensors file that claims a header of 2^60 bytes."""
    return struct.pack("<Q", 1 << 60) + b"{}"


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), huge_header(), b""])
def test_a_model_from_an_untrusted_place_is_refused(whole: Path, content: bytes) -> None:
    import hashlib

    path = Path("models/tiny/model.safetensors")
    path.write_bytes(content)
    about = json.loads(Path("models/tiny/config.json").read_text())
    about["sha256"] = hashlib.sha256(content).hexdigest()
    Path("models/tiny/config.json").write_text(json.dumps(about))
    with pytest.raises(GramError, match=r"model\.safetensors: not weights") as caught:
        sample_run(load_run("tiny"))
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), huge_header()])
@pytest.mark.parametrize("part", ["weights", "optimizer", "slots", "ema"])
def test_a_checkpoint_from_an_untrusted_place_is_refused(
    data: Path, content: bytes, part: str
) -> None:
    import hashlib

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr("pipelines.train.averaged", stop)
    with pytest.raises(KeyboardInterrupt):
        train_run(load_run("tiny"))
    patch.undo()
    (folder,) = Path(".gram/checkpoints/tiny").glob("step-*")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / f"{part}.safetensors").write_bytes(content)
    # Whoever can write the file can write its checksum too.
    meta["sha256"][f"{part}.safetensors"] = hashlib.sha256(content).hexdigest()
    del meta["own"]
    meta["own"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    # A torch file beside them is no part of a checkpoint and is never opened.
    (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GramError, match="damaged checkpoint") as caught:
        train_run(load_run("tiny"))
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_yaml_that_makes_objects_is_refused(folder: Path) -> None:
    for text in (
        "tasks: !!python/object/apply:pathlib.Path.touch [exploded]\nruns: {}\n",
        "tasks: {a: !evil {}}\nruns: {a: {task: a}}\n",
        "tasks: {a: !!set {b, c}}\nruns: {a: {task: a}}\n",
        "tasks: {a: {kind: !!str nqueens}}\nruns: {a: {task: a}}\n",
        "tasks: {a: !!int x}\nruns: {a: {task: a}}\n",
    ):
        Path("params.yaml").write_text(text)
        with pytest.raises(
            GramError, match=r"^params\.yaml, line 1: not valid YAML: tag .*not"
        ) as caught:
            load_run("a")
        assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "text",
    ["tasks: 2024-13-45\n", f"tasks: {'9' * 5000}\n"],
    ids=["no date", "a long number"],
)
def test_yaml_that_its_reader_fails_on_is_one_line(folder: Path, text: str) -> None:
    Path("params.yaml").write_text(text)
    with pytest.raises(GramError, match=r"^params\.yaml.*: not valid YAML: ") as caught:
        load_run("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("levels", "words"),
    [(50, "section 'tasks' must be a mapping"), (51, "more than 50 levels"), (5000, "levels")],
)
def test_a_nest_is_read_to_a_depth_and_no_further(folder: Path, levels: int, words: str) -> None:
    brackets = levels - 1  # below the file's own mapping
    Path("params.yaml").write_text(f"tasks: {'[' * brackets}{']' * brackets}\nruns: {{}}\n")
    with pytest.raises(GramError, match=words) as caught:
        load_run("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "a\nb", ""])
def test_names_that_leave_the_project_are_refused(folder: Path, name: str) -> None:
    before = contents(folder.parent)
    for section in ("runs", "tasks", "sweeps"):
        document = params()
        document.setdefault(section, {})[name] = {"task": "queens"}
        write_params(document)
        before = contents(folder.parent)
        with pytest.raises(GramError, match="cannot be a name"):
            load_run("tiny")
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", name],
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert contents(folder.parent) == before


@pytest.mark.parametrize("kind", ["pickle", "random", "nested"])
def test_a_table_from_an_untrusted_place_is_refused(whole: Path, kind: str) -> None:
    if kind == "pickle":
        TABLE.write_bytes(pickle.dumps(Bomb()))
    elif kind == "random":
        TABLE.write_bytes(b"PAR1" + np.random.default_rng(0).bytes(5000) + b"PAR1")
    else:
        import pyarrow.parquet as pq

        metadata = {"gram.table": "trajectories", "gram.version": tables.VERSION}
        odd = pa.table({"puzzle_id": [[{"deep": [1]}]]}).replace_schema_metadata(metadata)
        pq.write_table(odd, TABLE)
    with pytest.raises(GramError, match=r"trajectories\.parquet: ") as caught:
        evaluate(load_run("tiny"))
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


ROWS = 1_000_000


@pytest.mark.slow
def test_a_million_rows_are_evaluated_in_two_gigabytes(whole: Path) -> None:
    """Every test puzzle of 10x10 queens, drawn often enough."""
    changes = {
        "tasks__queens__size": 8,
        "tasks__queens__remove": [5, 6, 7],
        "tasks__queens__split__test": 0.15,
        "runs__tiny__sample__depth": 1,
        "runs__tiny__sample__depths": [],
    }
    write_params(params(**changes))
    make_data()
    puzzles = pl.read_parquet("data/queens/test.parquet")["puzzle_id"].unique(maintain_order=True)
    width = -(-ROWS // len(puzzles))
    write_params(
        params(
            **changes,
            runs__tiny__sample__width=width,
            runs__tiny__evaluate__widths=[1, 20, width],
        )
    )
    train_run(load_run("tiny"))
    generator = np.random.default_rng(0)
    answers = pl.read_parquet("data/queens/test.parquet")["target"].to_list()
    answer = np.array(answers, dtype=np.uint8)

    def parts() -> Iterator[pa.Table]:
        for puzzle_id in puzzles:
            chosen = answer[generator.integers(0, len(answer), width)]
            yield pa.table(
                {
                    "puzzle_id": [puzzle_id] * width,
                    "trajectory": np.arange(width),
                    "depth": np.ones(width, int),
                    "seed": np.zeros(width, int),
                    "steps": np.ones(width, int),
                    "halted": np.zeros(width, bool),
                    "value": generator.random(width),
                    "prediction": tables.tokens_array(chosen),
                    "valid": generator.random(width) < 0.5,
                    "exact": np.zeros(width, bool),
                }
            )

    rows = tables.write_parts(TABLE, parts(), tables.trajectories_schema(64), {})
    assert rows >= ROWS
    code = (
        "import resource, time\n"
        "from pipelines.evaluate import evaluate\n"
        "from pipelines.params import load_run\n"
        "start = time.monotonic()\n"
        "found = evaluate(load_run('tiny'))\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(round(time.monotonic() - start, 1), peak, len(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, peak, count = done.stdout.split()
    print(f"{rows:,} rows: {seconds} s, {int(peak) / 1024**2:.2f} GiB at most")
    assert int(peak) * 1024 < 2_000_000_000
    assert int(count) > 20
