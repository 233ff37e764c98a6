"""Floating-point operations that training and sampling cannot do without, counted analytically.

Two a multiplication of a matrix product; nothing else counts (norms, rotary embedding, softmax,
embeddings and the heads on one vector are below a hundredth). A backward is twice its forward, and
is counted only where a gradient is wanted: the last transition's rows that follow the posterior.

Symbols: D width, F hidden width, L positions.
"""

from gram_core.model.gram import ModelConfig


def block(model: ModelConfig, length: int) -> int:
    """One block's forward, a position."""
    d, f = model.dim, model.ffn
    channels = 6 * d * f
    if model.core == "mixer":
        return channels + 6 * d * f  # SwiGLU along L positions for D channels
    return channels + 8 * d * d + 4 * length * d


def recursion(model: ModelConfig, length: int) -> int:
    """The deterministic half of one transition, a position: K times f_L, once f_H."""
    return (model.K + 1) * model.layers * block(model, length)


def gaussian(model: ModelConfig) -> int:
    """A pair of heads, mean and deviation, a position; none without guidance."""
    count = {"full": 2, "none": 0}.get(model.guidance, 1)
    return count * 6 * model.dim * model.ffn


def training_step(model: ModelConfig, length: int, rows: int, prior_rows: int) -> int:
    """One supervision step of `rows` slots and its gradient, `rollout: prior`; the first
    `prior_rows` follow the prior throughout and send no gradient into the recursion."""
    all_of, charged = rows * length, (rows - prior_rows) * length
    forward = model.T * all_of * (recursion(model, length) + gaussian(model))
    posterior = charged * gaussian(model)
    backward = 2 * charged * (recursion(model, length) + 2 * gaussian(model))
    return forward + posterior + backward


def sampling_step(model: ModelConfig, length: int, rows: int) -> int:
    """One supervision step of `rows` trajectories."""
    return model.T * rows * length * (recursion(model, length) + gaussian(model))
