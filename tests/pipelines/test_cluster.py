"""Ray: a cluster of two nodes, one of which sees nothing of the driver's disk; and loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import ray
from nodes import environment_at, two_nodes
from s3 import S3Server
from workspace import child_environment, make_data, may_mount, params, write_params

from gram_core.errors import GramError
from pipelines.cluster import Board, carry_own_modules, check_gpus, cluster, worker_cores
from pipelines.runtime import local

pytestmark = pytest.mark.ray
TUNED = {
    "lr": {
        "run": "tiny",
        "space": {"train.optim.lr": {"loguniform": [1e-3, 1e-2]}},
        "trials": 2,
        "storage": "s3://sweeps/here",
    }
}


def gram(command: list[str], environment: dict[str, str]) -> None:
    """Run a program of the pipeline as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("objects") / "buckets") as server:
        for name in ("sweeps", "place"):
            server.bucket(name)
        yield server


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="no mount namespaces here")
def test_two_nodes_train_sample_and_sweep_without_the_drivers_disk(
    folder: Path, store: S3Server
) -> None:
    document = params(
        runs__tiny__train__engine="deepspeed",
        runs__tiny__train__workers=2,
        runs__tiny__train__prior_slots=0.25,
        runs__tiny__train__cores=1,
        runs__tiny__sample__concurrency=2,
        runs__tiny__sample__cores=1,
        runs__tiny__sample__width=20,
    )
    document["sweeps"] = TUNED
    write_params(document)
    make_data()
    here = child_environment()
    gram(["stages.train", "tiny"], here)
    gram(["stages.sample", "tiny"], here)
    curve = pl.read_csv("models/tiny/history.csv")
    rows = pl.read_parquet("results/tiny/trajectories.parquet")
    for path in (*Path("models/tiny").glob("*.*"), Path("results/tiny/trajectories.parquet")):
        path.unlink()
    with two_nodes([folder], store.environment()) as address:
        there = environment_at(address, store.environment())
        gram(["stages.train", "tiny"], there)
        gram(["stages.sample", "tiny"], there)
        gram(["stages.sweep", "lr"], there)
    again = pl.read_csv("models/tiny/history.csv")
    for name in ("reconstruction", "kl"):
        assert again[name].to_list() == pytest.approx(curve[name].to_list(), rel=1e-4)
    sampled = pl.read_parquet("results/tiny/trajectories.parquet")
    keys = ["puzzle_id", "trajectory", "depth"]
    assert sampled.select(keys).equals(rows.select(keys))
    same = (sampled["prediction"] == rows["prediction"]).mean()
    assert same is not None and same > 0.99
    trials = pl.read_parquet("results/sweeps/lr/trials.parquet")
    assert trials.group_by("trial").agg(pl.len())["len"].to_list() == [6, 6]


