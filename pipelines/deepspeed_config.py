"""Our training settings as a DeepSpeed configuration: one pure function, no numbers of its own."""

from typing import Any, Literal

from gram_core.train.loop import TrainConfig


def deepspeed_config(config: TrainConfig, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` takes; `precision` is the run's, `auto` decided.

    The optimiser is ours and handed in. bf16 is autocast over float32 weights; gradients are
    reduced in float32 (no module is named safe for less), so that workers add only rounding.
    """
    return {
        "train_micro_batch_size_per_gpu": config.batch // config.parts,
        "train_batch_size": config.batch,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # Logging is ours: DeepSpeed's own lines start after the last step, that is never.
        "steps_per_print": config.steps + 1,
        "wall_clock_breakdown": False,
    }
