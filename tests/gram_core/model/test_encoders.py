"""Encoders and decoders: shapes, inverses, parameter counts by hand."""

import pytest
import torch

from gram_core.model.encoders import (
    PatchDecoder,
    PatchEncoder,
    PatchTargetEncoder,
    patchify,
    unpatchify,
)
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.shape import TokenShape

IMAGE = (6, 4, 2)


def test_patches_are_what_slicing_gives() -> None:
    pixels = torch.arange(24.0).view(1, 24, 1)
    patches = patchify(pixels, IMAGE)
    assert patches.shape == (1, 6, 4, 1)
    grid = pixels.view(6, 4)
    for number in range(6):
        row, column = divmod(number, 2)
        block = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert (patches[0, number, :, 0] == block.reshape(-1)).all()
    assert (unpatchify(patches, IMAGE) == pixels).all()
    random = torch.randn(3, 24, 5)
    assert (unpatchify(patchify(random, IMAGE), IMAGE) == random).all()


def test_a_patch_of_logits_depends_on_its_own_vector() -> None:
    torch.manual_seed(0)
    decoder = PatchDecoder(IMAGE, 8, 3)
    h = torch.randn(1, 6, 8)
    base = decoder(h)
    h[0, 3] += 1.0
    changed = (decoder(h) != base).any(-1)[0].view(6, 4)
    wanted = torch.zeros(6, 4, dtype=torch.bool)
    wanted[2:4, 2:4] = True
    assert (changed == wanted).all()


def test_vectors_are_those_of_their_patch_in_an_image_that_is_not_square() -> None:
    """Six by four pixels, cut by hand; convolutions and maps are the modules' own."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 3, (2, 24))
    grid = tokens.view(2, 6, 4)
    encoder = PatchEncoder(IMAGE, 16)
    features = encoder.features((grid[:, None] == 2).float() * 2 - 1)  # black -1, white 1
    targets = PatchTargetEncoder(IMAGE, 3, 16)
    found, answers = encoder(tokens), targets(tokens)
    table = targets.pixels.weight * 4  # by the root of D
    for number in range(6):
        row, column = 2 * (number // 2), 2 * (number % 2)
        block = features[:, :, row : row + 2, column : column + 2]
        wanted = block.reshape(2, -1) @ encoder.map.weight.T + encoder.map.bias
        torch.testing.assert_close(found[:, number], wanted)
        pixels = grid[:, row : row + 2, column : column + 2].reshape(2, 4)
        # A place in the patch has three rows of the table: padding, black and white.
        looked_up = sum(table[3 * place + pixels[:, place]] for place in range(4)) / 2
        torch.testing.assert_close(answers[:, number], looked_up)


def test_the_encoder_sees_a_neighbourhood() -> None:
    torch.manual_seed(0)
    encoder = PatchEncoder((12, 12, 2), 16)
    tokens = torch.ones(1, 144, dtype=torch.int32)
    base = encoder(tokens)
    assert base.shape == (1, 36, 16)
    tokens[0, 0] = 2
    changed = (encoder(tokens) - base).abs().amax(-1)[0].view(6, 6)
    # Two 5x5 convolutions reach four pixels; group norm spreads a little everywhere.
    assert changed[0, 0] > 5 * changed[5, 5]


def test_parameters_of_the_papers_images_model() -> None:
    """Table 5: 10.486 M of the core, the two convolutions, the patch map and its decoder."""
    d, channels = 512, 256
    encoder = (25 * 1 + 1 + 2) * channels + (25 * channels + 1 + 2) * channels
    encoder += (4 * channels + 1) * d
    targets, decoder = 4 * 3 * d, d * 12
    core = 2 * 2 * (4 * d * d + 3 * d * d) + 4 * 3 * d * d
    heads = 2 * (d + 1) + d + 1
    model = GRAM(ModelConfig(prefix_tokens=0), TokenShape(784, 3, image=(28, 28, 2)))
    count = sum(p.numel() for p in model.parameters())
    assert count == core + encoder + targets + decoder + heads
    assert round(count / 1e6, 2) == 12.67


@pytest.mark.parametrize("core", ["attention", "mixer"])
def test_an_image_model_takes_one_transition(core: str) -> None:
    torch.manual_seed(0)
    shape = TokenShape(64, 3, image=(8, 8, 2))
    assert shape.positions == 16
    assert TokenShape.of({"length": 64, "vocab": 3, "puzzles": 1, "image": [8, 8, 2]}) == shape
    config = ModelConfig(dim=16, heads=2, ffn=16, layers=1, K=1, T=1, N_sup=1, core=core)
    model = GRAM(config, shape)
    tokens = torch.randint(1, 3, (2, 64), dtype=torch.uint8)
    e_x, e_y = model.embed(tokens), model.embed_answer(tokens)
    assert e_x.shape == e_y.shape == (2, 32, 16)
    state = model.recursion(model.initial_state(2), e_x)
    assert model.posterior(state.h, e_y).mean.shape == state.h.shape
    assert model.decode(state.h).shape == (2, 64, 3)
    content = e_y[:, 16:].detach()
    assert content.square().mean().sqrt() == pytest.approx(1.0, abs=0.2)
