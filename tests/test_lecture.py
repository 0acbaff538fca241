"""docs/lecture.md: each of its commands is one, and what it shows of an output is what comes out."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import COMMANDS, _parse, main
from launch.compare import is_comparison, load_comparison
from parallel.foresight.workload import bubble
from parallel.recipe import load_recipe, read_toml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lecture.md").read_text(encoding="utf-8")


def commands() -> dict[str, list[str]]:
    """Of the page: each line after a `$`, and the lines that follow it; blank ones left out."""
    found: dict[str, list[str]] = {}
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        for line in filter(None, block.splitlines()):
            if line.startswith("$ "):
                found[line[2:]] = shown = []
            else:
                shown.append(line)
    return found


SHOWN = commands()
DRY_RUNS = [line for line in SHOWN if line.startswith("lab dry-run") and "--cluster" not in line]
FORETOLD = [
    pytest.param(line, marks=[] if line.endswith("=32 --world-size 64") else pytest.mark.long)
    for line in SHOWN
    if "lab dry-run" in line and "--cluster" in line
]
QUICK = ("strategies/fsdp", "strategies/hsdp", "cp-ulysses", "strategies/tp", "n_layers=4", "train.global_batch=4")
COUNTED = [
    pytest.param(line, marks=[] if any(part in line for part in QUICK) and "lecture" not in line else pytest.mark.long)
    for line in DRY_RUNS
]


@pytest.fixture(autouse=True)
def from_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_experiment_passes_lab_check_and_is_in_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(path.as_posix() for path in Path("recipes/lecture").iterdir())
    assert main(["check", *files]) == 0, capsys.readouterr().err
    assert [file for file in files if f"{file}\n" not in PAGE and f"{file} " not in PAGE] == []


def test_thirteen_claims_each_have_a_command_and_a_verdict() -> None:
    claims = re.split(r"^## (?=\d)", PAGE, flags=re.MULTILINE)[1:]
    assert [claim.split(".")[0] for claim in claims] == [str(n) for n in range(1, 14)]
    for claim in claims:
        title = claim.splitlines()[0]
        assert "\n> " in claim and re.search(r"\blab (check|compare|dry-run|plan) ", claim), title
        assert re.search(r"^\*\*.*(holds|simplification|wrong by today's practice)", claim, re.M | re.I), title


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("lab ")])
def test_a_command_of_the_page_is_one(line: str) -> None:
    arguments = _parse(shlex.split(line)[1:])
    assert arguments.command in COMMANDS
    file = arguments.recipe if "recipe" in arguments else arguments.comparison if "comparison" in arguments else None
    if file is not None and is_comparison(read_toml(file)):
        names = [variant.name for variant in load_comparison(file, arguments.set).variants]
        assert [name for name in names if not any(row.startswith(f"{name} ") for row in SHOWN[line])] == []
    elif file is not None:
        load_recipe(file, arguments.set)


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("lab check")])
def test_what_a_check_says(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(line)[1:])
    assert "".join(capsys.readouterr()).splitlines() == SHOWN[line]


@pytest.mark.parametrize("line", COUNTED)
def test_what_a_dry_run_counts(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)[1:]) == 0
    counted = capsys.readouterr().out.splitlines()
    assert [row for row in SHOWN[line] if row not in counted] == [], "\n".join(counted)


@pytest.mark.parametrize("line", FORETOLD)
def test_what_is_foretold(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Within a tenth, for the constants are fitted anew now and then."""
    assert main(shlex.split(line)[1:]) == 0
    now = foretold(capsys.readouterr().out.splitlines())
    assert SHOWN[line]
    for what, figure in foretold(SHOWN[line]).items():
        assert now[what] == pytest.approx(figure, rel=0.1), what


def foretold(rows: list[str]) -> dict[str, float]:
    """Seconds of the step, MFU, and seconds of each part that is shown."""
    found = {}
    for row in rows:
        if step := re.match(r"foretold for \w+, by .*: ([\d.]+) s a step .* MFU ([\d.]+) %", row):
            found |= {"step": float(step[1]), "MFU": float(step[2])}
        elif part := re.match(r"(\w[a-z ]*\w) +([\d.e-]+) s ", row):
            found[part[1]] = float(part[2])
    return found


def test_the_arithmetic_of_a_peak() -> None:
    (line,) = (line for line in SHOWN if line.startswith("python -c "))
    done = subprocess.run([sys.executable, *shlex.split(line)[1:]], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == SHOWN[line]


@pytest.mark.parametrize("m", [1, 4, 8, 16])
def test_the_bubbles_of_the_table(m: int) -> None:
    ideal = []
    for schedule, stages in (("gpipe", 1), ("interleaved-1f1b", 2), ("zbv", 2)):
        idle = 3 * float(bubble(schedule, pp=4, stages_per_rank=stages, m=m))
        ideal.append(f"{100 * idle / (m + idle):.1f} %")
    assert f"| {m} | {' | '.join(ideal)} |" in PAGE
