"""The DeepSpeed engine: `gram_core.train.engine.Engine` over `deepspeed.initialize`.

Expects a process group (Ray Train makes it). Knows nothing of Ray. Checkpoints are ours: weights
and moments are gathered whole from whatever ZeRO shards, so that they say nothing of workers and
stages, and nothing of DeepSpeed's is pickled.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gram_core.train.engine import Supervised, load_moments, moments_of
from gram_core.train.loop import TrainConfig
from gram_core.train.objective import Batch, Supervision
from gram_core.train.optim import make_optimizer, set_rate
from pipelines.deepspeed_config import deepspeed_config

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        self.stage = config.zero_stage
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module.model, config.optim),
            config=deepspeed_config(config, module.precision),
            dist_init_required=False,
        )
        if self.world == 1 and self.stage == 0:
            # Alone there is nobody to take the mean of gradients with, and to gather them and put
            # them back all the same is a twentieth of a small model's iteration.
            self.engine.enable_backward_allreduce = False

    def forward(self, batch: Batch, noise: Tensor) -> Supervision:
        result: Supervision = self.engine(batch, noise)
        return result

    def step(self, loss: Tensor, lr: float) -> None:
        set_rate(self.engine.optimizer, lr)
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

    def held(self) -> list[Tensor]:
        # Stage 3 keeps a flat shard of each parameter, all of equal size, the last one padded.
        return [p.ds_tensor if self.stage == 3 else p.data for p in self._parameters()]

    def _parameters(self) -> list[Any]:
        """The parameters, with what DeepSpeed has hung on them at stage 3."""
        return list(self.model.parameters())

    def whole(self, held: Sequence[Tensor]) -> list[Tensor]:
        if self.stage < 3:
            return list(held)
        return [
            self.gather(shard)[: p.ds_numel].view(p.ds_shape)
            for p, shard in zip(self._parameters(), held, strict=True)
        ]

    def shares(self, whole: Sequence[Tensor]) -> list[Tensor]:
        if self.stage < 3:
            return list(whole)
        return [self._shard(tensor, p) for tensor, p in zip(whole, self._parameters(), strict=True)]

    def _shard(self, whole: Tensor, parameter: Any) -> Tensor:
        size: int = parameter.ds_tensor.numel()
        padding = size * self.world - whole.numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, padding))
        return padded[self.rank * size : (self.rank + 1) * size]

    def moments(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return moments_of(self.model, self.engine.optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self._flat_state()
        if not any(flat):
            return {}
        step = next(state["step"] for state in flat if state)
        self._link()
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[f"step.{name}"] = step.clone()
            for kind in MOMENTS:
                found[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind)
        return found

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        if self.stage == 0:
            self.model.load_state_dict(weights)
            load_moments(self.model, self.engine.optimizer, moments)
            return
        self._load_weights(weights)
        if moments:
            self._load_moments(moments)

    @torch.no_grad()
    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        for name, parameter in zip(names, self._parameters(), strict=True):
            value = weights[name].to(parameter.device)
            if self.stage == 3:
                parameter.ds_tensor.copy_(self._shard(value, parameter))
            if parameter.shape == value.shape:  # not away in shards
                parameter.copy_(value)
            self._set(parameter, value)
        for name, buffer in self.model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    def _load_moments(self, moments: Mapping[str, Tensor]) -> None:
        inner = self.engine.optimizer.optimizer
        step = max(value for key, value in moments.items() if key.startswith("step."))
        for flat in self._flats():
            inner.state[flat] = {
                "step": step.clone().to(flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }
        self._link()
        for name, parameter in self.model.named_parameters():
            for kind in MOMENTS:
                if f"{kind}.{name}" in moments:
                    value = moments[f"{kind}.{name}"].to(parameter.device)
                    self._set(parameter, value, kind)

    def _set(self, parameter: torch.nn.Parameter, value: Tensor, kind: str | None = None) -> None:
        """Write this worker's part of a whole float32 weight, or of its moment `kind`."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        # At stage 3 the functions for whole tensors fail where a shard is all padding.
        if self.stage == 3:
            value = self._shard(value, parameter)
            weight, moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        else:
            weight, moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if kind is None:
            weight(parameter, value)
        else:
            moment(parameter, value, kind)

    def _flats(self) -> list[Tensor]:
        """The flat float32 tensors that the sharded optimiser steps on this worker."""
        optimizer = self.engine.optimizer
        flats: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        return flats

    def _flat_state(self) -> list[Mapping[str, Tensor]]:
        state = self.engine.optimizer.optimizer.state
        return [state.get(flat, {}) for flat in self._flats()]

    def _link(self) -> None:
        """Tell the parameters of stages 1 and 2 where their moments are. DeepSpeed does it after
        the first group's first step, before the other groups have any."""
        if self.stage == 3:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        optimizer = self.engine.optimizer
        for group, flat in zip(optimizer.bit16_groups, self._flats(), strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)
