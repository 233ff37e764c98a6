"""Our training settings as a DeepSpeed configuration: one pure function, no numbers of its own."""

from typing import Any

from gram_core.train.loop import TrainConfig


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` takes.

    The optimiser is ours and handed in, precision is autocast inside the model, so neither stands
    here. Every worker holds the whole state (ZeRO stage 0): models of this size gain nothing from
    sharding, and the checkpoint stays readable without unpickling objects.
    """
    return {
        "train_micro_batch_size_per_gpu": config.batch // config.workers,
        "train_batch_size": config.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        # Logging is ours: DeepSpeed's own lines start after the last step, that is never.
        "steps_per_print": config.steps + 1,
        "wall_clock_breakdown": False,
    }
