"""Settings that must be there before torch is loaded; and which tests may run at once."""

import os
from collections import Counter

import pytest

from pipelines.runtime import PATIENT

# Waiting OpenMP threads that spin slow every test down where another process is busy too.
os.environ.update(PATIENT)


@pytest.fixture(scope="session", autouse=True)
def as_in_every_process() -> None:
    """Products are computed in the same way whichever tests came before."""
    from gram_core.fused.library import fuse
    from gram_core.precision import wide_products

    wide_products()
    fuse()


def group(item: pytest.Item) -> str:
    """Which tests stay in one of two processes that share them: all that start a Ray, which would
    fight for cores and ports; else a module's, with their fixtures."""
    ray = item.get_closest_marker("ray") is not None
    return "ray" if ray else item.nodeid.split("::", maxsplit=1)[0]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark an item's group, before xdist reads it."""
    item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest group begins first, so that it is not the end of all: those that start a Ray,
    then modules with many tests. Raises `pytest.UsageError` where xdist has lost the groups."""
    if items and getattr(config.option, "loadgroup", False) and "@" not in items[0].nodeid:
        raise pytest.UsageError("pytest-xdist lost the tests' groups; install the locked pytest")
    size = Counter(map(group, items))
    items.sort(key=lambda item: (group(item) != "ray", -size[group(item)]))
