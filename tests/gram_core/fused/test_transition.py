"""Fused transitions, and the gradient of their deterministic half, against float64 twins that are
computed by torch; and where they are not used."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gram_core.fused import library
from gram_core.fused import transition as fused
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.layers import Attention, SequenceMixer, Stack, SwiGLU
from gram_core.model.recursion import Recursion, State
from gram_core.shape import TokenShape


def make(core: str, length: int, dim: int, heads: int, ffn: int, cycles: int, flat: bool):
    """A recursion of two blocks a stack."""
    torch.manual_seed(0)

    def stack() -> Stack:
        return Stack(
            core, layers=2, dim=dim, heads=heads, ffn=ffn, length=length, rope_base=100
        )  # fmt: skip

    return Recursion(stack(), None if flat else stack(), cycles)


def fits(recursion: Recursion, h: Tensor) -> bool:
    return library.wanted(h) and fused.fits(h, recursion.stacks())


def draw(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    h, low, e_x = torch.randn(3, *shape)
    return h, low, e_x


def near(error, mine: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether it is as close to the exact value as what torch computes in the same formats, up to
    chance."""
    return error(mine, exact) < max(2 * error(theirs, exact), 1e-6)


SHAPES = [  # batch, length, dim, heads, ffn, K, flat
    (3, 64, 128, 4, 128, 2, False),
    (5, 16, 64, 4, 32, 1, False),
    (2, 81, 64, 2, 96, 2, False),
    (19, 7, 32, 1, 64, 3, True),
    (65, 2, 32, 2, 32, 1, False),
]


@pytest.mark.parametrize("core", ["attention", "mixer"])
@pytest.mark.parametrize(("batch", "length", "dim", "heads", "ffn", "cycles", "flat"), SHAPES)
def test_a_recursion_and_its_gradient_are_the_exact_ones(
    vectors, error, separately, core, batch, length, dim, heads, ffn, cycles, flat
):
    recursion = make(core, length, dim, heads, ffn, cycles, flat)
    twin = copy.deepcopy(recursion).double()  # whose weights no fused operation takes
    state = draw(batch, length, dim)
    grads = torch.randn(2, batch, length, dim)
    names = ["u", "l", "dh", "dl", "de_x", *(name for name, _ in recursion.named_parameters())]

    def both(f: Recursion, kind: torch.dtype) -> list[Tensor]:
        x = [part.to(next(f.parameters()).dtype).requires_grad_() for part in state]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            out = f(State(*x[:2]), x[2])
        wanted = [out.h, out.l]
        to = [g.to(y.dtype) for g, y in zip(grads, wanted, strict=True)]
        return [*wanted, *torch.autograd.grad(wanted, [*x, *f.parameters()], to)]

    exact = both(twin, torch.float64)
    for kind in vectors:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            assert fits(recursion, state[0])
        mine, theirs = both(recursion, kind), separately(both, recursion, kind)
        assert mine[0].dtype == torch.float32
        for name, x, y, z in zip(names, mine, theirs, exact, strict=True):
            if flat and name in ("l", "dl"):
                assert torch.equal(x, z.float())
            else:
                assert near(error, x, y, z), name


