"""The cluster of these tests is a real one, and leaves nothing behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from testbed import NODES, Testbed, wait_until

KILLED = """
import os, signal, sys
from testbed import Testbed
with Testbed(hosts=sys.argv[1] == "hosts") as slurm:
    slurm("sbatch", "--wrap=setsid sleep 4711 & sleep 4711", "--output=/dev/null")
    print(slurm.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _processes(text: str) -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if text in line]


def test_every_node_is_a_host_with_a_name_and_a_network_of_its_own(hosts: Testbed) -> None:
    answer = hosts("srun", "--nodes=4", "sh", "-c", "hostname; cat /sys/class/net/eth0/address 2>&1; ls /dev/shm")
    assert set(NODES) <= set(answer.stdout.split())
    assert hosts("srun", "--nodes=1", "getent", "hosts", "n3").stdout.split() == ["10.213.0.3", "n3"]


def test_a_job_gets_the_gpus_it_asks_for(slurm: Testbed) -> None:
    answer = slurm("srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", "echo $SLURM_GPUS_ON_NODE")
    assert answer.stdout.split() == ["2", "2"]
    answer = slurm("srun", "--ntasks=2", "--gpus-per-task=1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert sorted(answer.stdout.split()) == ["0", "1"]


def test_a_node_and_the_controller_die_and_come_back(hosts: Testbed) -> None:
    for name in ("n4", "slurmctld"):
        hosts.do(f"kill {name}")
        hosts.do(f"start {name}")
    # A controller that dies may forget its last numbers of jobs, and a node refuses one that it knows to be over.
    command = ("srun", "--nodelist=n4", "hostname")
    wait_until(lambda: "n4" in hosts(*command, check=False).stdout, 20, lambda: hosts(*command, check=False).stderr)


@pytest.mark.parametrize("where", ["hosts", "no hosts"])
def test_a_cluster_whose_tests_are_killed_leaves_no_process_and_no_file(testbed: Testbed, where: str) -> None:
    program = subprocess.run(
        [sys.executable, "-c", KILLED, where], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert program.returncode == -signal.SIGKILL, program.stderr
    folder = program.stdout.strip()
    wait_until(lambda: not Path(folder).exists(), 20, f"{folder} is left")
    wait_until(lambda: not _processes(folder) and not _processes("sleep 4711"), 20, "processes are left")
