"""The rehearsal of `make gpu` on a CPU, and a round of `make bench`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.measure.record import read_record

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("gpu")
    return out, run("gpu.py", "--tiny", "--sample", "--out", str(out))


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_kernel_is_proven_or_refused_with_a_reason(rehearsed: tuple[Path, str]) -> None:
    kernels = results(rehearsed[0] / "kernels")
    assert len(kernels) == 2
    failed = [name for name, case in kernels.items() if case["error"]]
    assert failed == ["attention-cudnn"] or torch.cuda.is_available()
    for name in kernels.keys() - set(failed):
        assert kernels[name]["passed"] and kernels[name]["trained_passed"], kernels[name]


def test_the_ladder_runs_or_says_what_it_lacks(rehearsed: tuple[Path, str]) -> None:
    records = [read_record(path) for path in (rehearsed[0] / "one-gpu").glob("*/record.json")]
    assert len(records) == 12
    refused = [record["recipe"]["name"] for record in records if record["status"] == "refused"]
    assert refused == ["attention-cudnn"] or torch.cuda.is_available()
    for record in records:
        assert record["status"] == "refused" or record["parity"]["passed"], record["reason"]


def test_a_rank_of_each_large_layout_holds_what_its_dry_run_says(rehearsed: tuple[Path, str]) -> None:
    large = results(rehearsed[0] / "large")
    assert len(large) == 2
    for case in large.values():
        assert case["error"] is None, case
        assert case["step_seconds"] > 0
        assert case["tracked"]["peak_bytes"] == pytest.approx(case["predicted"]["peak_bytes"], rel=0.02)


def test_ranks_that_share_a_device_are_proven(rehearsed: tuple[Path, str]) -> None:
    shared = results(rehearsed[0] / "shared")
    assert len(shared) == 2 and not any(case["error"] for case in shared.values())
    assert all(case["passed"] and case["trained_passed"] for case in shared.values())


def test_what_is_there_is_not_run_again(rehearsed: tuple[Path, str]) -> None:
    out, said = rehearsed
    before = {path: path.stat().st_mtime_ns for path in (out / "shared").glob("*.json")}
    again = run("gpu.py", "--tiny", "--sample", "--out", str(out), "--only", "3")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "ddp2" in said and "ddp2" in again


@pytest.mark.parametrize(
    "case", ["fsdp2", *(pytest.param(case, marks=pytest.mark.long) for case in ("ddp2", "tp2", "pp2"))]
)
def test_a_round_against_a_loop_by_hand(case: str) -> None:
    row = run("bench.py", "--rounds", "1", "--steps", "4", case).splitlines()[-1].split()
    assert row[0] == case and all(float(number) > 0 for number in (row[1], row[2]))
