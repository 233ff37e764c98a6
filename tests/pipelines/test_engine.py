"""Training spread over workers and ZeRO stages is the training of one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from s3 import free_port
from workspace import REPOSITORY, child_environment

from gram_core.train.loop import TrainConfig

SCRIPT = REPOSITORY / "tests/support/spread.py"
# Sums of gradients in another order differ in the last bits of float32 (6e-8 of a value). AdamW
# divides by a root of running squares, which near zero makes more of it, and each iteration builds
# on the one before: a factor of ten an iteration at worst was seen, far less as a rule. Over 16
# iterations curves differ by 3e-5 of a value; a wrong mean over workers, one slot read twice or
# another slot's noise differ by 1e-2 and more.
TOLERANCE = 1e-3


def spread(
    world: int, cases: list[dict[str, Any]], folder: Path, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Run the cases on so many workers."""
    given, out = folder / f"cases{world}.json", folder / f"out{world}.json"
    given.write_text(json.dumps(cases))
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(given), str(out)],
            env={
                **child_environment(), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device,
            },
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=400)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, errors[0][-2000:]
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


DEEP = {"engine": "deepspeed"}
TWO = {**DEEP, "workers": 2}
MUON = {"optim": {"name": "muon", "lr": 2e-3, "warmup": 2, "weight_decay": 0.1}}
CASES: dict[str, dict[str, Any]] = {
    "two workers": TWO,
    "stage 1": {**TWO, "zero_stage": 1},
    "stage 2, two parts": {**TWO, "zero_stage": 2, "accumulate": 2},
    "stage 3": {**TWO, "zero_stage": 3},
    "stage 3 in bf16": {**TWO, "zero_stage": 3, "precision": "bf16"},
    "muon": {**TWO, **MUON},
}

# One worker, which has nobody to take the mean of gradients with.
ALONE: dict[str, dict[str, Any]] = {"alone": DEEP, "alone, two parts": {**DEEP, "accumulate": 2}}

CLOSE = [*(name for name in CASES if name not in ("stage 3 in bf16", "muon")), *ALONE]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case; a killed one of stage 2 on two workers, and who went on from it."""
    folder = tmp_path_factory.mktemp("spread")
    copies = {name: str(folder / name) for name in ("one", "two", "three")}
    killed = {**TWO, "zero_stage": 2, "dies": 12}
    two = spread(
        2,
        [
            *CASES.values(),
            *({**killed, "folder": path} for path in copies.values()),
            {**TWO, "zero_stage": 3, "folder": copies["three"]},
            {**TWO, "zero_stage": 2, "folder": copies["two"]},
        ],
        folder,
    )
    one = spread(
        1,
        [{"engine": "plain"}, {"engine": "plain", "precision": "bf16"},
         {"engine": "plain", "folder": copies["one"]}, {"engine": "plain", **MUON},
         *ALONE.values()],
        folder,
    )  # fmt: skip
    found = dict(zip(CASES, two, strict=False))
    found["on three"], found["on two"] = two[-2:]
    found["plain"], found["plain in bf16"], found["on one"], found["plain muon"], *alone = one
    found.update(zip(ALONE, alone, strict=True))
    return found


@pytest.mark.parametrize("name", CLOSE)
def test_workers_parts_and_stages_add_rounding_alone(
    curves: dict[str, dict[str, Any]], name: str
) -> None:
    plain, other = curves["plain"], curves[name]
    assert [row["step"] for row in plain["rows"]] == [4, 8, 12, 16]
    for ours, theirs in zip(other["rows"], plain["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-4)


@pytest.mark.parametrize("name", CLOSE)
def test_the_average_of_weights_is_that_of_a_plain_run(
    curves: dict[str, dict[str, Any]], name: str
) -> None:
    plain, other = curves["plain"]["weights"], curves[name]["weights"]
    assert plain.keys() == other.keys()
    for key, values in plain.items():
        # A weight whose gradient is noise around zero moves by the rate, up or down.
        assert other[key] == pytest.approx(values, rel=TOLERANCE, abs=2e-3), key


def test_bf16_differs_by_its_own_rounding(curves: dict[str, dict[str, Any]]) -> None:
    # Eight bits of mantissa: the first rows agree to about 1%.
    bf16, plain = curves["stage 3 in bf16"]["rows"], curves["plain in bf16"]["rows"]
    assert bf16[0]["reconstruction"] == pytest.approx(plain[0]["reconstruction"], rel=0.01)
    assert bf16[0]["reconstruction"] != curves["stage 3"]["rows"][0]["reconstruction"]


def test_muon_steps_gradients_of_all_workers(curves: dict[str, dict[str, Any]]) -> None:
    # Its iteration makes large what is small in a gradient, another order of sums among it, so that
    # later rows go apart; at this rate the first four iterations stay together. Another optimiser
    # is far off by then.
    muon, plain = curves["muon"]["rows"][0], curves["plain muon"]["rows"][0]
    assert muon == pytest.approx(plain, rel=TOLERANCE, abs=1e-4)
    assert muon != pytest.approx(curves["plain"]["rows"][0], rel=0.01, abs=1e-3)


@pytest.mark.parametrize("name", ["on one", "on two", "on three"])
def test_a_killed_run_goes_on_with_other_workers_and_stages(
    curves: dict[str, dict[str, Any]], name: str
) -> None:
    """Killed at iteration 12 on two workers at stage 2; the newest checkpoint is of iteration 8."""
    for ours, theirs in zip(curves[name]["rows"], curves["plain"]["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-4)


def test_prior_slots_do_not_hang_on_the_number_of_parts() -> None:
    from spread import MODEL

    for parts in (1, 2, 4):
        config = TrainConfig(batch=32, prior_slots=0.125, accumulate=parts)
        assert config.prior_rows(MODEL) * parts == 4


ON_GPU: dict[str, dict[str, Any]] = {
    "stage 0": DEEP,
    "stage 0, two parts": {**DEEP, "accumulate": 2},
    "stage 1": {**DEEP, "zero_stage": 1},
    "stage 2": {**DEEP, "zero_stage": 2},
}


@pytest.mark.gpu
def test_a_gpu_s_compiled_step_gives_a_cpu_s_curve(tmp_path: Path) -> None:
    compile = [{**case, "compile": True} for case in ON_GPU.values()]
    plain, muon = spread(1, [{"engine": "plain"}, {"engine": "plain", **MUON}], tmp_path)
    *found, muon_there = spread(1, [*compile, {**DEEP, **MUON, "compile": True}], tmp_path, "cuda")
    for name, there in zip(ON_GPU, found, strict=True):
        for ours, theirs in zip(there["rows"], plain["rows"], strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-4), name
    assert muon_there["rows"][0] == pytest.approx(muon["rows"][0], rel=TOLERANCE, abs=1e-4)
