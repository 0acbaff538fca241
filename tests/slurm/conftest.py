import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab
from testbed import Testbed, missing


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    if programs := missing():
        reason = f"needs {', '.join(programs)} (apt-get install slurmctld slurmd slurm-client munge iproute2)"
        (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)(reason)
    with Testbed() as testbed:
        yield testbed


@pytest.fixture
def slurm(testbed: Testbed) -> Iterator[Testbed]:
    """The cluster, idle before a test and after it."""
    yield testbed
    testbed.clear()


@pytest.fixture
def hosts(slurm: Testbed) -> Testbed:
    """The same, where ranks of two nodes can meet."""
    if not slurm.has_hosts:
        pytest.skip("needs namespaces, as root of a machine has them (unshare --net): nodes with names of their own")
    return slurm


@pytest.fixture
def lab(hosts: Testbed, tmp_path: Path) -> Lab:
    return Lab(hosts, tmp_path)
