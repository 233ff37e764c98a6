"""The ablations behind the defaults: `python -m benchmarks.ablation`; docs/log.md has the table.

Each variant changes one setting of a small run on 7x7 N-Queens and is trained with three seeds on
one thread; held-out inputs are then sampled with 20 trajectories. Rows are appended to
docs/results/ablation.csv as they finish, and a row that is there is not computed again. Ends with
the table of docs/log.md: means over the seeds, and their range where they differ.
"""

import csv
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tqdm import tqdm

from gram_core import tables
from gram_core.config import load
from gram_core.evaluate.metrics import EvaluateConfig, puzzle_table, summarise
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.batches import Examples, Puzzles
from gram_core.tasks.registry import make_task
from gram_core.train.engine import PlainEngine, Supervised, compiled
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from pipelines.runtime import entry, say
from pipelines.sample import Sampler

OUT = Path("docs/results/ablation.csv")
SEEDS = (0, 1, 2)
INPUTS = 100
TASK = {"kind": "nqueens", "size": 7, "remove": [4, 5, 6]}
MODEL = {
    "dim": 64, "heads": 4, "ffn": 128, "core": "mixer", "K": 2, "T": 2, "N_sup": 4,
    "prefix_tokens": 0, "head_input": "mean",
}  # fmt: skip
OBJECTIVE = {"beta": 2.0}
TRAIN = {
    "steps": 700, "batch": 64, "ema": 0.99, "log_every": 100, "checkpoint_every": 700,
    "precision": "bf16",
    "optim": {"lr": 3e-3, "weight_decay": 0.1, "warmup": 100, "schedule": "cosine"},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "rollout posterior, kl last (the paper's literal reading)": {"rollout": "posterior"},
    "rollout posterior, kl every": {"rollout": "posterior", "kl": "every"},
    "rollout posterior, kl last, beta 0.07": {"rollout": "posterior", "beta": 0.07},
    "kl averaged over D": {"kl_reduction": "mean"},
    "beta 0.07": {"beta": 0.07},
    "beta 0.5": {"beta": 0.5},
    "beta 1": {"beta": 1.0},
    "beta 4": {"beta": 4.0},
    "heads on posterior states": {"heads_on": "posterior"},
    "heads read the first position": {"head_input": "first"},
    "prefix tokens 16": {"prefix_tokens": 16},
    "posterior by concatenation": {"posterior": "concat"},
    "attention core": {"core": "attention"},
}


def settings(change: dict[str, Any]) -> tuple[ModelConfig, ObjectiveConfig]:
    """The base run's model and objective with one variant's changes."""
    model, objective = dict(MODEL), dict(OBJECTIVE)
    for key, value in change.items():
        (model if key in ModelConfig.__struct_fields__ else objective)[key] = value
    return load(ModelConfig, model, "model"), load(ObjectiveConfig, objective, "objective")


def run(change: dict[str, Any], seed: int) -> dict[str, float]:
    """Train and evaluate one variant with one seed."""
    torch._dynamo.reset()
    task = make_task(TASK, "task")
    split = task.generate()
    inputs, target = (
        torch.from_numpy(tables.tokens_numpy(split.train[c]).copy()) for c in ("inputs", "target")
    )
    model_config, objective = settings(change)
    config = load(TrainConfig, {**TRAIN, "seed": seed}, "train")
    torch.manual_seed(seed)
    model = GRAM(model_config, task.shape)
    module = Supervised(
        model,
        objective,
        task.verify,
        prior_rows=config.prior_rows(model_config),
        precision=config.precision,
    )
    engine = PlainEngine(compiled(module, say), config.optim)
    examples = Examples(inputs, target, torch.zeros(len(inputs), dtype=torch.int32))
    bar = tqdm(total=config.steps, leave=False)
    start = time.monotonic()
    ema, progress = train(
        engine,
        make_slots(engine, examples, config),
        config,
        None,
        lambda row: bar.update(int(row["step"]) - bar.n) and None,
    )
    seconds = time.monotonic() - start
    bar.close()
    ema.copy_to(model.parameters())
    last = progress.history[-1]

    test = pl.from_arrow(split.test)
    assert isinstance(test, pl.DataFrame)
    counts = test.select("puzzle_id", "solution_count").unique(maintain_order=True).head(INPUTS)
    rows = test.unique("puzzle_id", keep="first", maintain_order=True).head(INPUTS)
    held_out = torch.from_numpy(rows["inputs"].to_numpy().copy())
    sample = SampleConfig(width=20, depth=4, halting=False, precision="bf16")
    sampler = Sampler(model.eval(), task, sample, 1)
    puzzles = Puzzles(rows["puzzle_id"].to_list(), held_out)
    table = sampler.rows(puzzles, [set() for _ in range(INPUTS)], lambda finished: None)
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    found = summarise(
        puzzle_table(frame.lazy(), counts.lazy(), (20,)), 20, 4, EvaluateConfig(widths=(20,))
    )
    names = ("accuracy", "any_valid", "coverage", "coverage_multi", "best_of_value")
    return {
        "seconds": round(seconds, 1),
        "posterior_cross_entropy": last["reconstruction"],
        "kl": last["kl"],
        **{name: found[name].value for name in names},
    }


def table() -> str:
    """The rows so far as Markdown, in per cent; cross-entropy and KL in nats a token."""
    rows = pl.read_csv(OUT)
    shown = ("accuracy", "any_valid", "coverage", "coverage_multi", "best_of_value")
    lines = [
        "| variant | posterior cross-entropy | KL | one valid | any of 20 | coverage "
        "| several solutions | best by value |",
        "|---" * 8 + "|",
    ]
    for variant in VARIANTS:
        its = rows.filter(pl.col("variant") == variant)
        if its.is_empty():
            continue
        cells = [f"{its[name].mean():.3f}" for name in ("posterior_cross_entropy", "kl")]
        for name in shown:
            low, high = 100 * its[name].min(), 100 * its[name].max()
            spread = "" if high - low < 0.5 else f" ({low:.0f}–{high:.0f})"
            cells.append(f"{100 * its[name].mean():.0f}{spread}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Compute the missing rows; arguments, if any, are the variants to compute."""
    torch.set_num_threads(1)
    done = set()
    if OUT.exists():
        with OUT.open() as file:
            done = {(row["variant"], int(row["seed"])) for row in csv.DictReader(file)}
    for variant, change in VARIANTS.items():
        for seed in SEEDS:
            if (variant, seed) in done or (arguments and variant not in arguments):
                continue
            row = {"variant": variant, "seed": seed, **run(change, seed)}
            fresh = not OUT.exists()
            with OUT.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            say(str(row))
    print(table())


if __name__ == "__main__":
    entry(main)
