"""What a preflight finds in what hosts report."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import findings
from launch.starting import free_port


def reports(n_hosts: int = 4) -> dict[int, dict[str, Any]]:
    gpus = [{"name": "Test GPU", "free_bytes": 79 * 2**30, "total_bytes": 80 * 2**30}] * 2
    return {
        rank: {
            "host": f"n{rank + 1}",
            **{"torch": "2.13.0", "driver": "570.1", "gpus": gpus, "free_bytes": 2**38, "folder": None},
            "links": {other: 1e-4 for other in range(n_hosts) if other != rank},
            "clock_seconds": None if rank == 0 else 1e-3,
            "all_reduce": {"backend": "nccl", "seconds": 0.001},
        }
        for rank in range(n_hosts)
    }


def bad(found: list[tuple[bool, str]]) -> list[str]:
    return [text for ok, text in found if not ok]


def test_hosts_that_are_well_have_a_line_for_each_thing_that_was_looked_at() -> None:
    found = findings(reports(), 4, "runs")
    assert bad(found) == []
    text = "\n".join(line for _, line in found)
    for part in ("4 of 4 hosts answered: n1, n2, n3, n4", "torch: 2.13.0", "GPU driver: 570.1", "2 x Test GPU"):
        assert part in text
    for part in (
        "256.0 GiB free",
        "clocks: at most 1.0 ms",
        "links: 12, 0.10 ms",
        "runs is seen by all",
        "nccl: 1.0 ms",
    ):
        assert part in text


def test_each_thing_that_is_not_well_is_named_with_its_host() -> None:
    broken = reports()
    broken[1] |= {"torch": "2.11.0", "clock_seconds": -3.5, "folder": "is not the same folder there"}
    broken[2] |= {"driver": "560.2", "gpus": broken[2]["gpus"][:1]}
    broken[2]["links"][3] = "timed out"
    broken[3]["links"][0] = 0.02
    broken[3]["gpus"] = [{"name": "Test GPU", "free_bytes": 20 * 2**30, "total_bytes": 80 * 2**30}] * 2
    broken[3]["all_reduce"] = None
    found = bad(findings(broken, 5, "runs"))
    expected = [
        "no answer in 15 s from the hosts of ranks 4",
        "torch: n1 has 2.13.0; n2 has 2.11.0; n3 has 2.13.0; n4 has 2.13.0",
        "GPU driver: n1 has 570.1; n2 has 570.1; n3 has 560.2; n4 has 570.1",
        "GPUs: n1 has 2 x Test GPU; n2 has 2 x Test GPU; n3 has 1 x Test GPU; n4 has 2 x Test GPU",
        "n4: GPU 0 has 20.0 of 80.0 GiB free",
        "n4: GPU 1 has 20.0 of 80.0 GiB free",
        "clocks: at most 3500.0 ms between n2 and n1",
        "link n3 -> n4: timed out",
        "link n4 -> n1: 20.00 ms there and back, where 0.10 ms are usual",
        "n2: runs is not the same folder there",
        "all-reduce of 4 MiB over the hosts: not tried, as not every host reaches every other",
    ]
    assert found == expected


@pytest.mark.parametrize("missing", [False, True])
def test_two_processes_look_at_each_other(tmp_path: Path, missing: bool) -> None:
    with free_port() as port:
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        command = [sys.executable, "-P", "-m", "launch.preflight", "--out", str(tmp_path / "runs")]
        started = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(1 if missing else 2)
        ]
        said, _ = started[0].communicate(timeout=60)
        codes = [process.wait(60) for process in started]
        for process in started:
            assert process.stdout
            process.stdout.close()
    assert codes == [1] if missing else [0, 0]
    assert ("bad  no answer in 15 s from the hosts of ranks 1" in said) == missing, said
    assert ("ok   all-reduce of 4 MiB over the hosts by gloo" in said) != missing, said
    assert list(tmp_path.rglob(".preflight*")) == []
