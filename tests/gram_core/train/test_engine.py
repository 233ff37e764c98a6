import pytest
import torch

from gram_core.train.engine import Supervised
from gram_core.train.objective import Batch, ObjectiveConfig, supervise


def loss_of(run):
    run.slots.refill()
    noise = torch.randn(2, 6, 18, 16, generator=torch.Generator().manual_seed(0))
    return run.engine.forward(run.slots.batch(), noise)


def test_forward_is_one_supervision_step(make_run, queens4):
    run = make_run()
    result = loss_of(run)
    noise = torch.randn(2, 6, 18, 16, generator=torch.Generator().manual_seed(0))
    module = run.engine.module
    again = supervise(
        run.engine.model, module.objective, queens4.verify, run.slots.batch(), noise, 2
    )
    assert module.prior_rows == 2
    assert torch.equal(result.loss, again.loss)


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_to_the_norm(make_run, clip):
    run = make_run()
    run.engine.clip = clip
    result = loss_of(run)
    parameters = list(run.engine.model.parameters())
    plain = torch.autograd.grad(result.loss, parameters, retain_graph=True, allow_unused=True)
    norm = sum(float(g.square().sum()) for g in plain if g is not None) ** 0.5
    scale = 1.0 if clip == 0 else min(1.0, clip / norm)
    run.engine.step(result.loss, 1e-3)
    for p, g in zip(parameters, plain, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, g * scale, rtol=1e-3, atol=1e-7)
    assert norm > 0.02, "the small norm clips and the large one does not"


def test_a_step_uses_the_rate_it_is_given(make_run):
    moves = []
    for rate in (1e-4, 1e-3):
        run = make_run()
        before = run.engine.model.decoder.weight.detach().clone()
        run.engine.step(loss_of(run).loss, rate)
        moves.append((run.engine.model.decoder.weight.detach() - before).abs().max().item())
    assert moves[1] == pytest.approx(10 * moves[0], rel=0.05)


def test_gradients_do_not_pile_up_over_steps(make_run):
    run = make_run()
    for _ in range(2):
        result = loss_of(run)
        expected = torch.autograd.grad(
            result.loss, run.engine.model.decoder.weight, retain_graph=True
        )[0]
        run.engine.clip = 0.0
        run.engine.step(result.loss, 1e-3)
        torch.testing.assert_close(run.engine.model.decoder.weight.grad, expected)


def test_one_process_totals_nothing_and_waits_for_nobody(make_run):
    engine = make_run().engine
    terms = torch.rand(11, 2)
    assert torch.equal(engine.total(terms), terms)
    assert engine.barrier() is None
    assert (engine.rank, engine.world) == (0, 1)


def test_bf16_computes_products_in_bfloat16_and_keeps_float32_weights(make_run):
    wide, narrow = make_run(), make_run(precision="bf16")
    losses = [loss_of(run).loss.item() for run in (wide, narrow)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    narrow.go()
    assert all(p.dtype == torch.float32 for p in narrow.engine.model.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_forward_is_one_graph_that_is_compiled_once(make_run, precision):
    """A break in the graph would compile a part anew at every step (4 s each on two cores)."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = make_run(precision=precision)
    run.engine.module.compile(backend=backend, dynamic=False, fullgraph=True)
    for _ in range(3):
        result = loss_of(run)
        run.engine.step(result.loss, 1e-3)
        run.slots.absorb([result])
    assert len(graphs) == 1
    # One with autocast in it the compiler's cache would not keep.
    assert not any("autocast" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("transitions", [1, 2])
def test_bfloat16_gradients_are_float32s_though_the_prior_goes_first(make_model, transitions):
    """Autocast keeps casts of weights: those made for the rows without a gradient must not take it
    from the others."""
    gradients = []
    for precision in ("fp32", "bf16"):
        model = make_model(T=transitions)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "down" in name and "head" in name:  # zero at first
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        module = Supervised(model, ObjectiveConfig(), None, prior_rows=2, precision=precision)
        rows, length, dim = 8, model.length, model.config.dim
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 3, (rows, 16), generator=draw).to(torch.uint8)
        none = torch.zeros(rows, dtype=torch.int32)
        batch = Batch(
            state=model.initial_state(rows), inputs=tokens, target=tokens, puzzle=none,
            step=none.long(), last=none == 0, may_halt=none > 0,
            trace=torch.zeros(rows, model.config.N_sup, dim),
        )  # fmt: skip
        noise = torch.randn(transitions, rows, length, dim, generator=draw)
        module(batch, noise).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    wide, narrow = gradients
    assert wide.keys() == narrow.keys()
    for name, gradient in wide.items():
        norm = gradient.norm()
        if "recursion" in name or "_head" in name:
            assert norm > 0, name
            assert (narrow[name] - gradient).norm() < 0.2 * norm, name
