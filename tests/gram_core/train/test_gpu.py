"""Training on a GPU, compiled into CUDA graphs, is training on a CPU."""

import pytest
import torch

from gram_core.compile import compiled
from gram_core.train.checkpoint import Checkpoints, FolderStore
from gram_core.train.optim import OptimConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]
MUON = OptimConfig(name="muon", lr=2e-3, warmup=2, weight_decay=0.1)
CASES = {
    "slots that start anew": {},
    "halting": {"halting": True, "halt_bias": 1.0},
    "two parts": {"accumulate": 2},
    "muon": {"optim": MUON},
    "twin": {"model_settings": {"guidance": "none"}},
    "mixer": {"model_settings": {"core": "mixer"}},
}


def on_gpu(make_run, **settings):
    """A run whose step is compiled, as pipelines.train has it."""
    run, said = make_run(device="cuda", **settings), []
    compiled(run.engine.module, said.append, graphs=run.config.graphs)
    return run, said


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_a_cpu(make_run, case):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    here = make_run(**CASES[case]).go()
    there, said = on_gpu(make_run, **CASES[case])
    there.go()
    assert said == []
    if there.config.graphs:
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        assert skipped == 0, "the step is recorded"
    for row, expected in zip(there.reported, here.reported, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for average, expected in zip(there.ema.average, here.ema.average, strict=True):
        torch.testing.assert_close(average.cpu(), expected, rtol=1e-2, atol=1e-4)


def test_a_run_goes_on_from_a_checkpoint(make_run, tmp_path):
    torch._dynamo.reset()
    whole, _ = on_gpu(make_run)
    whole.go()
    store = Checkpoints(FolderStore(tmp_path), "a")
    with pytest.raises(KeyboardInterrupt):
        on_gpu(make_run)[0].go(store, kill_at=5)
    assert (tmp_path / "step-0000003").is_dir(), "there is something to go on from"
    rest, _ = on_gpu(make_run)
    rest.go(store)
    for row, expected in zip(rest.reported, whole.reported, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bf16_is_near_float32(make_run):
    torch._dynamo.reset()
    wide, narrow = (on_gpu(make_run, precision=name)[0].go() for name in ("fp32", "bf16"))
    first, other = (run.reported[0]["reconstruction"] for run in (wide, narrow))
    assert first != other
    assert other == pytest.approx(first, rel=0.02)
    assert all(p.dtype == torch.float32 for p in narrow.engine.model.parameters())
