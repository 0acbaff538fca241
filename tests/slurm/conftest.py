import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from lab import Lab
from testbed import Testbed, missing


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    if programs := missing():
        _lacks(f"{', '.join(programs)} (apt-get install slurmctld slurmd slurm-client munge iproute2)")
    with Testbed() as testbed:
        yield testbed


@pytest.fixture(scope="session")
def testbed_of_hosts(testbed: Testbed) -> Testbed:
    """The same, where ranks of two nodes can meet."""
    if not testbed.has_hosts:
        _lacks("namespaces, as root of a machine has them (unshare --net): nodes with names of their own")
    return testbed


def _lacks(what: str) -> NoReturn:
    """A user's machine may; where CI runs, it is an error."""
    (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)(f"needs {what}")


@pytest.fixture
def slurm(testbed: Testbed) -> Iterator[Testbed]:
    """The cluster, idle before a test and after it."""
    yield testbed
    testbed.clear()


@pytest.fixture
def hosts(testbed_of_hosts: Testbed, slurm: Testbed) -> Testbed:
    return slurm


@pytest.fixture
def lab(hosts: Testbed, tmp_path: Path) -> Lab:
    return Lab(hosts, tmp_path)
