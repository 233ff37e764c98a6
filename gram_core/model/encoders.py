"""From tokens to the vectors that the recursion works on, and back to logits (Tables 4 and 5).

A task of tokens has one position a token. A task of images has one position a patch of P x P
pixels; its pixels are tokens too (1 black, 2 white), so that targets and answers read the same.

Shapes: B batch, S tokens of an input (the pixels of an image, row-major), M positions (S, or the
patches), D width, V vocabulary, C channels, P side of a patch.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from gram_core.model.layers import SwiGLU, lecun_normal_, linear
from gram_core.shape import TokenShape

KERNEL = 5
GROUPS = 32


class TokenEncoder(nn.Embedding):
    """Rows drawn with standard deviation 1/sqrt(D) and scaled by sqrt(D): of unit RMS.

    A row is looked up by a matrix product. The gradient of torch's lookup, compiled, adds in the
    order that threads come in, and the same training run would end in other weights each time.
    """

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__(vocab, dim)
        lecun_normal_(self.weight, dim)

    def forward(self, tokens: Int[Tensor, "... S"]) -> Float[Tensor, "... S D"]:
        one_hot = F.one_hot(tokens.long(), self.num_embeddings).to(self.weight.dtype)
        out: Tensor = one_hot @ (self.weight * math.sqrt(self.embedding_dim))
        return out


class Identifiers(nn.Module):
    """Learned vectors of puzzles, zero at first.

    One alone is a parameter like any other. A table of many is a buffer, which an optimiser of its
    own moves (gram_core.train.identifiers): no dense gradient, no AdamW and no average.
    """

    weight: Tensor

    def __init__(self, puzzles: int, dim: int) -> None:
        super().__init__()
        vectors = torch.zeros(puzzles, dim)
        if puzzles > 1:
            self.register_buffer("weight", vectors)
        else:
            self.weight = nn.Parameter(vectors)

    def forward(self, puzzle: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        if len(self.weight) == 1:  # as above: no lookup, whose gradient adds in any order
            return self.weight.expand(len(puzzle), -1)
        return self.weight[puzzle]


class PatchEncoder(nn.Module):
    """Table 5: pixels in -1 and 1, twice (convolution 5x5, SiLU, group norm), patches, a linear
    map. D / 2 channels in at most 32 groups."""

    def __init__(self, image: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.height, self.width, self.patch = image
        channels = dim // 2
        groups = math.gcd(GROUPS, channels)
        layers: list[nn.Module] = []
        for fan_in in (1, channels):
            convolution = nn.Conv2d(fan_in, channels, KERNEL, padding=KERNEL // 2)
            lecun_normal_(convolution.weight, fan_in * KERNEL**2)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers += [convolution, nn.SiLU(), nn.GroupNorm(groups, channels)]
        self.features = nn.Sequential(*layers)
        self.map = linear(channels * self.patch**2, dim, bias=True)

    def forward(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B M D"]:
        pixels = (2.0 * tokens - 3.0).to(self.map.weight.dtype)
        features = self.features(pixels.view(-1, 1, self.height, self.width))
        patches = F.unfold(features, self.patch, stride=self.patch).transpose(1, 2)
        out: Tensor = self.map(patches)
        return out


class PatchTargetEncoder(nn.Module):
    """The posterior's view of a target image: for each patch the sum of its pixels' embeddings,
    one table for each place in the patch, divided by P: of unit RMS."""

    places: Tensor

    def __init__(self, image: tuple[int, int, int], vocab: int, dim: int) -> None:
        super().__init__()
        self.image = image
        area = image[2] ** 2
        self.pixels = TokenEncoder(vocab * area, dim)
        self.register_buffer("places", vocab * torch.arange(area)[:, None], persistent=False)

    def forward(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B M D"]:
        pixels = patchify(tokens[:, :, None], self.image) + self.places
        vectors: Tensor = self.pixels(pixels[..., 0])
        return vectors.sum(2) / self.image[2]


class PatchDecoder(nn.Module):
    """A linear map from each patch's vector to the logits of its pixels (gap G6)."""

    def __init__(self, image: tuple[int, int, int], dim: int, vocab: int) -> None:
        super().__init__()
        self.image, self.vocab = image, vocab
        self.map = linear(dim, vocab * image[2] ** 2)

    def forward(self, h: Float[Tensor, "B M D"]) -> Float[Tensor, "B S V"]:
        logits = self.map(h)
        return unpatchify(logits.view(*logits.shape[:2], -1, self.vocab), self.image)


def patchify(
    pixels: Shaped[Tensor, "B S X"], image: tuple[int, int, int]
) -> Shaped[Tensor, "B M Q X"]:
    """Pixels, row-major, as patches, row-major, of Q = P * P pixels each."""
    height, width, p = image
    grid = pixels.view(len(pixels), height // p, p, width // p, p, -1).transpose(2, 3)
    return grid.reshape(len(pixels), (height // p) * (width // p), p * p, -1)


def unpatchify(
    patches: Shaped[Tensor, "B M Q X"], image: tuple[int, int, int]
) -> Shaped[Tensor, "B S X"]:
    """The inverse of `patchify`."""
    height, width, p = image
    grid = patches.reshape(len(patches), height // p, width // p, p, p, -1).transpose(2, 3)
    return grid.reshape(len(patches), height * width, -1)


def input_encoder(shape: TokenShape, dim: int) -> nn.Module:
    """tokens -> e_x without its prefix."""
    if shape.image is None:
        return TokenEncoder(shape.vocab, dim)
    return PatchEncoder(shape.image, dim)


def target_encoder(shape: TokenShape, dim: int) -> nn.Module:
    """target -> e_y without its prefix."""
    if shape.image is None:
        return TokenEncoder(shape.vocab, dim)
    return PatchTargetEncoder(shape.image, shape.vocab, dim)


def decoder(kind: Literal["linear", "swiglu"], shape: TokenShape, dim: int, ffn: int) -> nn.Module:
    """h -> token logits. Table 4 says a linear map, the prose of B.1 a SwiGLU; both are here.
    Images have a linear one."""
    if shape.image is not None:
        return PatchDecoder(shape.image, dim, shape.vocab)
    return linear(dim, shape.vocab) if kind == "linear" else SwiGLU(dim, ffn, shape.vocab)
