"""Training through the pipeline: both engines, a killed run, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from workspace import (
    child_environment,
    contents,
    copy_to_work_in,
    make_data,
    params,
    trained,
    write_params,
)

from gram_core.errors import GramError
from pipelines.dataset import examples
from pipelines.deepspeed_config import deepspeed_config
from pipelines.params import load_run
from pipelines.provenance import computer
from pipelines.runtime import device_name, threads
from pipelines.train import Job, build_module, fingerprint, train_run


def kill_after_first_checkpoint(name: str) -> None:
    """Start the stage in a process group of its own and kill it whole, mid-run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train", name],
        env=child_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = Path(".gram/checkpoints", name)
    for _ in range(6000):  # five minutes: Ray begins slowly beside other tests
        if list(folder.glob("step-*")) or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Ray's workers have a group of their own and end once they miss their node.
    seen: list[Path] = []
    while (now := sorted(folder.glob("*"))) != seen:
        seen = now
        time.sleep(2)


def test_run_leaves_the_contracts_files(whole: Path) -> None:
    folder = whole / "models/tiny"
    history = pl.read_csv(folder / "history.csv")
    assert history["step"].to_list() == [2, 4, 6, 8, 10, 12]
    config = json.loads((folder / "config.json").read_text())
    assert config["task"]["kind"] == "nqueens"
    made = config["provenance"]
    assert made["threads"] == threads()
    assert made["workers"] == [computer(threads())]
    assert made["workers"][0]["device"].startswith(device_name())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 12
    assert (folder / "live/plots/metrics/reconstruction.tsv").is_file()
    assert not (whole / ".gram/checkpoints/tiny").exists()


# After the first of its few checkpoints, most of the run is to come.
LONG = {
    "runs__tiny__train__steps": 300,
    "runs__tiny__train__log_every": 50,
    "runs__tiny__train__checkpoint_every": 100,
}


def engines(*marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Once with a run of each engine; the one on Ray has these marks, too."""
    both = ["plain", pytest.param("deepspeed", marks=[pytest.mark.ray, *marks])]
    return pytest.mark.parametrize("killed", both, indirect=True)


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose run was killed between two checkpoints; tests do not write to it."""
    path = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_params(params(runs__tiny__train__engine=request.param, **LONG))
        make_data()
        kill_after_first_checkpoint("tiny")
    assert list((path / ".gram/checkpoints/tiny").glob("step-*"))
    assert not list((path / "models/tiny").glob("*.json"))
    return path


@pytest.fixture
def broken(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `killed` to work in."""
    return copy_to_work_in(killed, tmp_path / "broken", monkeypatch)


@engines(pytest.mark.slow)
def test_killed_run_ends_as_an_unbroken_one(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(load_run("tiny"))
    found = trained()
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    monkeypatch.chdir(unbroken)
    shutil.copy(broken / "params.yaml", unbroken)
    make_data()
    train_run(load_run("tiny"))
    assert found == trained()


@engines()
def test_damaged_checkpoint_is_named(broken: Path) -> None:
    (newest,) = sorted(Path(".gram/checkpoints/tiny").glob("step-*"))[-1:]
    path = newest / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(GramError, match="damaged checkpoint") as caught:
        train_run(load_run("tiny"))
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("models/tiny/model.safetensors").exists()


@pytest.mark.ray
def test_deepspeed_and_plain_engines_agree(data: Path) -> None:
    train_run(load_run("tiny"))
    plain = pl.read_csv("models/tiny/history.csv")
    write_params(params(runs__tiny__train__engine="deepspeed"))
    train_run(load_run("tiny"))
    deepspeed = pl.read_csv("models/tiny/history.csv")
    made = json.loads(Path("models/tiny/config.json").read_text())["provenance"]
    assert made["workers"] == [computer(threads())], "one worker has every core"
    # The same operations in the same order, but for the place where gradients are clipped.
    for name in ("reconstruction", "kl", "prior_reconstruction"):
        assert plain[name].to_list() == pytest.approx(deepspeed[name].to_list(), rel=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_cannot_begin_are_not_tried_for_ever(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's actor has every core."""
    import ray

    from pipelines import train
    from pipelines.cluster import cluster

    monkeypatch.setattr(train, "BEGINNINGS", 2)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    write_params(params(runs__tiny__train__engine="deepspeed"))
    with cluster(1):

        @ray.remote(num_cpus=1)
        class Holder:
            def held(self) -> bool:
                return True

        holder = Holder.remote()
        assert ray.get(holder.held.remote())
        with pytest.raises(GramError, match=r"train tiny: no worker could begin: .*timed out"):
            train_run(load_run("tiny"))


def test_damaged_training_table_is_named(whole: Path) -> None:
    path = whole / "data/queens/train.parquet"
    path.write_bytes(path.read_bytes()[:200])
    before = contents(whole / "models")
    with pytest.raises(GramError, match=r"train\.parquet: not a readable Parquet file") as caught:
        train_run(load_run("tiny"))
    assert "\n" not in str(caught.value)
    after = contents(whole / "models")
    assert {k: v for k, v in after.items() if "live" not in k} == {
        k: v for k, v in before.items() if "live" not in k
    }


def test_a_stage_fails_with_one_line(data: Path) -> None:
    write_params(params(runs__tiny__train__steps=0))
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", "tiny"],
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: params.yaml: runs.tiny.train.steps: Expected `int` >= 1"
    ]


def test_deepspeed_config_follows_the_settings(folder: Path) -> None:
    write_params(
        params(
            runs__tiny__train__engine="deepspeed",
            runs__tiny__train__workers=2,
            runs__tiny__train__accumulate=2,
            runs__tiny__train__prior_slots=0.5,
            runs__tiny__train__zero_stage=2,
            runs__tiny__train__optim__clip=0.5,
        )
    )
    config = deepspeed_config(Job.of(load_run("tiny")).train, "bf16")
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"stage": 2}
    assert config["torch_autocast"]["enabled"]
    assert not deepspeed_config(Job.of(load_run("tiny")).train, "fp32")["torch_autocast"]["enabled"]


def test_a_seed_decides_the_first_weights(data: Path) -> None:
    def first(seed: int) -> dict[str, object]:
        write_params(params(runs__tiny__train__seed=seed))
        state = build_module(Job.of(load_run("tiny")), "cpu").state_dict()
        return {name: tensor.tolist() for name, tensor in state.items()}

    one, other = first(0), first(1)
    assert first(0) == one
    assert one["model.z0_h"] != other["model.z0_h"]


def test_who_does_the_work_is_no_part_of_what_a_checkpoint_is_of(data: Path) -> None:
    """So a run that was cut off goes on with other workers, and not with other settings."""

    def key(**train: object) -> str:
        changes = {f"runs__tiny__train__{name}": value for name, value in train.items()}
        write_params(params(**changes))
        run = load_run("tiny")
        return fingerprint(Job.of(run), examples(run.task_name, run.task, "train"))

    one = key()
    spread = {"workers": 2, "accumulate": 2, "zero_stage": 1, "cores": 1, "restarts": 0}
    assert key(engine="deepspeed", prior_slots=0.5, **spread) == key(prior_slots=0.5) != one
    for other in ({"seed": 1}, {"steps": 16}, {"ema": 0.8}, {"batch": 16}):
        assert key(**other) != one
