"""What every process that trains or samples does before it computes."""

import torch

from gram_core.fused.library import fuse
from gram_core.precision import wide_products


def compute_with(cores: int) -> None:
    """Compute with `cores` threads, float32 at the processor's full width, fused operations; on a
    GPU float32's convolutions, too, are those of float32."""
    torch.set_num_threads(cores)
    # By default torch rounds their factors to TF32, which it does not for other products.
    torch.backends.cudnn.allow_tf32 = False
    wide_products()
    fuse()
