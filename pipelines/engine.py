"""The DeepSpeed engine: `gram_core.train.engine.Engine` over `deepspeed.initialize`.

Expects a process group (Ray Train makes it). Knows nothing of Ray.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gram_core.train.engine import Supervised
from gram_core.train.loop import TrainConfig
from gram_core.train.objective import Batch, Supervision
from gram_core.train.optim import make_optimizer
from pipelines.deepspeed_config import deepspeed_config

TAG = "deepspeed"


class DeepSpeedEngine:
    """One worker of a DeepSpeed run."""

    def __init__(self, module: Supervised, config: TrainConfig) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On a CPU DeepSpeed compiles a shared-memory reduction at its first start; gloo does the
        # same work, and a compilation that is killed leaves a lock that stops every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model = module.model
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module.model, config.optim),
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self.engine.checkpoint_engine = _SafeCheckpoints(self.engine.checkpoint_engine)

    def forward(self, batch: Batch, noise: Tensor) -> Supervision:
        result: Supervision = self.engine(batch, noise)
        return result

    def step(self, loss: Tensor, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.backward(loss)
        self.engine.step()

    def total(self, terms: Tensor) -> Tensor:
        summed = terms.clone()
        dist.all_reduce(summed)
        return summed

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        dist.barrier()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise FileNotFoundError(f"{folder / TAG}: no DeepSpeed checkpoint")


class _SafeCheckpoints:
    """DeepSpeed's checkpoint engine, except that loading never unpickles objects."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)
