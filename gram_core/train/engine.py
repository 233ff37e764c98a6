"""What runs a supervision step forwards, backwards and through the optimiser.

The loop knows only `Engine`. `PlainEngine` needs torch alone; the one over DeepSpeed is in
`pipelines.engine`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gram_core.model.gram import GRAM
from gram_core.precision import Precision, autocast, resolve
from gram_core.shape import Verifier
from gram_core.train.objective import Batch, ObjectiveConfig, Supervision, supervise
from gram_core.train.optim import OptimConfig, make_optimizer, set_rate


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

    def __call__(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        # Around forward, not in it: a graph that enters autocast is not kept in the compiler's
        # cache, and every start would trace and differentiate it again.
        with autocast(self.precision, noise.device):
            result: Supervision = super().__call__(batch, noise)
        return result

    def forward(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        return supervise(self.model, self.objective, self.verify, batch, noise, self.prior_rows)


class Engine(Protocol):
    """One worker's view of training. What it says of weights and moments is of the whole model,
    however many workers hold it and however they share it."""

    model: GRAM
    rank: int
    world: int

    def forward(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        """One supervision step of some of this worker's slots."""

    def step(self, loss: Float[Tensor, ""], lr: float) -> None:
        """The gradient of `loss`, and with the last part of an iteration the optimiser's step:
        gradients averaged over parts and workers, clipped."""

    def total(self, terms: Float[Tensor, "M 2"]) -> Float[Tensor, "M 2"]:
        """Sums and counts over all workers."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' tensors, one behind the other."""

    def barrier(self) -> None:
        """Wait for all workers."""

    def held(self) -> list[Tensor]:
        """The parameters' values that this worker holds, in the parameters' order: all of each, or
        a shard of it. They change in place as training goes on."""

    def whole(self, held: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors from what the workers hold of each; every worker calls this."""

    def shares(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """What this worker holds of whole tensors: the inverse of `whole`."""

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state by `kind.parameter`; every worker calls this."""

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Restore the model's state dict and what `moments` gave."""


def state_with(model: nn.Module, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The model's state dict with these values of its parameters, on the CPU."""
    names = [name for name, _ in model.named_parameters()]
    state = {**model.state_dict(), **dict(zip(names, parameters, strict=True))}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser over the model's own parameters, by `kind.parameter`."""
    return {
        f"{kind}.{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Restore what `moments_of` gave. Raises `KeyError` for a parameter the model has not."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in moments.items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        if kind != "step" and value.shape != parameter.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}")
        place = (
            torch.device("cpu") if kind == "step" and not parameter.is_cuda else parameter.device
        )
        optimizer.state[parameter][kind] = value.clone().to(place)


class PlainEngine:
    """One process, torch alone; `parts` losses make an optimiser step."""

    rank = 0
    world = 1

    def __init__(self, module: Supervised, config: OptimConfig, parts: int = 1) -> None:
        self.module = module
        self.model = module.model
        self.parameters = list(self.model.parameters())
        self.clip = config.clip
        self.parts = parts
        self.optimizer = make_optimizer(module.model, config)
        self._done = 0

    def forward(self, batch: Batch, noise: Float[Tensor, "T B L D"]) -> Supervision:
        return self.module(batch, noise)

    def step(self, loss: Float[Tensor, ""], lr: float) -> None:
        if self._done == 0:
            self.optimizer.zero_grad()
        torch.autograd.backward(loss if self.parts == 1 else loss / self.parts)
        self._done = (self._done + 1) % self.parts
        if self._done:
            return
        set_rate(self.optimizer, lr)
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()

    def total(self, terms: Float[Tensor, "M 2"]) -> Float[Tensor, "M 2"]:
        return terms

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return

    def held(self) -> list[Tensor]:
        return [parameter.data for parameter in self.parameters]

    def whole(self, held: Sequence[Tensor]) -> list[Tensor]:
        return list(held)

    def shares(self, whole: Sequence[Tensor]) -> list[Tensor]:
        return list(whole)

    def moments(self) -> dict[str, Tensor]:
        return moments_of(self.model, self.optimizer)

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        # The state holds z_0 too, which is drawn anew with every model.
        self.model.load_state_dict(weights)
        load_moments(self.model, self.optimizer, moments)
