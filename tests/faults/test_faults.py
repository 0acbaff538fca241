"""A sample of `make faults`: each kind of fault, under a strategy of each family (no mix); and five kills in a row."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import KINDS, Watched, kills, meet, strategies, undisturbed

# strategy -> the rank that meets them, and kinds of fault
SAMPLE = {
    "single": (0, ("SIGKILL", "full disk", "damaged pointer")),
    "ddp": (2, ("exit 0", "SIGUSR1", "out of memory")),
    "hsdp": (3, ("NaN", "SIGKILL", "lost peers")),
    "tp-sp": (0, ("exception", "SIGTERM", "straggler")),
    "pp-zbv": (1, ("hang", "damaged checkpoint")),
    "cp-ring": (3, ("lost store", "full disk")),
}


@pytest.fixture(scope="module")
def starter() -> Iterator[Watched]:
    with Watched() as starter:
        yield starter


@pytest.mark.parametrize("strategy", SAMPLE)
def test_a_fault_is_survived_to_the_digit_or_told(starter: Watched, tmp_path: Path, strategy: str) -> None:
    recipe = strategies()[strategy]
    rank, kinds = SAMPLE[strategy]
    expected = undisturbed(recipe, tmp_path / "undisturbed", starter)
    wrong = {kind: meet(kind, rank, recipe, tmp_path / kind, starter, expected) for kind in kinds}
    assert wrong == dict.fromkeys(kinds)


def test_the_sample_has_each_kind() -> None:
    assert {kind for _, kinds in SAMPLE.values() for kind in kinds} == KINDS.keys()


def test_five_kills_in_a_row_change_nothing(starter: Watched, tmp_path: Path) -> None:
    came = kills(5, tmp_path, starter)
    assert came["exact"] and came["left_running"] == [], came
    assert came["kills"] == 5 and came["lives"] >= 6


def test_the_harness_sees_a_run_that_is_not_the_same(starter: Watched, tmp_path: Path) -> None:
    recipe = strategies()["single"]
    expected = undisturbed(recipe, tmp_path / "undisturbed", starter)
    others = [*expected[:-1], (8, expected[-1][1] + 1e-7, expected[-1][2])]
    wrong = meet("straggler", 0, recipe, tmp_path / "a", starter, others)
    assert wrong == "other losses or gradient norms than undisturbed"


def test_make_faults_prints_and_stores_its_table(tmp_path: Path) -> None:
    harness = Path(__file__).with_name("faults.py")
    options = ("--kills", "0", "--strategies", "single", "--kinds", "exception", "--table", str(tmp_path / "table.md"))
    command = [sys.executable, str(harness), "--out", str(tmp_path / "runs"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "single, exception: exact, restarted" in done.stdout, done.stderr
    assert "| exception | exact, restarted | 1 of 1 |" in (tmp_path / "table.md").read_text()
