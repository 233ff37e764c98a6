"""The ablations behind the defaults: `python -m benchmarks.ablation STUDY`; tables in docs/log.md.

`settings` changes one setting at a time of a small, short run on 7x7 N-Queens; `profile` changes
beta and the learning rate of the CPU profile's run on 8x8 as it was with AdamW; `optimizer` sets
Muon at half of its steps, with heads at a rate of their own, at fewer steps, and at a sixth of the
batch as the profile has it now, against AdamW at half of the steps and at all. Each variant is
trained with three seeds on one thread; held-out inputs are then sampled with 20 trajectories. Rows
are appended to docs/results/ablation_STUDY.csv (a GPU's to docs/results/gpu/ablation_STUDY.csv) as
they finish, and a row that is there is not computed again. Ends with the table of docs/log.md:
means over the seeds, and their range where they differ. Further arguments name the variants to
compute.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tqdm import tqdm

from gram_core import tables
from gram_core.compile import compiled
from gram_core.config import ConfigError, load
from gram_core.evaluate.metrics import EvaluateConfig, puzzle_table, summarise
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.batches import Examples, Puzzles
from gram_core.tasks.registry import make_task
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, averaged, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from pipelines.blocks import Block
from pipelines.compute import compute_with
from pipelines.runtime import device_name, entry, say
from pipelines.sampler import Sampler

SEEDS = (0, 1, 2)
RESULTS = {"cpu": Path("docs/results"), "cuda": Path("docs/results/gpu")}
MODEL = {
    "dim": 64, "heads": 4, "ffn": 128, "core": "mixer", "K": 2, "T": 2, "N_sup": 4,
    "prefix_tokens": 0, "head_input": "mean",
}  # fmt: skip
OPTIM = {"weight_decay": 0.1, "warmup": 100, "schedule": "cosine"}


@dataclass(frozen=True)
class Study:
    """A base run and the changes to compare; a change's keys are those of its sections' configs.

    Args:
        task: the task's entry, as in params.yaml.
        train: the run's `train` section, without the seed.
        objective: the run's `objective` section.
        sample: the run's `sample` section, without width and depth.
        inputs: number of held-out inputs.
        variants: name of each variant -> its changes.
    """

    task: dict[str, Any]
    train: dict[str, Any]
    objective: dict[str, Any]
    sample: dict[str, Any]
    inputs: int
    variants: dict[str, dict[str, Any]]

    def configs(
        self, change: dict[str, Any], seed: int
    ) -> tuple[ModelConfig, ObjectiveConfig, TrainConfig]:
        """The base run's model, objective and training with one variant's changes."""
        model, objective, settings = dict(MODEL), dict(self.objective), dict(self.train)
        optim = dict(self.train["optim"])
        for key, value in change.items():
            homes = (model, ModelConfig), (objective, ObjectiveConfig), (settings, TrainConfig)
            next((h for h, kind in homes if key in kind.__struct_fields__), optim)[key] = value
        return (
            load(ModelConfig, model, "model"),
            load(ObjectiveConfig, objective, "objective"),
            load(TrainConfig, {**settings, "optim": optim, "seed": seed}, "train"),
        )


STUDIES = {
    "settings": Study(
        task={"kind": "nqueens", "size": 7, "remove": [4, 5, 6]},
        train={
            "steps": 700, "batch": 64, "ema": 0.99, "log_every": 100, "checkpoint_every": 700,
            "precision": "bf16", "optim": {"lr": 3e-3, **OPTIM},
        },
        objective={"beta": 1.0},
        sample={"halting": False, "precision": "bf16"},
        inputs=100,
        variants={
            "base": {},
            "rollout posterior, kl last (the paper's literal reading)": {"rollout": "posterior"},
            "rollout posterior, kl every": {"rollout": "posterior", "kl": "every"},
            "rollout posterior, kl last, beta 0.07": {"rollout": "posterior", "beta": 0.07},
            "kl averaged over D": {"kl_reduction": "mean"},
            "beta 0.07": {"beta": 0.07},
            "beta 0.5": {"beta": 0.5},
            "beta 2": {"beta": 2.0},
            "beta 4": {"beta": 4.0},
            "heads on posterior states": {"heads_on": "posterior"},
            "heads read the first position": {"head_input": "first"},
            "prefix tokens 16": {"prefix_tokens": 16},
            "posterior by concatenation": {"posterior": "concat"},
            "attention core": {"core": "attention"},
        },
    ),
    "profile": Study(
        task={"kind": "nqueens", "size": 8, "remove": [5, 6, 7]},
        train={
            "steps": 2400, "batch": 96, "ema": 0.995, "log_every": 100, "checkpoint_every": 2400,
            "precision": "bf16", "optim": {"lr": 2e-3, **OPTIM},
        },
        objective={"beta": 1.5},
        sample={"halt_threshold": 0.8, "precision": "bf16"},
        inputs=300,
        variants={
            "beta 1.5, lr 2e-3": {},
            "beta 2, lr 2e-3": {"beta": 2.0},
            "beta 1.5, lr 4e-3": {"lr": 4e-3},
            "beta 2, lr 4e-3": {"beta": 2.0, "lr": 4e-3},
        },
    ),
    "optimizer": Study(
        task={"kind": "nqueens", "size": 8, "remove": [5, 6, 7]},
        train={
            "steps": 1200, "batch": 96, "ema": 0.995, "log_every": 100, "checkpoint_every": 1200,
            "precision": "auto", "optim": {"name": "muon", "lr": 4e-3, **OPTIM},
        },
        objective={"beta": 1.5},
        sample={"halt_threshold": 0.8, "precision": "auto", "batch": 64},
        inputs=300,
        variants={
            "muon, lr 4e-3": {},
            "muon, lr 4e-3, heads 2e-2": {"head_lr": 2e-2},
            "muon, lr 4e-3 to 0, heads 2e-2, 1,050 steps": {
                "head_lr": 2e-2, "final_lr": 0.0, "steps": 1050,
            },
            "muon, lr 2e-3, heads 2e-2, batch 16, 3,600 steps": {
                "lr": 2e-3, "head_lr": 2e-2, "clip": 0.0, "batch": 16, "steps": 3600,
                "ema": 0.9988, "checkpoint_every": 3600,
            },
            "adamw, lr 2e-3": {"name": "adamw", "lr": 2e-3},
            "adamw, lr 2e-3, 2,400 steps": {"name": "adamw", "lr": 2e-3, "steps": 2400},
        },
    ),
}  # fmt: skip


def run(study: Study, change: dict[str, Any], seed: int) -> dict[str, float]:
    """Train and evaluate one variant with one seed."""
    torch._dynamo.reset()
    task = make_task(study.task, "task").on(device_name())
    split = task.generate(Path)
    inputs, target = (
        torch.from_numpy(tables.tokens_numpy(split.train[c]).copy()) for c in ("inputs", "target")
    )
    model_config, objective, config = study.configs(change, seed)
    torch.manual_seed(seed)
    model = GRAM(model_config, task.shape).to(device_name())
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
    model.load_state_dict(averaged(engine, ema))
    last = progress.history[-1]

    test = pl.from_arrow(split.test)
    assert isinstance(test, pl.DataFrame)
    # The table is sorted: the first of its puzzles would be no sample of them.
    rows = test.unique("puzzle_id", keep="first", maintain_order=True)
    rows = rows.sample(study.inputs, seed=0, shuffle=True)
    counts = rows.select("puzzle_id", "solution_count")
    held_out = torch.from_numpy(rows["inputs"].to_numpy().copy())
    sample = load(SampleConfig, {**study.sample, "width": 20, "depth": 4}, "sample")
    sampler = Sampler(model.eval(), task, sample, 1)
    puzzles = Puzzles.of(rows["puzzle_id"].to_list(), held_out)
    block = Block(0, 0, study.inputs, 0, sample.width)
    known: list[set[bytes]] = [set() for _ in range(study.inputs)]
    table = sampler.rows(puzzles, known, block, lambda number, done: None)
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


def table(study: Study, out: Path) -> str:
    """The rows so far as Markdown, in per cent; cross-entropy and KL in nats a token."""
    rows = pl.read_csv(out)
    shown = ("accuracy", "any_valid", "coverage", "coverage_multi", "best_of_value")
    lines = [
        "| variant | posterior cross-entropy | KL | one valid | any of 20 | coverage "
        "| several solutions | best by value |",
        "|---" * 8 + "|",
    ]
    for variant in study.variants:
        its = rows.filter(pl.col("variant") == variant)
        if its.is_empty():
            continue
        columns = {name: its[name].to_numpy() for name in its.columns[2:]}
        cells = [f"{columns[name].mean():.3f}" for name in ("posterior_cross_entropy", "kl")]
        for name in shown:
            found = 100 * columns[name]
            low, high = found.min(), found.max()
            spread = "" if high - low < 0.5 else f" ({low:.0f}–{high:.0f})"
            cells.append(f"{found.mean():.0f}{spread}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Compute a study's missing rows; further arguments are the variants to compute."""
    name, *wanted = arguments or [""]
    if name not in STUDIES:
        raise ConfigError(f"no study '{name}'; there are {', '.join(STUDIES)}")
    unknown = set(wanted) - set(STUDIES[name].variants)
    if unknown:
        raise ConfigError(f"study {name} has no variant {min(unknown)!r}")
    study, out = STUDIES[name], RESULTS[device_name()] / f"ablation_{name}.csv"
    compute_with(1)
    done = set()
    if out.exists():
        with out.open() as file:
            done = {(row["variant"], int(row["seed"])) for row in csv.DictReader(file)}
    for variant, change in study.variants.items():
        for seed in SEEDS:
            if (variant, seed) in done or (wanted and variant not in wanted):
                continue
            row = {"variant": variant, "seed": seed, **run(study, change, seed)}
            fresh = not out.exists()
            with out.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            say(str(row))
    print(table(study, out))


if __name__ == "__main__":
    entry(main)