@pytest.mark.parametrize("core", ["attention", "mixer"])
@pytest.mark.parametrize(
    ("batch", "length", "dim", "heads", "ffn"),
    [(3, 64, 128, 4, 128), (2, 81, 48, 3, 80), (9, 7, 16, 1, 16), (1, 1, 16, 1, 16)],
)
def test_without_gradients_more_widths_fit(
    vectors, error, separately, core, batch, length, dim, heads, ffn
):
    recursion = make(core, length, dim, heads, ffn, 2, flat=False)
    twin = copy.deepcopy(recursion).double()
    # Of a few numbers, chance tells whose errors are larger.
    draws = [draw(batch, length, dim) for _ in range(1 + 1024 // (batch * length * dim))]

    def all_of(call) -> list[Tensor]:
        states = [call(State(h, low), e_x) for h, low, e_x in draws]
        return [torch.cat([s.h for s in states]), torch.cat([s.l for s in states])]

    with torch.no_grad():
        exact = all_of(lambda s, e_x: twin(State(s.h.double(), s.l.double()), e_x.double()))
        for kind in vectors:
            for first in {torch.float32, kind}:

                def one(s: State, e_x: Tensor, first=first) -> State:
                    return recursion(State(s.h.to(first), s.l), e_x)

                with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                    assert fits(recursion, draws[0][0].to(first))
                    mine, theirs = all_of(one), separately(all_of, one)
                for x, y, z in zip(mine, theirs, exact, strict=True):
                    assert near(error, x, y, z)


def gradients(f: Recursion, state: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Of the inputs and of the weights."""
    x = [part.to(next(f.parameters()).dtype).requires_grad_() for part in state]
    out = f(State(*x[:2]), x[2])
    return list(torch.autograd.grad((out.h * out.l).sum(), [*x, *f.parameters()]))


@pytest.mark.parametrize("core", ["attention", "mixer"])
def test_any_number_of_positions_is_made_up_of_tiles(vectors, error, bound, core):
    for length in range(1, 27):
        recursion = make(core, length, 32, 2, 32, 1, flat=False)
        twin = copy.deepcopy(recursion).double()
        state = draw(1, length, 32)
        for x, y in zip(gradients(recursion, state), gradients(twin, state), strict=True):
            assert error(x, y) < 10 * bound(torch.float32), length


@pytest.mark.parametrize("core", ["attention", "mixer"])
@pytest.mark.parametrize("flat", [False, True])
def test_gradients_do_not_depend_on_what_their_memory_held(fusing, poisoned, error, core, flat):
    """The first sum of a weight's gradient is stored, all others are added."""
    recursion = make(core, 16, 32, 2, 32, 2, flat)
    twin = copy.deepcopy(recursion).double()
    assert not any(x.any() for x in gradients(recursion, draw(0, 16, 32)))
    for batch in (1, 3, 80):  # 20 groups: more than one span a thread
        state = draw(batch, 16, 32)
        for x, y in zip(gradients(recursion, state), gradients(twin, state), strict=True):
            assert error(x, y) < 1e-5


def test_gradients_go_through_one_output_alone_and_through_several_recursions(fusing, error, bound):
    recursion = make("attention", 9, 32, 2, 32, 1, flat=False)
    twin = copy.deepcopy(recursion).double()
    h, low, e_x = draw(3, 9, 32)

    def chain(f: Recursion, kind: torch.dtype, use: str) -> list[Tensor]:
        x = e_x.to(kind).requires_grad_()
        state = State(h.to(kind), low.to(kind))
        for _ in range(2):
            state = f(state, x)
        return list(torch.autograd.grad(getattr(state, use).sum(), [x, *f.parameters()]))

    for use in ("h", "l"):
        mine, exact = chain(recursion, torch.float32, use), chain(twin, torch.float64, use)
        for x, y in zip(mine, exact, strict=True):
            assert error(x, y) < 10 * bound(torch.float32)


VARIANTS = [
    {},
    {"core": "mixer"},
    {"sigma": "exp"},
    {"guidance": "stochastic_only"},
    {"guidance": "guide_only"},
    {"guidance": "none"},
    {"hierarchical": False},
]


def gram(**settings) -> GRAM:
    """A model whose heads are no longer zero."""
    torch.manual_seed(1)
    config = ModelConfig(
        dim=64, heads=2, ffn=32, K=2, T=3, prefix_tokens=2, sigma_init=0.5, **settings
    )
    model = GRAM(config, TokenShape(16, vocab=3))
    # Where e to the power of 9 is among the deviations, one number's rounding is all of the error.
    spread = 0.1 if config.sigma == "exp" else 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, spread)
    return model


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_transitions_of_the_prior_are_the_exact_ones(vectors, error, separately, settings):
    model = gram(**settings)
    twin = copy.deepcopy(model).double()
    h, low, e_x = draw(5, model.length, 64)
    noise = torch.randn(3, 5, model.length, 64) if model.config.stochastic else None
    with torch.no_grad():
        wide = None if noise is None else noise.double()
        exact = twin.prior_transitions(State(h.double(), low.double()), e_x.double(), wide, 2)
        for kind in vectors:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                mine = model.prior_transitions(State(h, low), e_x, noise, 2)
                theirs = separately(model.prior_transitions, State(h, low), e_x, noise, 2)
            assert mine.h.dtype == mine.l.dtype == torch.float32
            assert near(error, mine.h, theirs.h, exact.h)
            assert near(error, mine.l, theirs.l, exact.l)


def test_deviations_far_from_the_usual_are_the_exact_ones(fusing, error):
    """Raw ones of -60 to 60: softplus is next to nothing there, and the identity here."""
    for sigma in ("softplus", "exp"):
        model = gram(sigma=sigma, guidance="stochastic_only")
        with torch.no_grad():
            model.prior_head.raw_std.down.weight.mul_(40)
        twin = copy.deepcopy(model).double()
        h, low, e_x = draw(2, model.length, 64)
        noise = torch.randn(1, 2, model.length, 64)
        with torch.no_grad():
            out = model.prior_transitions(State(h, low), e_x, noise, 1)
            raw = twin.prior_head.raw_std(twin.recursion(State(h.double(), low.double()),
                                                         e_x.double()).h)  # fmt: skip
            assert raw.max() > 20 and raw.min() < -20
            exact = twin.prior_transitions(
                State(h.double(), low.double()), e_x.double(), noise.double(), 1
            )
        assert error(out.h, exact.h) < 1e-4


def test_without_noise_a_stochastic_prior_is_refused(fusing):
    model = gram()
    state = State(*torch.randn(2, 1, model.length, 64))
    with torch.no_grad(), pytest.raises(ValueError, match="needs noise"):
        model.prior_transitions(state, state.h, None, 1)


@pytest.mark.parametrize("shape", [(2, 5, 18, 64), (3, 4, 18, 64), (3, 5, 17, 64)])
def test_noise_of_another_shape_is_refused_as_without(fusing, shape):
    """Nothing is read beyond it."""
    model = gram()
    state = State(*torch.randn(2, 5, model.length, 64))
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        model.prior_transitions(state, state.h, torch.randn(shape), 3)


def test_noise_that_is_shared_by_all_rows_is(fusing, error):
    model = gram()
    state = State(*torch.randn(2, 5, model.length, 64))
    noise = torch.randn(2, 1, model.length, 64)
    with torch.no_grad():
        mine = model.prior_transitions(state, state.h, noise, 2)
        theirs = model.prior_transitions(state, state.h, noise.expand(-1, 5, -1, -1), 2)
    assert error(mine.h, theirs.h.double()) < 1e-4


def test_no_transition_leaves_the_state(fusing):
    model = gram()
    state = State(*torch.randn(2, 5, model.length, 64))
    with torch.no_grad():
        assert model.prior_transitions(state, state.h, torch.randn(0, 5, 18, 64), 0) is state


class Calls(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [*VARIANTS[:2], *VARIANTS[-2:]], ids=str)
@pytest.mark.parametrize(("ahead", "count"), [(1, 1), (4, 2), (4, 0), (11, 1), (0, 2)])
def test_some_rows_go_further_in_one_call(fusing, separately, error, settings, ahead, count):
    """As if the first had gone alone, fused or not; groups are of three sequences here."""
    model = gram(**settings)
    h, low, e_x = draw(11, model.length, 64)
    noise = torch.randn(3, 11, model.length, 64) if model.config.stochastic else None
    state = State(h, low)
    some = (
        State(h[:ahead], low[:ahead]), e_x[:ahead], None if noise is None else noise[:, :ahead], 3
    )  # fmt: skip
    with torch.no_grad():
        with Calls() as calls:
            first, rest = model.staggered_transitions(state, e_x, noise, ahead, 3, count)
        assert sum("::transitions" in name for name in calls.names) == 1
        whole = model.prior_transitions(state, e_x, noise, count)
        alone = model.prior_transitions(*some)
        assert torch.equal(first.h, alone.h) and torch.equal(first.l, alone.l)
        assert torch.equal(rest.h, whole.h[ahead:]) and torch.equal(rest.l, whole.l[ahead:])
        first, rest = separately(model.staggered_transitions, state, e_x, noise, ahead, 3, count)
        whole = separately(model.prior_transitions, state, e_x, noise, count)
        assert len(first.h) == ahead
        if ahead:
            alone = separately(model.prior_transitions, *some)
            assert error(first.h, alone.h.double()) < 1e-4
        assert ahead == 11 or error(rest.h, whole.h[ahead:].double()) < 1e-4


@pytest.mark.parametrize(("ahead", "further", "count"), [(6, 3, 1), (-1, 3, 1), (2, 1, 2)])
def test_rows_that_are_not_and_that_go_back_are_refused(fusing, ahead, further, count):
    model = gram()
    state = State(*torch.randn(2, 5, model.length, 64))
    noise = torch.randn(3, 5, model.length, 64)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{ahead} of 5 rows cannot go"):
        model.staggered_transitions(state, state.h, noise, ahead, further, count)


@pytest.mark.parametrize("settings", VARIANTS[:2], ids=str)
def test_noise_may_lie_in_any_order(fusing, settings):
    model = gram(**settings)
    h, low, e_x = draw(7, model.length, 64)
    noise = torch.randn(9, 3, model.length, 64).transpose(0, 1)  # as it is drawn
    turned = torch.randn(2, 7, 64, model.length).transpose(2, 3)
    with torch.no_grad():
        for lies in (noise[:, :7], noise[:, 2:], noise[1:, 1:8], turned):
            mine = model.prior_transitions(State(h, low), e_x, lies, 2)
            theirs = model.prior_transitions(State(h, low), e_x, lies.contiguous(), 2)
            assert torch.equal(mine.h, theirs.h) and torch.equal(mine.l, theirs.l)


@pytest.mark.parametrize("settings", VARIANTS[:2], ids=str)
def test_rows_do_not_depend_on_their_company_nor_on_threads(fusing, settings):
    model = gram(**settings)
    h, low, e_x = draw(23, model.length, 64)
    noise = torch.randn(2, 23, model.length, 64)
    some = slice(4, 9)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            whole = model.prior_transitions(State(h, low), e_x, noise, 2)
            part = model.prior_transitions(State(h[some], low[some]), e_x[some], noise[:, some], 2)
            torch.set_num_threads(3)
            spread = model.prior_transitions(State(h, low), e_x, noise, 2)
    finally:
        torch.set_num_threads(before)
    for name in ("h", "l"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[some])
        assert torch.equal(getattr(spread, name), getattr(whole, name))


@pytest.mark.parametrize("core", ["attention", "mixer"])
def test_gradients_are_the_same_each_time_and_next_to_the_same_for_any_threads(fusing, error, core):
    recursion = make(core, 16, 64, 4, 32, 2, flat=False)
    state = draw(41, 16, 64)  # more groups than are summed at once, the last not whole
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 5, 64):
            torch.set_num_threads(threads)
            x = [part.clone().requires_grad_() for part in state]
            out = recursion(State(*x[:2]), x[2])
            found.append(torch.autograd.grad(
                out.h.square().sum() + out.l.sum(), [*x, *recursion.parameters()]
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[1], found[2]))
    for some in found:
        assert all(map(torch.equal, some[:3], found[0][:3]))  # of the inputs: row by row
        for mine, one in zip(some[3:], found[0][3:], strict=True):
            assert error(mine, one.double()) < 1e-6


@pytest.mark.parametrize(("threads", "rows"), [(3, 20), (16, 3)])  # more threads than cores
def test_a_threads_sums_are_those_of_its_groups_alone_whoever_computes_them(vectors, threads, rows):
    recursion = make("attention", 64, 32, 2, 32, 1, flat=False)
    state = draw(threads * rows, 64, 32)  # a group each

    def gradients(some: slice, threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        x = [part[some].clone().requires_grad_() for part in state]
        out = recursion(State(*x[:2]), x[2])
        of = [*x, *recursion.parameters()]
        return list(torch.autograd.grad(out.h.square().sum() + out.l.sum(), of))

    before = torch.get_num_threads()
    try:
        alone = [gradients(slice(k * rows, (k + 1) * rows), 1) for k in range(threads)]
        inputs = [torch.cat(parts) for parts in zip(*(one[:3] for one in alone), strict=True)]
        sums = [sum(parts[1:], parts[0]) for parts in zip(*(one[3:] for one in alone), strict=True)]
        for _ in range(20):
            assert all(map(torch.equal, gradients(slice(None), threads), [*inputs, *sums]))
    finally:
        torch.set_num_threads(before)


def test_the_operations_are_well_behaved_in_graphs(fusing):
    for core in ("attention", "mixer"):
        recursion = make(core, 9, 32, 2, 32, 1, flat=False)
        stacks = recursion.stacks()
        h, low, e_x = draw(2, 9, 32)
        laid_out = torch.randn(2, 32, 9).transpose(1, 2)
        arguments = [
            [w.detach().requires_grad_() for w in stacks.weights], *stacks.arguments()[1:],
            stacks.eps,
        ]  # fmt: skip
        h.requires_grad_()
        torch.library.opcheck(library.ops.recursion.default, (h, low, laid_out, *arguments, False))
        with torch.no_grad():
            u, _, kept, scales = library.ops.recursion(h, low, e_x, *arguments, False)
            torch.library.opcheck(
                library.ops.recursion_backward.default,
                (u, laid_out, kept, scales, [w.detach() for w in stacks.weights],
                 *stacks.arguments()[1:], False),
            )  # fmt: skip
            torch.library.opcheck(
                library.ops.transitions.default,
                (h.detach(), low, laid_out, None, [2, 1, 1], [w.detach() for w in stacks.weights],
                 *stacks.arguments()[1:], stacks.eps, [], [], 0.0, 0.0, False, False),
            )  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_compiled_it_is_one_graph_with_the_same_bits(fusing, half):
    model = gram()
    h, low, e_x = draw(3, model.length, 64)
    noise = torch.randn(3, 3, model.length, 64).transpose(0, 1)  # as it is drawn

    def both(h: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            first = model.prior_transitions(State(h, low), e_x, noise, 2)
        second = model.recursion(first, e_x)
        return first.h, second.h, second.l

    compiled = torch.compile(both, fullgraph=True, dynamic=False)
    parameters = list(model.recursion.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=half and torch.bfloat16 in fusing):
        plain, fast = both(h, low), compiled(h, low)
    for mine, theirs in zip(fast, plain, strict=True):
        assert torch.equal(mine, theirs)
    grads = [torch.autograd.grad(out[1].sum() + out[2].sum(), parameters) for out in (plain, fast)]
    assert all(map(torch.equal, *grads))


def test_without_an_f_l_the_operation_passes_l_by(fusing):
    stacks = make("mixer", 9, 32, 2, 32, 1, flat=True).stacks()
    h, low, e_x = draw(2, 9, 32)
    low.requires_grad_()
    _, after, *_ = library.ops.recursion(h, low, e_x, *stacks.arguments(), stacks.eps, False)
    after.sum().backward()
    assert torch.equal(after, low)
    assert torch.equal(low.grad, torch.ones_like(low))


def test_what_was_kept_of_another_size_is_refused(fusing):
    stacks = make("mixer", 9, 32, 2, 32, 1, flat=False).stacks()
    h, low, e_x = draw(2, 9, 32)
    weights, *sizes = stacks.arguments()
    with torch.no_grad():
        u, after, kept, scales = library.ops.recursion(
            h, low, e_x, weights, *sizes, stacks.eps, False
        )
        with pytest.raises(ValueError, match="no format, width or size"):
            library.ops.recursion_backward(u, after, kept[:-32], scales, weights, *sizes, False)


class Zeros(TorchDispatchMode):
    """Sizes of the tensors of zeros that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zeros" in str(func):
            self.sizes.append(out.numel())
        return out


def test_no_gradient_is_made_of_what_is_kept(fusing):
    recursion = make("attention", 9, 32, 2, 32, 1, flat=False)
    state = draw(64, 9, 32)
    out = recursion(State(*state[:2]), state[2])
    with Zeros() as zeros:
        out.h.sum().backward()
    assert max(zeros.sizes) <= state[0].numel()


def test_what_does_not_fit_is_computed_by_separate_operations(monkeypatch, error):
    library.fuse()
    recursion = make("attention", 5, 32, 2, 32, 1, flat=False)
    state = State(*torch.randn(2, 2, 5, 32))
    e_x = torch.randn(2, 5, 32)
    fused_here = bool(library.process.formats)
    assert library.wanted(state.h, state.l, e_x) == fused_here
    assert not library.wanted(state.h.double())
    assert not library.wanted(state.h, e_x[:1])
    assert not library.wanted(state.h[0])
    assert not library.wanted(state.h.to("meta"))
    assert fused.fits(state.h, recursion.stacks())
    assert not fused.fits(state.h, replace(recursion.stacks(), cycles=0))
    odd = make("attention", 5, 48, 3, 48, 1, flat=False)
    assert not fused.fits(torch.randn(2, 5, 48), odd.stacks())  # with gradients
    with torch.no_grad():
        assert fused.fits(torch.randn(2, 5, 48), odd.stacks())
        twin = copy.deepcopy(recursion).double()
        assert not fused.fits(state.h, twin.stacks())
        exact = twin(State(state.h.double(), state.l.double()), e_x.double())
        whole = recursion(state, e_x)
        monkeypatch.setattr(library.process, "formats", ())
        plain = recursion(state, e_x)
    assert near(error, whole.h, plain.h, exact.h)
    assert near(error, whole.l, plain.l, exact.l)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("core", ["attention", "mixer"])
@pytest.mark.parametrize("shape", [(2, 4, 32), (2, 20, 32), (2, 0, 32), (2, 9, 64)])
def test_what_a_recursion_is_not_made_for_is_refused_as_without(core, shape, grad):
    """No numbers, and nothing read beyond a weight or a table."""
    library.fuse()
    recursion = make(core, 9, 32, 2, 32, 1, flat=False)
    with torch.set_grad_enabled(grad):
        assert not fits(recursion, torch.randn(shape))
        with pytest.raises(RuntimeError):
            recursion(State(torch.randn(shape), torch.randn(shape)), torch.randn(shape))


@pytest.mark.parametrize("grad", [False, True])
def test_weights_that_zero_has_cut_up_are_left_to_their_modules(monkeypatch, grad):
    """A look at them would gather all of a stack's at once, and none of its modules be called."""
    library.fuse()
    model = gram(core="mixer")
    called = []
    for module in (model.recursion.f_l.blocks[0].channels, model.prior_head.mean):
        module.down.register_forward_hook(lambda *_: called.append(1))
    monkeypatch.setattr(SwiGLU, "weights", lambda self: pytest.fail("looked at"))
    for parameter in model.parameters():
        parameter.ds_status = "cut up"
    state = State(*torch.randn(2, 2, model.length, 64))
    noise = torch.randn(1, 2, model.length, 64)
    with torch.set_grad_enabled(grad):
        model.prior_transitions(state, state.h, noise, 1)
    assert len(called) == 3  # f_L twice, the mean once


def test_bfloat16_without_autocast_is_float32s_products(halves, error, bound):
    recursion = make("mixer", 9, 32, 2, 32, 1, flat=False)
    h, low, e_x = draw(2, 9, 32)
    h = h.bfloat16()
    with torch.no_grad():
        assert fits(recursion, h)
        out = recursion(State(h, low), e_x)
        exact = copy.deepcopy(recursion).double()(State(h.double(), low.double()), e_x.double())
    assert out.h.dtype == torch.float32
    assert error(out.h, exact.h) < bound(torch.float32)


def test_a_number_that_is_none_is_seen_in_its_row_alone(fusing):
    recursion = make("attention", 9, 32, 2, 32, 1, flat=False)
    h, low, e_x = draw(11, 9, 32)
    h[3, 2, 5] = math.nan
    out = recursion(State(h, low), e_x)
    seen = out.h.isnan().flatten(1).any(1)
    assert seen.tolist() == [row == 3 for row in range(11)]


def test_a_second_derivative_is_refused(fusing):
    recursion = make("attention", 5, 32, 2, 32, 1, flat=False)
    h, low, e_x = draw(1, 5, 32)
    h.requires_grad_()
    out = recursion(State(h, low), e_x)
    (grad,) = torch.autograd.grad(out.h.square().sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_weights_come_in_the_order_of_the_products():
    mixer = SequenceMixer(5, 8)
    assert [tuple(w.shape) for w in mixer.weights()] == [(16, 5), (5, 8)]
    assert [tuple(w.shape) for w in Attention(16, 2, 5, 100).weights()] == [(48, 16), (16, 16)]
    recursion = make("mixer", 5, 16, 2, 8, 1, flat=False)
    weights = recursion.stacks().weights
    assert len(weights) == 16
    assert all(a is b for a, b in zip(weights, recursion.f_h.parameters(), strict=False))
    assert all(a is b for a, b in zip(weights[8:], recursion.f_l.parameters(), strict=True))
