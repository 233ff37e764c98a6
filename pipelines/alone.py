"""A local Ray with the processes that work, and without those that only a cluster has a use for.

Ray starts one that makes a cluster grow, one that serves its dashboard's address, and one that
reads the workers' logs; Ray Data starts three actors more: one that asks the cluster to grow, one
that knows which node each worker is on, and one that tells the dashboard how far it is. On one
machine, without a dashboard, nobody asks them. Each needs seconds of a core to begin, and an actor
some of one as long as it lives (docs/performance.md). No setting leaves them out.

What stands here in place of Ray's own parts is of the locked version; tests see that it holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Self
from uuid import uuid4

from pipelines.runtime import cluster_address


@contextmanager
def few_processes() -> Iterator[None]:
    """A Ray that is started within, for this machine alone, is a store, a raylet and its agents."""
    from ray._private import node, parameter

    # Where what a dashboard needs is installed, agents ask for its server all the time.
    served = all(map(find_spec, ("aiohttp_cors", "opencensus")))

    class Parameters(parameter.RayParams):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.no_monitor = True
            self.include_log_monitor = False

    server = () if served else ((node.Node, "start_api_server", lambda self, **named: None),)
    with _standing_in((parameter, "RayParams", Parameters), *server):
        yield


@contextmanager
def few_actors() -> Iterator[None]:
    """What Ray Data does within is done by the workers alone, where no cluster is named."""
    if cluster_address():
        yield
        return
    import ray
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool

    class AsItIs(ClusterAutoscaler):
        """A machine that does not grow."""

        def __init__(self) -> None:
            self.total = ExecutionResources.from_resource_dict(ray.cluster_resources())

        def try_trigger_scaling(self) -> None:
            """There is nothing to ask."""

        def on_executor_shutdown(self) -> None:
            """There is nothing to take back."""

        def get_total_resources(self) -> ExecutionResources:
            return self.total

    with _standing_in(
        (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: AsItIs()),
        (pool, "get_or_create_actor_location_tracker", Nobody),
        (pool, "get_actor_locations", lambda workers: {}),
        (stats, "get_or_create_stats_actor", Nobody),
        (stats._StatsManager, "gen_dataset_id_from_stats_actor", lambda: uuid4().hex),
    ):
        yield


class Nobody:
    """In place of an actor that nobody asks: takes every message, and does nothing."""

    def __getattr__(self, name: str) -> Self:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def remote(self, *arguments: Any, **named: Any) -> None:
        """What is told is forgotten."""


@contextmanager
def _standing_in(*stand_ins: tuple[Any, str, Any]) -> Iterator[None]:
    """Put something else in place of attributes of modules or classes, for a while."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
