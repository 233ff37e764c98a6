"""Ray Train's trainer, without what a run of ours, or a local Ray, has no use for."""

from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from pipelines.runtime import cluster_address

# Of Ray Train's own callbacks: training reads no dataset of Ray Data's, whose manager is an actor
# that workers would wait for. On a local Ray placement groups end with the driver that started it;
# Ray's own cleaner of those asks the dashboard after the controller, which a local Ray has none of,
# and holds up the end of each training by 12 seconds.
IDLE = ("DatasetsCallback",)
IDLE_ALONE = (*IDLE, "PlacementGroupCleanerCallback")


class AsItIs(FixedScalingPolicy):
    """As many workers as are asked for, on a machine that does not grow: nobody is asked to make
    place for them, by an actor that all would wait for."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """There is nothing to ask."""

    def _maybe_send_resource_request(self) -> None:
        """Nor later."""


class Trainer(TorchTrainer):
    """`TorchTrainer`, with the processes that train."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = IDLE if cluster_address() else IDLE_ALONE
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in idle]

    def _initialize_and_run_controller(self, **named: Any) -> Result:
        if not cluster_address():
            named["scaling_policy"] = AsItIs(self.scaling_config)
        return super()._initialize_and_run_controller(**named)