def test_a_local_ray_listens_on_loopback_alone_and_has_no_process_that_nobody_asks() -> None:
    code = (
        "import psutil, os, ray\n"
        "from pipelines.cluster import Board, cluster\n"
        "with cluster():\n"
        "    board = Board()\n"
        "    board.post(1)\n"
        "    me = psutil.Process()\n"
        "    pids = {p.pid for p in (me, *me.children(recursive=True))}\n"
        "    session = ray._private.worker._global_node.get_session_dir_path()\n"
        "    for p in psutil.process_iter():\n"
        "        try:\n"
        "            if session in ' '.join(p.cmdline()):\n"
        "                pids |= {p.pid, *(c.pid for c in p.children(recursive=True))}\n"
        "        except psutil.Error:\n"
        "            pass\n"
        "    found = [c for c in psutil.net_connections('inet')"
        " if c.status == 'LISTEN' and c.pid in pids]\n"
        "    print(len(found), *sorted({c.laddr.ip for c in found}))\n"
        "    commands = [' '.join(psutil.Process(pid).cmdline()) for pid in pids - {me.pid}]\n"
        "    print(*commands, sep='\\n')\n"
    )
    environment = {k: v for k, v in child_environment().items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, *commands = done.stdout.splitlines()
    count, *addresses = first.split()
    assert int(count) >= 5
    assert set(addresses) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    for needed in ("/gcs_server ", "/raylet ", "ray::_Desk"):
        assert any(needed in command for command in commands), commands
    for idle in ("monitor.py", "dashboard.py"):
        assert not any(idle in command for command in commands), commands


def test_what_a_local_ray_is_told_ray_train_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal import constants

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR, "7")
    monkeypatch.delenv(constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR, raising=False)
    assert local()[constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR] == "7"  # the user's own
    assert local()[constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert local()
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert local() == {}


def test_training_has_the_callbacks_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train import ScalingConfig

    from pipelines.trainer import Trainer

    trainer = Trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    found = {}
    for name in ("cluster", "local"):
        monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
        if name == "local":
            monkeypatch.delenv("RAY_ADDRESS")
        found[name] = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert found["cluster"] - found["local"] == {"PlacementGroupCleanerCallback"}
    assert "DatasetsCallback" not in found["cluster"], "no run reads one of Ray Data's"


def test_training_asks_nobody_for_nodes_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    from pipelines.trainer import AsItIs, Trainer

    given: list[object] = []
    monkeypatch.setattr(
        TorchTrainer, "_initialize_and_run_controller", lambda self, **named: given.append(named)
    )
    wanted = {"scaling_policy": "Ray's own"}
    for address in ("somewhere:6379", ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        trainer = Trainer(lambda: None, scaling_config=ScalingConfig(num_workers=2))
        trainer._initialize_and_run_controller(**wanted)
    on_cluster, here = given
    assert on_cluster == wanted
    assert isinstance(here, dict)
    policy = here["scaling_policy"]
    assert isinstance(policy, AsItIs)
    policy.after_controller_start(None)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    assert policy._coordinator_client is None
    assert vars(AsItIs).keys() & vars(FixedScalingPolicy.__mro__[1]).keys() >= {
        "after_controller_start", "_maybe_send_resource_request",
    }, "what stands in has a name that Ray calls"  # fmt: skip


def test_a_cluster_that_is_not_there_is_one_line(data: Path) -> None:
    write_params(params(runs__tiny__train__engine="deepspeed"))
    environment = {**child_environment(), "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", "tiny"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "no Ray cluster answers at 127.0.0.1:9" in lines[0]
    assert "Traceback" not in done.stderr


def test_a_cluster_that_wants_a_token_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**settings: Any) -> None:
        raise ray.exceptions.AuthenticationError("no token")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(GramError) as caught, cluster():
        pass
    assert str(caught.value).startswith("cannot start the Ray cluster at auto: no token")


def test_board_carries_messages_questions_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from gram_core.errors import GramError

    heard: list[object] = []

    def receive(message: object) -> object:
        heard.append(message)
        if message == "wrong":
            raise GramError("no such thing")
        return f"{message}!"

    @ray.remote
    def worker(board: Board) -> list[str]:
        board.post("hello")
        said = [board.ask("how are you")]
        try:
            board.ask("wrong")
        except GramError as error:
            said.append(str(error))
        return said

    with cluster(cpus=2):
        board = Board()
        with board.listening(receive):
            assert ray.get(worker.remote(board)) == ["how are you!", "no such thing"]
        assert heard == ["hello", "how are you", "wrong"]
        assert worker_cores(2, None) == 1
        assert worker_cores(1, None) == 2
        with pytest.raises(GramError, match="3 workers of 1 CPU cores do not fit on this machine"):
            worker_cores(3, 1)
        check_gpus(4, 0)
        with pytest.raises(GramError, match=r"1 workers of 0\.5 GPUs do not fit on this machine"):
            check_gpus(1, 0.5)
        monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
        check_gpus(1, 1)  # a cluster may grow
    assert not [p for p in psutil.Process(os.getpid()).children() if "raylet" in p.name()]


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "cores"),
    [
        ([(8, 0), (64, 8)], 8, 1, 8),
        ([(32, 0), (8, 1), (8, 1)], 1, 1, 8),
        ([(32, 0), (8, 1), (8, 1)], 2, 1, 8),
        ([(64, 8), (64, 8)], 3, 1, 32),
        ([(48, 4), (64, 8)], 12, 1, 8),
        ([(64, 8)], 16, 0.5, 4),
        ([(8, 0), (8, 0)], 3, 0, 4),
        ([(64, 0)], 3, 0, 21),
        # Room for the least alone.
        ([(64, 0), (8, 1)], (1, 8), 1, 8),
        ([(64, 0), (8, 1), (8, 1)], (2, 3), 1, 8),
        ([(2, 0)], (1, 4), 0, 1),
        # No part of a GPU is put together with another's.
        ([(12, 2)], 3, 0.6, 4),
        ([(12, 2)], (2, 3), 0.6, 6),
        ([(12, 1)], 10, 0.1, 1),
        # Nowhere: an equal share, for a cluster that grows.
        ([(8, 0), (8, 0)], 4, 1, 4),
        ([(2, 0)], 4, 0, 1),
    ],
)
def test_a_worker_has_the_most_cores_with_which_all_have_a_place(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[tuple[int, int]],
    workers: int | tuple[int, int],
    gpus: float,
    cores: int,
) -> None:
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    alive = [
        {"Alive": True, "Resources": {"CPU": float(c), **({"GPU": float(g)} if g else {})}}
        for c, g in nodes
    ]
    gone = {"Alive": False, "Resources": {"CPU": 500.0, "GPU": 50.0}}
    monkeypatch.setattr("ray.nodes", lambda: [*alive, gone])
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert worker_cores(most, None, least, gpus) == cores


def test_modules_of_the_user_s_travel_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of a `table` task lies beside params.yaml, which no machine of a cluster sees."""
    import importlib

    import ray

    (tmp_path / "own_rule.py").write_text("def valid(x):\n    return helper(x)\n\n\n"
                                          "def helper(x):\n    return x + 1\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = importlib.import_module("own_rule")
    carry_own_modules()
    try:
        content = ray.cloudpickle.dumps(rule.valid)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(rule)
    code = "import sys, pickle; print(pickle.loads(sys.stdin.buffer.read())(41))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=content, cwd="/", capture_output=True, check=False
    )
    assert done.stdout == b"42\n", done.stderr.decode()[-500:]
    # The project's own code goes another way, and libraries are there.
    assert len(ray.cloudpickle.dumps(Board)) < 200
