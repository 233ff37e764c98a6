import math

import pytest
import torch

from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.heads import HALT_BIAS
from gram_core.model.layers import SwiGLU
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Examples, Puzzles
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.objective import ObjectiveConfig
from gram_core.train.optim import OptimConfig
from gram_core.train.slots import Slots

D, F, V, LENGTH = 512, 512, 3, 64
STACKS = 2 * 2 * (4 * D * D + 3 * D * F)
HEADS = 4 * 3 * D * F
# Input and target embedding, puzzle vector, decoder, halt head with two biases, value with one.
AROUND = 2 * V * D + D + V * D + (2 * D + 2) + (D + 1)


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def core_size(model: GRAM) -> int:
    parts = (model.recursion, model.prior_head, model.posterior_head)
    return sum(size(part) for part in parts if part is not None)


@pytest.fixture(scope="module")
def paper() -> GRAM:
    return GRAM(ModelConfig(), TokenShape(LENGTH, V))


def test_the_papers_settings_give_10_49_million_parameters(paper):
    assert STACKS + HEADS == 10_485_760
    assert core_size(paper) == 10_485_760
    assert size(paper) == STACKS + HEADS + AROUND


def test_a_posterior_on_the_concatenation_gives_11_53_million_parameters():
    model = GRAM(ModelConfig(posterior="concat"), TokenShape(LENGTH, V))
    # Gate and up of two SwiGLU heads read 2D instead of D.
    assert core_size(model) == STACKS + HEADS + 2 * 2 * D * F == 11_534_336


def test_the_papers_settings_train_and_sample(paper):
    torch.manual_seed(0)
    tokens = torch.ones(2, LENGTH, dtype=torch.uint8)
    examples = Examples(tokens, tokens, torch.zeros(2, dtype=torch.int32))
    supervised = Supervised(
        paper, ObjectiveConfig(), lambda x, y: (x == y).all(-1), prior_rows=1, precision="fp32"
    )
    engine = PlainEngine(supervised, OptimConfig())
    slots = Slots(paper, examples, 2, 16, 0)
    slots.refill()
    before = paper.recursion.f_l.blocks[0].mixing.qkv.weight.detach().clone()
    result = engine.forward(slots.batch(), torch.randn(3, 2, 16 + LENGTH, D))
    engine.step(result.loss, 1e-3)
    assert math.isfinite(float(result.loss.detach()))
    assert not torch.equal(before, paper.recursion.f_l.blocks[0].mixing.qkv.weight)
    drawn = rollout(paper, Puzzles.of(["a"], tokens[:1]), SampleConfig(width=2, depth=1))
    assert drawn.prediction.shape == (1, 2, LENGTH)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"guidance": "none"}, (None, None)),
        ({"guidance": "guide_only"}, (1, 1)),
        ({"guidance": "stochastic_only"}, (1, 1)),
        ({"guidance": "full"}, (2, 2)),
    ],
)
def test_guidance_decides_how_many_networks_the_noise_heads_have(make_model, settings, parts):
    model = make_model(**settings)
    for head, count in zip((model.prior_head, model.posterior_head), parts, strict=True):
        assert (head is None) == (count is None)
        if head is not None:
            assert size(head) == count * 3 * 16 * 16
    assert (model.embed_target is None) == (settings["guidance"] == "none")
    assert model.config.stochastic == (settings["guidance"] in ("full", "stochastic_only"))


def test_a_flat_model_has_one_stack(make_model):
    assert size(make_model(hierarchical=False).recursion) * 2 == size(make_model().recursion)


def test_the_prefix_is_the_puzzle_vector_and_zeros():
    torch.manual_seed(0)
    config = ModelConfig(dim=16, heads=2, ffn=16, prefix_tokens=3)
    model = GRAM(config, TokenShape(4, vocab=3, puzzles=2))
    assert not model.puzzle.weight.any(), "a fresh puzzle vector is zero"
    torch.nn.init.normal_(model.puzzle.weight)
    inputs = torch.tensor([[1, 2, 1, 0], [1, 2, 1, 0]], dtype=torch.uint8)
    e_x = model.embed(inputs, torch.tensor([1, 0], dtype=torch.int32))
    assert e_x.shape == (2, 7, 16)
    assert torch.equal(e_x[:, 0], model.puzzle.weight[[1, 0]])
    assert not e_x[:, 1:3].any()
    torch.testing.assert_close(e_x[0, 3:], 4.0 * model.embed_input.weight[[1, 2, 1, 0]])
    assert torch.equal(model.embed(inputs)[:, 0], model.puzzle.weight[[0, 0]])
    e_y = model.embed_answer(inputs)
    assert not e_y[:, :3].any()
    torch.testing.assert_close(e_y[0, 3:], 4.0 * model.embed_target.weight[[1, 2, 1, 0]])


def test_without_prefix_there_is_no_puzzle_vector(make_model):
    model = make_model(prefix_tokens=0)
    assert model.puzzle is None
    assert model.length == 16
    assert model.embed(torch.ones(2, 16, dtype=torch.uint8)).shape == (2, 16, 16)


