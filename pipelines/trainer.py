"""Ray Train's trainer, without what a local Ray has no use for."""

from typing import Any

from ray.train.torch import TorchTrainer

from pipelines.runtime import cluster_address


class Trainer(TorchTrainer):
    """`TorchTrainer`, whose placement groups on a local Ray end with the driver that started it.
    Ray's own cleaner of those asks the dashboard after the controller, which a local Ray has none
    of, and holds up the end of each training by 12 seconds."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if cluster_address():
            return callbacks
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]
