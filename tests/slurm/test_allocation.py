"""An allocation of three nodes is looked over; one link of them is dead."""

import sys
from pathlib import Path

from testbed import Testbed


def test_a_dead_link_is_named_and_the_rest_is_well(hosts: Testbed, tmp_path: Path) -> None:
    lab = (sys.executable, "-P", "-m", "launch.cli", "preflight", "--out", str(tmp_path))
    well = hosts("salloc", "--nodes=3", *lab)
    assert "ok   3 of 3 hosts answered: n1, n2, n3" in well.stdout and "bad" not in well.stdout
    hosts("ip", "-n", "n2", "route", "add", "blackhole", "10.213.0.3/32")
    try:
        answer = hosts("salloc", "--nodes=3", *lab, check=False)
    finally:
        hosts("ip", "-n", "n2", "route", "del", "blackhole", "10.213.0.3/32")
    bad = [line for line in answer.stdout.splitlines() if line.startswith("bad")]
    assert answer.returncode == 1 and len(bad) == 3
    assert bad[0].startswith("bad  link n2 -> n3: ") and bad[1] == "bad  link n3 -> n2: timed out"
    assert bad[2].endswith("not tried, as not every host reaches every other")


def test_without_an_allocation_it_says_how_to_get_one(slurm: Testbed) -> None:
    answer = slurm(sys.executable, "-P", "-m", "launch.cli", "preflight", check=False)
    assert answer.returncode == 2
    assert answer.stderr == "lab: no allocation; begin one with salloc --nodes=2, or use lab submit --preflight\n"
