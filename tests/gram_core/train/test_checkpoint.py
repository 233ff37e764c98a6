import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gram_core.train.checkpoint import (
    VERSION,
    CheckpointError,
    Checkpoints,
    FolderStore,
    Progress,
)
from gram_core.train.ema import EMA
from gram_core.train.loop import TrainingError
from gram_core.train.optim import OptimConfig


def assert_same_end(run, other) -> None:
    """Weights, averages, optimiser and history agree bit for bit."""
    ours, theirs = run.engine.model.state_dict(), other.engine.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(map(torch.equal, run.ema.average, other.ema.average))
    assert run.ema.steps == other.ema.steps
    moments = [one.engine.optimizer.state_dict()["state"] for one in (run, other)]
    assert moments[0].keys() == moments[1].keys()
    for index, state in moments[0].items():
        for name, value in state.items():
            assert torch.equal(value, moments[1][index][name])
    assert run.progress.history == other.progress.history


def kill(run, folder: Path, at: int = 5) -> None:
    """Train until the iteration `at` and stop dead there."""
    with pytest.raises(KeyboardInterrupt):
        run.go(Checkpoints(FolderStore(folder), "a"), kill_at=at)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model_settings": {"guidance": "none"}},
        {
            "model_settings": {"N_sup": 4},
            "halting": True,
            "halt_bias": 1.0,
            "exploration": 0.5,
            "ema_warmup": False,
        },
        {"optim": OptimConfig(name="muon", lr=1e-2, warmup=2)},
    ],
    ids=["gram", "twin", "halting", "muon"],
)
def test_a_killed_run_ends_as_an_unbroken_one(make_run, tmp_path, settings):
    unbroken = make_run(**settings).go()
    kill(make_run(**settings), tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-0000003"]
    resumed = make_run(**settings).go(Checkpoints(FolderStore(tmp_path), "a"))
    assert_same_end(unbroken, resumed)
    # The rows of before the kill are told again.
    assert resumed.reported == unbroken.reported
    assert [row["step"] for row in resumed.reported] == [1, 2, 3, 4, 5, 6]


def test_a_run_with_checkpoints_is_the_run_without(make_run, tmp_path):
    assert_same_end(make_run().go(), make_run().go(Checkpoints(FolderStore(tmp_path), "a")))


def test_a_resumed_run_takes_up_the_newest_checkpoint_and_keeps_no_other(make_run, tmp_path):
    settings = {"steps": 8, "checkpoint_every": 2}
    kill(make_run(**settings), tmp_path, at=7)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-0000006"]
    run = make_run(**settings)
    progress = Checkpoints(FolderStore(tmp_path), "a").resume(run.engine, run.slots, fresh_ema(run))
    assert progress.iteration == 6
    assert [row["step"] for row in progress.history] == [1, 2, 3, 4, 5, 6]


def test_a_run_tells_of_all_workers_that_had_a_part_in_it(make_run, tmp_path):
    """Of those that began it, too, however often it is gone on with; a run alone of its own."""
    here, there = {"machine": "here", "threads": 2}, {"machine": "there", "threads": 2}
    store = FolderStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_run().go(Checkpoints(store, "a", [here, here]), kill_at=5)
    with pytest.raises(KeyboardInterrupt):
        make_run(steps=9).go(Checkpoints(store, "a", [there]), kill_at=8)
    resumed = make_run(steps=9).go(Checkpoints(store, "a", [here]))
    assert resumed.progress.workers == [here, here, there]
    assert make_run().go(Checkpoints(store, "b", [there])).progress.workers == [there]


def fresh_ema(run) -> EMA:
    return EMA(run.engine.held(), run.config.ema, run.config.ema_warmup)


def resume(run, folder: Path, fingerprint: str = "a") -> Progress:
    return Checkpoints(FolderStore(folder), fingerprint).resume(
        run.engine, run.slots, fresh_ema(run)
    )


def test_a_checkpoint_of_other_settings_is_not_resumed(make_run, tmp_path):
    kill(make_run(), tmp_path)
    run = make_run()
    before = {k: v.clone() for k, v in run.engine.model.state_dict().items()}
    assert resume(run, tmp_path, "b") == Progress(0, [])
    assert all(torch.equal(v, before[k]) for k, v in run.engine.model.state_dict().items())


@pytest.mark.parametrize("stale", ["step-0000003", "step-0002000"])
def test_checkpoints_of_other_settings_give_way(make_run, tmp_path, stale):
    kill(make_run(), tmp_path)
    if stale != "step-0000003":
        (tmp_path / "step-0000003").rename(tmp_path / stale)
    with pytest.raises(KeyboardInterrupt):
        make_run().go(Checkpoints(FolderStore(tmp_path), "b"), kill_at=5)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-0000003"]
    assert resume(make_run(), tmp_path, "b").iteration == 3


def test_z0_is_the_checkpoints(make_run, tmp_path):
    kill(make_run(), tmp_path)
    run = make_run()
    with torch.no_grad():
        run.engine.model.z0_h.add_(1.0)
    assert_same_end(make_run().go(), run.go(Checkpoints(FolderStore(tmp_path), "a")))


def test_a_checkpoint_of_another_version_is_not_resumed(make_run, tmp_path):
    kill(make_run(), tmp_path)
    edit_meta(tmp_path, version=0)
    assert resume(make_run(), tmp_path).iteration == 0


def edit_meta(folder: Path, **changes) -> None:
    path = folder / "step-0000003" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_a_checkpoint_a_run_starts_at_the_beginning(make_run, tmp_path):
    assert resume(make_run(), tmp_path / "none") == Progress(0, [])


def test_a_half_written_checkpoint_is_ignored_and_overwritten(make_run, tmp_path):
    kill(make_run(), tmp_path)
    whole, partial = tmp_path / "step-0000003", tmp_path / ".step-0000006.partial"
    shutil.copytree(whole, partial)
    (partial / "meta.json").write_text("{")
    assert resume(make_run(), tmp_path).iteration == 3
    # And what a killed save left of this very step does not stop the next save.
    shutil.rmtree(whole)
    (tmp_path / ".step-0000003.partial").mkdir()
    (tmp_path / ".step-0000003.partial" / "rubbish").write_text("")
    kill(make_run(), tmp_path)
    assert not (whole / "rubbish").exists()
    assert (whole / "meta.json").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = [
    "meta.json", "ema.safetensors", "slots.safetensors", "weights.safetensors",
    "optimizer.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_checkpoint_is_one_line_that_names_the_folder(make_run, tmp_path, name, damage):
    kill(make_run(), tmp_path)
    folder = tmp_path / "step-0000003"
    damage(folder / name)
    with pytest.raises(CheckpointError) as caught:
        resume(make_run(), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{folder}: damaged checkpoint (")
    assert "delete the folder" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [{"iteration": 4}, {"iteration": "3"}, {"history": []}, {"sha256": {}}, {"sha256": []}],
)
def test_changed_metadata_is_damage(make_run, tmp_path, change):
    """It says where to go on, and so what noise and rates the next iterations have."""
    kill(make_run(), tmp_path)
    path = tmp_path / "step-0000003" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"meta\.json does not match its checksum"):
        resume(make_run(), tmp_path)


@pytest.mark.parametrize("meta", [{"version": VERSION, "fingerprint": "a"}, [], 3])
def test_metadata_of_another_form_is_damage(make_run, tmp_path, meta):
    kill(make_run(), tmp_path)
    path = tmp_path / "step-0000003" / "meta.json"
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        resume(make_run(), tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(make_run, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"file/step-0000003: checkpoint not written: "):
        make_run().go(Checkpoints(FolderStore(blocked), "a"))
    assert blocked.read_text() == "not a folder"


def test_a_failed_save_leaves_the_earlier_checkpoint(make_run, tmp_path, monkeypatch):
    run = make_run()
    kill(run, tmp_path)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints = Checkpoints(FolderStore(tmp_path), "a")
        checkpoints.save(run.engine, run.slots, fresh_ema(run), Progress(6, []))
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-0000003"]


@pytest.mark.parametrize("at", [4, 6])
def test_weights_that_a_step_has_spoilt_are_not_kept(make_run, tmp_path, at):
    run = make_run(checkpoint_every=2)
    good = run.engine.step
    taken = 0

    def overflow(loss: torch.Tensor, lr: float) -> None:
        nonlocal taken
        good(loss, lr)
        taken += 1
        if taken == at:
            with torch.no_grad():
                run.engine.model.decoder.weight[0, 0] = torch.inf

    run.engine.step = overflow
    with pytest.raises(TrainingError, match=f"weights are not finite after iteration {at}; lower"):
        run.go(Checkpoints(FolderStore(tmp_path), "a"))
    assert run.ema is None  # nothing came back
    # The last iterations' loss was finite still, and the checkpoint of before is the newest.
    assert [row["step"] for row in run.reported] == list(range(1, at + 1))
    assert [folder.name for folder in tmp_path.iterdir()] == [f"step-000000{at - 2}"]
    resumed = make_run(checkpoint_every=2).go(Checkpoints(FolderStore(tmp_path), "a"))
    assert_same_end(make_run(checkpoint_every=2).go(), resumed)


def test_clear_removes_all_checkpoints_and_does_not_mind_none(make_run, tmp_path):
    kill(make_run(), tmp_path / "run")
    FolderStore(tmp_path / "run").clear()
    assert not (tmp_path / "run").exists()
    FolderStore(tmp_path / "run").clear()


def test_a_changed_file_is_noticed(make_run, tmp_path):
    kill(make_run(), tmp_path)
    path = tmp_path / "step-0000003" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors does not match its checksum"):
        resume(make_run(), tmp_path)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_parts_change_nothing_but_rounding(make_run, tmp_path, accumulate):
    """Also where the run is killed with so many parts and goes on with one."""
    settings = {"batch": 12, "prior_slots": 0.5}
    whole = make_run(**settings).go()
    parts = make_run(**settings, accumulate=accumulate).go()
    kill(make_run(**settings, accumulate=accumulate), tmp_path)
    resumed = make_run(**settings).go(Checkpoints(FolderStore(tmp_path), "a"))
    for other in (parts, resumed):
        for row, same in zip(other.reported, whole.reported, strict=True):
            assert row == pytest.approx(same, rel=1e-4, abs=1e-6)
