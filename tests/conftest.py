"""Settings that must be there before torch is loaded; and which tests may run at once."""

import os

import pytest

from pipelines.runtime import PATIENT

# Waiting OpenMP threads that spin slow every test down where another process is busy too.
os.environ.update(PATIENT)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Of two processes that share the tests, one takes all that start a Ray, which would fight for
    cores and ports; a module's other tests, with their fixtures, stay together."""
    ray = item.get_closest_marker("ray") is not None
    group = "ray" if ray else item.nodeid.split("::", maxsplit=1)[0]
    item.add_marker(pytest.mark.xdist_group(group))
