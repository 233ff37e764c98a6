import os
import subprocess
import sys

HOOKED = """
from jaxtyping import install_import_hook

# All that handle tensors; the others speak of protocols, which have no check at run time.
MODULES = ["model", "noise", "sample", "evaluate", "tasks.nqueens", "tasks.batches",
           "train.objective", "train.slots", "train.engine", "train.ema", "train.optim"]
with install_import_hook([f"gram_core.{name}" for name in MODULES], "beartype.beartype"):
    import torch
    from gram_core.evaluate.bound import bound
    from gram_core.model.gram import GRAM, ModelConfig
    from gram_core.model.layers import rotate
    from gram_core.sample.trajectory import SampleConfig, rollout
    from gram_core.tasks.batches import Examples, Puzzles
    from gram_core.tasks.nqueens import NQueens, NQueensConfig, completions, to_tokens
    from gram_core.train.engine import PlainEngine, Supervised
    from gram_core.train.loop import TrainConfig, make_slots, train
    from gram_core.train.objective import ObjectiveConfig

task = NQueens(NQueensConfig(size=4, remove=(1, 2, 3)))
partial, full = completions(4, (1, 2, 3))
inputs, target = torch.from_numpy(to_tokens(partial)), torch.from_numpy(to_tokens(full))
examples = Examples(inputs, target, torch.zeros(len(inputs), dtype=torch.int32))
settings = TrainConfig(steps=3, batch=4, log_every=1, checkpoint_every=1, engine="plain")
for changes in ({}, {"core": "mixer", "prefix_tokens": 0, "halting": "q_learning"},
                {"guidance": "none"}, {"posterior": "concat", "deep_supervision": False}):
    config = ModelConfig(**{**dict(dim=16, heads=2, ffn=16, layers=1, K=1, T=2, N_sup=2,
                                   prefix_tokens=2), **changes})
    model = GRAM(config, task.shape)
    module = Supervised(model, ObjectiveConfig(), task.verify,
                        prior_rows=settings.prior_rows(config), precision="fp32")
    engine = PlainEngine(module, settings.optim)
    train(engine, make_slots(engine, examples, settings), settings, None, lambda row: None)
    rollout(model, Puzzles.of(["a", "b"], inputs[:2]), SampleConfig(width=2, depth=2))
    if config.stochastic:
        count = config.T * (1 if config.deep_supervision else config.N_sup)
        bound(model, inputs[:3], target[:3],
              lambda n: torch.randn(count, 3, model.length, config.dim),
              rollout="prior", likelihood="softmax")

# The checks are on: a table of another length is noticed.
try:
    rotate(torch.zeros(1, 1, 3, 4), torch.zeros(2, 5, 4))
except Exception as error:
    print("noticed", type(error).__name__)
"""


def test_the_declared_shapes_hold_at_run_time():
    """Training, sampling and the bound of four kinds of models, every annotation checked."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("noticed TypeCheckError"), done.stdout
