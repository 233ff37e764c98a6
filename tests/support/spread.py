"""One worker of a run that is spread over processes, without Ray: `python spread.py CASES OUT`.

CASES is JSON, a list of training settings, trained one after the other in one process group; each
may say where its checkpoints lie and at which iteration it stops dead. OUT gets the logged rows and
the averaged weights of each, from the first worker.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gram_core.compile import compiled
from gram_core.config import load
from gram_core.fused.library import fuse
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Examples
from gram_core.train.checkpoint import Checkpoints, FolderStore
from gram_core.train.engine import Engine, PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, averaged, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from gram_core.train.optim import OptimConfig

MODEL = ModelConfig(
    core="mixer", dim=32, heads=2, ffn=32, layers=1, K=2, T=2, N_sup=4, prefix_tokens=2
)
DEVICE = os.environ.get("DS_ACCELERATOR", "cpu")


class Dead(Exception):
    """The run was told to stop here."""


def run(case: dict[str, object]) -> dict[str, object]:
    """Train as the case says; its rows, and the averaged weights."""
    case = dict(case)
    folder, dies = case.pop("folder", None), case.pop("dies", None)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 4, (40, 6), generator=generator, dtype=torch.uint8)
    target = (tokens % 3 + 1).to(torch.uint8)
    examples = Examples(tokens, target, torch.zeros(40, dtype=torch.int32))
    settings = {
        "steps": 16, "batch": 32, "prior_slots": 0.125, "log_every": 4, "checkpoint_every": 8,
        "ema": 0.9, "compile": False,
        "optim": OptimConfig(lr=1e-2, head_lr=5e-3, warmup=2, weight_decay=0.1),
    }  # fmt: skip
    if "optim" in case:
        case["optim"] = load(OptimConfig, case["optim"], "optim")
    config = TrainConfig(**{**settings, **case})
    torch.manual_seed(0)
    module = Supervised(
        GRAM(MODEL, TokenShape(6, vocab=4)).to(DEVICE),
        ObjectiveConfig(beta=1.0),
        None,
        prior_rows=config.prior_rows(MODEL),
        precision=config.precision,
    )
    if config.compile:
        compiled(module, print, graphs=config.graphs)
    engine: Engine
    if config.engine == "plain":
        engine = PlainEngine(module, config.optim, config.accumulate)
    else:
        from pipelines.engine import DeepSpeedEngine

        engine = DeepSpeedEngine(module, config)
    rows: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> None:
        rows.append(row)
        if row["step"] == dies:
            raise Dead

    checkpoints = Checkpoints(FolderStore(Path(str(folder))), "a") if folder else None
    try:
        ema, _ = train(engine, make_slots(engine, examples, config), config, checkpoints, report)
    except Dead:
        return {"rows": rows, "weights": {}}
    weights = averaged(engine, ema)
    return {"rows": rows, "weights": {name: t.flatten().tolist() for name, t in weights.items()}}


def main() -> None:
    """All cases."""
    torch.set_num_threads(1)
    fuse()
    rank = int(os.environ["RANK"])
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    dist.init_process_group(backend, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = [run(case) for case in cases]
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
