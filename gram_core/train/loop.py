"""The training loop: one supervision step of all slots and one optimiser step an iteration.

It is given an engine, slots and a place for checkpoints, and knows nothing of Ray, DeepSpeed or
files' formats; tests drive it with `PlainEngine`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import msgspec
import torch

from gram_core.config import Config, ConfigError, Decay, Fraction, NonNegativeInt, PositiveInt, Seed
from gram_core.errors import GramError
from gram_core.model.gram import ModelConfig
from gram_core.noise import training_noise
from gram_core.precision import Precision
from gram_core.tasks.batches import Examples
from gram_core.train.checkpoint import Checkpoints, Progress
from gram_core.train.ema import EMA
from gram_core.train.engine import Engine, state_with
from gram_core.train.identifiers import IdentifierOptimizer
from gram_core.train.objective import Terms
from gram_core.train.optim import OptimConfig, learning_rate
from gram_core.train.slots import Share, Slots


class TrainConfig(Config, frozen=True, kw_only=True):
    """Training. `batch` is the number of slots over all workers; `prior_slots` the share of them
    that follows the prior throughout. Each of `workers` takes its slots in `accumulate` parts, one
    after the other, before an optimiser step; `zero_stage` says what DeepSpeed shards over the
    workers (1 the optimiser, 2 gradients too, 3 weights too). None of the three changes the result
    but for rounding. `cores` are the CPU cores of a worker (by default, all there are shared
    out), `restarts` how many dead workers a run survives. beta grows from `kl_from` times its value
    to the whole of it over `kl_warmup` iterations. `ema_warmup`, `halting` and `exploration` settle
    the gaps G20 and G7."""

    steps: PositiveInt = 28_100
    batch: PositiveInt = 768
    prior_slots: Fraction = 0.125
    kl_from: Fraction = 0.0
    kl_warmup: NonNegativeInt = 0
    seed: Seed = 0
    optim: OptimConfig = OptimConfig()
    ema: Decay = 0.9999
    ema_warmup: bool = True
    halting: bool = False
    exploration: Fraction = 0.1
    precision: Precision = "fp32"
    compile: bool = True
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 500
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    workers: PositiveInt = 1
    accumulate: PositiveInt = 1
    zero_stage: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    cores: PositiveInt | None = None
    restarts: NonNegativeInt = 3

    def __post_init__(self) -> None:
        if self.batch % self.parts:
            raise ValueError(
                f"batch {self.batch} must be a multiple of workers {self.workers} times "
                f"accumulate {self.accumulate}"
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be a multiple of "
                f"log_every {self.log_every}"
            )
        if self.engine == "plain" and self.workers > 1:
            raise ValueError("engine: plain is one process; use workers: 1, or engine: deepspeed")
        if self.engine == "plain" and self.zero_stage:
            raise ValueError("engine: plain shards nothing; use zero_stage 0, or engine: deepspeed")
        if self.optim.name == "muon" and self.zero_stage:
            raise ValueError(
                f"zero_stage {self.zero_stage} shards matrices that optim.name: muon steps whole; "
                "use zero_stage 0, or optim.name: adamw"
            )
        if self.kl_from and not self.kl_warmup:
            raise ValueError(
                f"kl_from {self.kl_from:g} is where beta begins to grow over kl_warmup iterations, "
                "which are 0; give kl_warmup, or leave it out"
            )
        if self.prior_slots == 1:
            raise ValueError("prior_slots 1 leaves no slot to train on; use a share below 1")

    @property
    def parts(self) -> int:
        """Batches that an optimiser step is made of, over all workers."""
        return self.workers * self.accumulate

    @property
    def graphs(self) -> bool:
        """Whether an optimiser step uses up the gradients of one forward and backward, whole, as
        CUDA graphs ask."""
        return self.accumulate == 1 and self.zero_stage == 0

    def prior_rows(self, model: ModelConfig) -> int:
        """P: slots of one part that follow the prior throughout. Raises `ConfigError` where the
        parts cannot hold equally many: who shares the work would say what is learned."""
        if model.guidance == "none" or self.prior_slots == 0:
            return 0
        rows = min(self.batch - 1, max(1, round(self.prior_slots * self.batch)))
        if rows % self.parts:
            raise ConfigError(
                f"batch {self.batch} has {rows} slots that follow the prior (prior_slots "
                f"{self.prior_slots:g}), which workers {self.workers} times accumulate "
                f"{self.accumulate} cannot share out evenly; use a batch of which "
                f"{self.prior_slots:g} is a multiple of {self.parts}, or fewer parts"
            )
        return rows // self.parts


CALMER = "lower train.optim.lr or raise its warmup"


class TrainingError(GramError):
    """Training cannot go on; one line that says at which iteration and why."""


def supervision_steps(model: ModelConfig) -> int:
    """Supervision steps a trajectory: N_sup, or a single one without deep supervision."""
    return model.N_sup if model.deep_supervision else 1


def transitions(model: ModelConfig) -> int:
    """Transitions a supervision step: T, or all T * N_sup of the trajectory without deep
    supervision (one loss, at its end, through the whole of it)."""
    return model.T if model.deep_supervision else model.T * model.N_sup


def make_slots(engine: Engine, examples: Examples, config: TrainConfig) -> Slots:
    """This worker's slots."""
    return Slots(
        engine.model,
        examples,
        config.batch,
        supervision_steps(engine.model.config),
        config.seed,
        Share(engine.rank, engine.world, config.accumulate),
        halting=config.halting,
        exploration=config.exploration,
        gather=engine.gather,
    )


