"""What every process that trains or samples does before it computes."""

import torch

from gram_core.fused.library import fuse
from gram_core.precision import wide_products


def compute_with(cores: int) -> None:
    """Compute with `cores` threads, float32 at the processor's full width, fused operations."""
    torch.set_num_threads(cores)
    wide_products()
    fuse()
