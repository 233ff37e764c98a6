"""What training on ARC at the paper's size would cost: `python -m benchmarks.arc_cost [SLOTS]`.

Times training steps of the paper's model on 900 tokens for a few slots on this machine, and scales
to the paper's batch and number of steps. Prints Markdown; the number in docs/tasks.md is from here.
"""

import time
from collections.abc import Sequence

import torch

from gram_core.config import load
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.noise import training_noise
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Examples
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, make_slots
from gram_core.train.objective import ObjectiveConfig
from pipelines.compute import compute_with
from pipelines.runtime import device_name, entry, threads

BATCH = 768
STEPS = {"ARC-AGI-1": 1_040_000, "ARC-AGI-2": 1_450_000}
REPEATS = 3


def seconds_a_slot(slots: int) -> float:
    """Seconds of one training step a slot: median of a few, after one to warm up."""
    torch.manual_seed(0)
    compute_with(threads())
    config = load(ModelConfig, {"prefix_tokens": 16}, "model")
    train = load(TrainConfig, {"batch": slots, "engine": "plain"}, "train")
    model = GRAM(config, TokenShape(900, 12)).to(device_name())
    module = Supervised(
        model,
        ObjectiveConfig(),
        None,
        prior_rows=train.prior_rows(config),
        precision="bf16",
    )
    engine = PlainEngine(module, train.optim)
    tokens = torch.randint(1, 12, (slots, 900), dtype=torch.uint8)
    batches = make_slots(
        engine, Examples(tokens, tokens, torch.zeros(slots, dtype=torch.int32)), train
    )
    shape = (config.T, model.length, config.dim)
    times = []
    for iteration in range(REPEATS + 1):
        batches.refill()
        start = time.perf_counter()
        noise = training_noise(0, iteration, range(slots), shape, model.z0_h.device)
        result = engine.forward(batches.batch(), noise)
        engine.step(result.loss, 1e-4)
        result.loss.item()
        times.append(time.perf_counter() - start)
        batches.absorb([result])
    return sorted(times[1:])[REPEATS // 2] / slots


def main(arguments: Sequence[str]) -> None:
    """Measure and extrapolate."""
    slots = int(arguments[0]) if arguments else 4
    each = seconds_a_slot(slots)
    print(f"{each:.2f} s a slot and step ({slots} slots, {device_name()}, {threads()} threads)\n")
    print("| training | slot steps | time on this machine |\n|---|---|---|")
    for name, steps in STEPS.items():
        years = each * BATCH * steps / (365.25 * 86400)
        print(f"| {name} | {BATCH * steps:.2g} | {years:.1f} years |")


if __name__ == "__main__":
    entry(main)
