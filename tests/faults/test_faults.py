"""A tenth of `make faults`: each kind of fault, under a strategy of each family; and ten kills in a row."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import KINDS, Watched, kills, meet, strategies, undisturbed

# strategy -> kinds of fault, and the rank that meets them
TENTH = {
    "single": (0, ("SIGKILL", "full disk", "damaged pointer")),
    "ddp": (2, ("exit 0", "SIGUSR1", "out of memory")),
    "hsdp": (3, ("NaN", "SIGKILL", "lost peers", "damaged checkpoint")),
    "tp-sp": (0, ("exception", "SIGTERM", "damaged pointer", "straggler")),
    "pp-zbv": (1, ("SIGKILL", "damaged checkpoint", "SIGTERM", "exit 0")),
    "cp-ring": (3, ("lost store", "full disk", "exception")),
    "pp-tp": (2, ("hang", "straggler", "SIGKILL", "NaN")),
}


@pytest.fixture(scope="module")
def starter() -> Iterator[Watched]:
    with Watched() as starter:
        yield starter


@pytest.mark.parametrize("strategy", TENTH)
def test_a_fault_is_survived_to_the_digit_or_told(starter: Watched, tmp_path: Path, strategy: str) -> None:
    recipe = strategies()[strategy]
    rank, kinds = TENTH[strategy]
    expected = undisturbed(recipe, tmp_path / "undisturbed", starter)
    wrong = {kind: meet(kind, rank, recipe, tmp_path / kind, starter, expected) for kind in kinds}
    assert wrong == dict.fromkeys(kinds)


def test_a_tenth_has_each_kind() -> None:
    assert {kind for _, kinds in TENTH.values() for kind in kinds} == KINDS.keys()
    assert sum(len(kinds) for _, kinds in TENTH.values()) >= len(strategies()) * len(KINDS) / 10 - 1


def test_ten_kills_in_a_row_change_nothing(starter: Watched, tmp_path: Path) -> None:
    came = kills(10, tmp_path, starter)
    assert came["exact"] and came["left_running"] == [], came
    assert came["kills"] == 10 and came["lives"] >= 11


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