def test_token_embeddings_have_unit_rms():
    torch.manual_seed(0)
    model = GRAM(ModelConfig(layers=1, prefix_tokens=0), TokenShape(200, vocab=200))
    tokens = torch.arange(200, dtype=torch.uint8)[None]
    for embedded in (model.embed(tokens), model.embed_answer(tokens)):
        # 102,400 truncated normal numbers.
        assert abs(float(embedded.detach().square().mean().sqrt()) - 1) < 0.01


def test_z0_is_standard_normal_kept_but_not_trained():
    torch.manual_seed(0)
    model = GRAM(ModelConfig(layers=1), TokenShape(LENGTH, V))
    names = dict(model.named_parameters())
    for name in ("z0_h", "z0_l"):
        assert name not in names
        value = model.state_dict()[name]
        assert value.shape == (80, 512)
        assert abs(float(value.mean())) < 0.02
        assert abs(float(value.std()) - 1) < 0.02
    assert not torch.equal(model.z0_h, model.z0_l)
    state = model.initial_state(3)
    assert torch.equal(state.h, model.z0_h.expand(3, 80, 512))
    assert torch.equal(state.l, model.z0_l.expand(3, 80, 512))


def test_broadcast_z0_is_the_same_at_every_position(make_model):
    model = make_model(z0="broadcast")
    state = model.initial_state(2)
    assert model.z0_h.shape == (1, 16)
    assert state.h.shape == (2, 18, 16)
    assert torch.equal(state.h, state.h[:1, :1].expand_as(state.h))


def test_prior_and_posterior_see_what_they_should(make_model):
    torch.manual_seed(1)
    u, e_y = torch.randn(2, 2, 18, 16)
    added, joined = make_model(), make_model(posterior="concat")
    torch.testing.assert_close(added.prior(u).mean, added.prior_head.mean(u))
    torch.testing.assert_close(added.posterior(u, e_y).mean, added.posterior_head.mean(u + e_y))
    both = torch.cat([u, e_y], -1)
    torch.testing.assert_close(joined.posterior(u, e_y).mean, joined.posterior_head.mean(both))


def test_without_guidance_there_is_no_prior_no_posterior_and_no_noise(make_model):
    model = make_model(guidance="none")
    state, e_x = model.initial_state(2), torch.randn(2, 18, 16)
    assert model.prior(e_x) is None
    assert model.posterior(e_x, e_x) is None
    after = model.prior_transition(state, e_x, None)
    assert torch.equal(after.h, model.recursion(state, e_x).h)
    with pytest.raises(ValueError, match="no posterior"):
        model.embed_answer(torch.ones(2, 16, dtype=torch.uint8))


def test_a_prior_transition_adds_a_sample_of_the_prior_to_the_proposal(make_model):
    model = make_model()
    state, (e_x, noise) = model.initial_state(2), torch.randn(2, 2, 18, 16)
    after = model.prior_transition(state, e_x, noise)
    proposal = model.recursion(state, e_x)
    u = proposal.h
    raw = model.prior_head.raw_std(u) + math.log(math.expm1(0.499))
    std = 1e-3 + torch.log1p(raw.exp())
    torch.testing.assert_close(after.h, u + model.prior_head.mean(u) + std * noise)
    assert torch.equal(after.l, proposal.l)
    with pytest.raises(ValueError, match="needs noise"):
        model.prior_transition(state, e_x, None)


@pytest.mark.parametrize("decoder", ["linear", "swiglu"])
def test_only_content_positions_are_decoded(make_model, decoder):
    model = make_model(decoder=decoder)
    h = torch.randn(2, 18, 16)
    assert isinstance(model.decoder, SwiGLU) == (decoder == "swiglu")
    torch.testing.assert_close(model.decode(h), model.decoder(h[:, 2:]))
    assert model.decode(h).shape == (2, 16, 3)


def test_heads_see_the_first_position_or_the_mean_and_send_nothing_back(make_model):
    h = torch.randn(2, 18, 16, requires_grad=True)
    first, mean = make_model().feature(h), make_model(head_input="mean").feature(h)
    assert torch.equal(first, h[:, 0])
    torch.testing.assert_close(mean, h.sum(1) / 18)
    assert not first.requires_grad
    assert not mean.requires_grad


def test_a_fresh_halt_head_says_go_on_and_a_fresh_value_head_zero(make_model):
    model = make_model(stir=0.0)
    feature = torch.randn(5, 16)
    assert torch.equal(model.halt(feature), torch.full((5, 2), HALT_BIAS))
    assert not model.wants_halt(model.halt(feature)).any()
    assert not model.value(feature).any()


def test_the_halting_rule_is_a_sign_or_a_comparison(make_model):
    q = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.5, 0.0], [-3.0, 1.0]])
    assert make_model().wants_halt(q).tolist() == [True, False, True, False]
    compared = make_model(halting="q_learning").wants_halt(q).tolist()
    assert compared == [False, True, True, False]
