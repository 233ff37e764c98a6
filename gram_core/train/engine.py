"""What runs a supervision step forwards, backwards and through the optimiser.

The loop knows only `Engine`. `PlainEngine` needs torch alone; the one over DeepSpeed is in
`pipelines.engine`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gram_core.model.gram import GRAM
from gram_core.precision import Precision, autocast, resolve
from gram_core.train.objective import Batch, ObjectiveConfig, Supervision, Verifier, supervise
from gram_core.train.optim import OptimConfig, make_optimizer


class Supervised(nn.Module):
    """A model with its objective: the module that engines wrap, one supervision step a call."""

    def __init__(
        self,
        model: GRAM,
        objective: ObjectiveConfig,
        verify: Verifier | None,
        *,
        prior_rows: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.verify = verify
        self.prior_rows = prior_rows
        # Decided here: asking the processor inside forward would cut the compiled graph in two and
        # compile the second half anew each time.
        self.precision = resolve(precision, next(model.parameters()).device)

    def forward(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        with autocast(self.precision, noise.device):
            return supervise(self.model, self.objective, self.verify, batch, noise, self.prior_rows)


class Engine(Protocol):
    """One worker's view of training."""

    model: GRAM
    rank: int
    world: int

    def forward(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        """One supervision step of this worker's slots."""

    def step(self, loss: Float[Tensor, ""], lr: float) -> None:
        """Gradients of `loss`, averaged over workers and clipped, and one optimiser step."""

    def total(self, terms: Float[Tensor, "M 2"]) -> Float[Tensor, "M 2"]:
        """Sums and counts over all workers."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' tensors, one behind the other."""

    def barrier(self) -> None:
        """Wait for all workers."""

    def save(self, folder: Path) -> None:
        """Weights and optimiser into an existing folder."""

    def load(self, folder: Path) -> None:
        """What `save` wrote, in place."""


def compiled(module: Supervised, say: Callable[[str], None]) -> Supervised:
    """`module` with its forward compiled for static shapes; unchanged, with one line that says
    so, where this machine has no compiler for it."""
    device = next(module.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        say("no C++ compiler found: training without torch.compile, at about half the speed")
        return module
    module.compile(dynamic=False)
    return module


class PlainEngine:
    """One process, torch alone."""

    rank = 0
    world = 1

    def __init__(self, module: Supervised, config: OptimConfig) -> None:
        self.module = module
        self.model = module.model
        self.clip = config.clip
        self.optimizer = make_optimizer(module.model, config)

    def forward(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        result: Supervision = self.module(batch, noise)
        return result

    def step(self, loss: Float[Tensor, ""], lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    def total(self, terms: Float[Tensor, "M 2"]) -> Float[Tensor, "M 2"]:
        return terms

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return

    def save(self, folder: Path) -> None:
        # The state holds z_0 too, which is drawn anew with every model.
        weights = {name: t.detach().contiguous() for name, t in self.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        moments = {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        save_file(moments, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))
        saved = self.optimizer.state_dict()
        saved["state"] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            saved["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(saved)
