"""What every process that trains or samples does before it computes."""

import gc

import torch

from gram_core.fused.library import fuse
from gram_core.precision import wide_products
from pipelines.runtime import COLLECTING


def compute_with(cores: int) -> None:
    """Compute with `cores` threads, float32 at the processor's full width, fused operations; and
    with Python's garbage collected as by default, imports being done."""
    gc.set_threshold(*COLLECTING)
    torch.set_num_threads(cores)
    wide_products()
    fuse()
