from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks

WAITING = ("faults", "slurm")  # folders of tests that wait, most of the time, for something to end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes, as `make test` starts: what waits runs beside what computes, which has the one pool of ranks."""
    for item in items:
        group = "waiting" if Path(item.path).parent.name in WAITING else "computing"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()