def train(
    engine: Engine,
    slots: Slots,
    config: TrainConfig,
    checkpoints: Checkpoints | None,
    report: Callable[[dict[str, float]], None],
) -> tuple[EMA, Progress]:
    """Train from the newest checkpoint, or from the start, to `config.steps` optimiser steps.

    `report` gets one row every `log_every` iterations, and first the rows of before a resumption
    again: means since the row before it, under the names of `Terms`, with `step` and `lr`.
    Returns the averaged weights and the history. Raises `TrainingError` where the loss, or a weight
    that would be kept, is no longer finite.
    """
    model = engine.model
    ema = EMA(engine.held(), config.ema, config.ema_warmup)
    progress = checkpoints.resume(engine, slots, ema) if checkpoints else Progress()
    for row in progress.history:
        report(row)
    shape = (transitions(model.config), model.length, model.config.dim)
    device = model.z0_h.device
    table = None if model.puzzle is None or model.shape.puzzles == 1 else model.puzzle.weight
    identifiers = None if table is None else IdentifierOptimizer(table, config.optim)
    window = torch.zeros(len(Terms.names), 2, device=device)
    while progress.iteration < config.steps:
        slots.refill()
        # Filled in on the device: a copy to it would wait for all that it still has to do.
        share = torch.full((), kl_share(config, progress.iteration), device=device)
        rate = learning_rate(config.optim, progress.iteration, config.steps)
        results, moved = [], []
        for part in range(config.accumulate):
            batch = replace(slots.batch(part), kl_share=share)
            if identifiers is not None:
                batch = replace(batch, identity=identifiers.leaf(batch.puzzle))
            numbers = slots.mine[slots.part(part)].tolist()
            noise = training_noise(config.seed, progress.iteration, numbers, shape, device)
            result = engine.forward(batch, noise)
            engine.step(result.loss, rate)
            window += result.terms
            results.append(result)
            if batch.identity is not None:
                moved.append(_gradient(batch.identity))
        if identifiers is not None:
            identifiers.step(slots.puzzle, torch.cat(moved), engine, rate)
        ema.update()
        slots.absorb(results)
        progress.iteration += 1
        done = progress.iteration
        if done % config.log_every == 0 or done == config.steps:
            row = {"step": done, "lr": rate, **means(engine.total(window))}
            if not all(map(math.isfinite, row.values())):
                raise TrainingError(f"the loss is not finite at iteration {done}: {row}; {CALMER}")
            progress.history.append(row)
            report(row)
            window.zero_()
        if done % config.checkpoint_every == 0 or done == config.steps:
            # The loss is of before the step: what a step has spoilt must not take the place of the
            # last checkpoint, nor be the model.
            _check_weights(engine, done)
        if checkpoints and done % config.checkpoint_every == 0 and done < config.steps:
            checkpoints.save(engine, slots, ema, progress)
    return ema, progress


def _check_weights(engine: Engine, iteration: int) -> None:
    """Raise `TrainingError` where a weight is not finite; every worker calls this."""
    # Whole tensors: what pads the workers' shards is nobody's.
    if not all(bool(weight.isfinite().all()) for weight in engine.whole(engine.held())):
        raise TrainingError(f"weights are not finite after iteration {iteration}; {CALMER}")


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def averaged(engine: Engine, ema: EMA) -> dict[str, torch.Tensor]:
    """The model's state dict with the averaged weights; every worker calls this."""
    return state_with(engine.model, engine.whole(ema.average))


def kl_share(config: TrainConfig, iteration: int) -> float:
    """The part of beta that counts at an iteration (from 0)."""
    done = min(1.0, iteration / config.kl_warmup) if config.kl_warmup else 1.0
    return config.kl_from + (1.0 - config.kl_from) * done


def means(terms: torch.Tensor) -> dict[str, float]:
    """The terms that occurred, as means: one read from the device."""
    sums = terms.cpu().tolist()
    return {
        name: total / count
        for name, (total, count) in zip(Terms.names, sums, strict=True)
        if count > 0
    }


def final_metrics(history: list[dict[str, float]], last: int = 5) -> Mapping[str, float]:
    """Means of each term over the last `last` logged rows: what models/RUN/metrics.json holds."""
    rows = history[-last:]
    names = [name for name in Terms.names if any(name in row for row in rows)]
    return {
        name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows)
        for name in names
    }
