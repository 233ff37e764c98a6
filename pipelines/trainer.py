"""Ray Train's trainer, without what a local Ray has no use for."""

import os
from typing import Any

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """`TorchTrainer`, whose placement groups on a local Ray end with the driver that started it.
    Ray's own cleaner of those asks the dashboard after the controller, which a local Ray has none
    of, and holds up the end of each training by 12 seconds."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if "RAY_ADDRESS" in os.environ:
            return callbacks
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]
