"""Every kind of fault under every strategy: `make faults`, or some of it, as tests/faults/test_faults.py runs.

Each cell is a real run of four ranks (one: `single`) of 8 steps, saved after every second, in which one rank meets the
fault at step 6. Its losses and gradient norms must be those of the undisturbed run, to the digit; or it must have
stopped with the line that says why.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from launch.compare import load_comparison  # noqa: E402
from launch.starting import Rank, Starter  # noqa: E402
from launch.supervisor import Stopped, supervise  # noqa: E402
from launch.table import short_layout  # noqa: E402
from parallel.measure.record import available_cores, environment, read_record, read_steps  # noqa: E402
from parallel.recipe import Recipe  # noqa: E402

SETTINGS = (
    *("model.preset=none", "model.n_layers=8", "model.d_model=32", "model.n_heads=8", "model.n_kv_heads=4"),
    *("model.d_ff=48", "model.vocab_size=68", "data.source=synthetic", "train.seq_len=16", "train.parity=false"),
    *("train.steps=8", "checkpoint.every=2", "train.time_limit_seconds=120", "train.grad_clip=0.1"),
)
HANG_SECONDS = 12.0  # time limit of a life in which a rank hangs, and of the next
FAULT_STEP = 6  # steps 2 and 4 have been saved
OPTIONS = ("--matmul", "highest")


@dataclass(frozen=True)
class Kind:
    lives: int  # of the run; a life that is not the last ended with the fault
    says: str  # a pattern of how the first one ended
    end: str  # in the table


RESTARTED, WENT_ON, SAVED, STOPPED = (
    "exact, restarted",
    "exact, went on",
    "exact, saved and resumed",
    "stopped, says why",
)
KINDS = {
    "exception": Kind(2, r"failed: rank {r}: ValueError: an injected fault", RESTARTED),
    "SIGKILL": Kind(2, r"failed: rank {r} was killed by SIGKILL", RESTARTED),
    "SIGTERM": Kind(2, r"failed: stopped by SIGTERM after step 6, and saved: --resume goes on", SAVED),
    "SIGUSR1": Kind(2, r"failed: stopped by SIGUSR1 after step 6, and saved: --resume goes on", SAVED),
    "straggler": Kind(1, "done", WENT_ON),
    "hang": Kind(2, rf"timeout: not done in {HANG_SECONDS:g} s .*ranks? .*{{r}} gave no stack", RESTARTED),
    "exit 0": Kind(
        2, r"failed: (rank {r} ended with exit code 0 before|every rank ended well, but none wrote)", RESTARTED
    ),
    "NaN": Kind(1, r"failed: rank \d: Diverged: step 6 gave loss \S+ and gradient norm nan", STOPPED),
    "out of memory": Kind(2, r"oom: rank {r}: RuntimeError: .*can't allocate memory", RESTARTED),
    "full disk": Kind(
        2, r"failed: .*checkpoint step-00000006 cannot be written \(rank {r}: .*No space left", RESTARTED
    ),
    "damaged checkpoint": Kind(2, r"failed: rank {r} was killed by SIGKILL", RESTARTED),
    "damaged pointer": Kind(2, r"failed: rank {r} was killed by SIGKILL", RESTARTED),
    "lost store": Kind(1, "done", WENT_ON),  # nobody needs it once the groups are there
    "lost peers": Kind(2, r"failed: rank \d(: .*| ended with exit code 1)", RESTARTED),
}


def wanted_of(kind: str, recipe: Recipe) -> Kind:
    return KINDS["lost store" if kind == "lost peers" and recipe.world_size == 1 else kind]  # it has no peers


class Watched(Starter):
    """A Starter that remembers what it has started."""

    def __init__(self) -> None:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "injected"), str(ROOT)])
        super().__init__()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
        self.ranks: list[Rank] = []

    def start(self, *arguments: Any, **settings: Any) -> Rank:
        self.ranks.append(super().start(*arguments, **settings))
        return self.ranks[-1]

    def left_running(self) -> list[int]:
        """Sessions of ranks in which something lives."""
        sessions = {rank.process.pid for rank in self.ranks}
        found = subprocess.run(["ps", "-eo", "sess=,stat=,pid="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in found.splitlines()]
        return [int(pid) for session, state, pid in rows if int(session) in sessions and state[0] != "Z"]


def strategies() -> dict[str, Recipe]:
    comparison = load_comparison(ROOT / "recipes" / "compare" / "strategies.toml", SETTINGS)
    return {variant.name: variant.recipe for variant in comparison.variants if variant.recipe is not None}


def digits(run: Path) -> list[tuple[Any, ...]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in read_steps(run / "steps.jsonl")]


def undisturbed(recipe: Recipe, out: Path, starter: Starter) -> list[tuple[Any, ...]]:
    out.mkdir(parents=True)
    record = supervise(recipe, out=out, starter=starter, options=OPTIONS)
    assert record["status"] == "ok", record["reason"]
    steps = digits(out / recipe.name)
    assert len(steps) == recipe.train.steps
    return steps


def meet(kind: str, rank: int, recipe: Recipe, out: Path, starter: Watched, expected: Sequence[Any]) -> str | None:
    """Runs `recipe` with that fault at that rank; None where it ended as KINDS says, else what was wrong."""
    out.mkdir(parents=True)
    (out / "fault.json").write_text(json.dumps({"kind": kind, "rank": rank, "step": FAULT_STEP}))
    if kind == "hang":
        recipe = replace(recipe, train=replace(recipe.train, time_limit_seconds=HANG_SECONDS))
    starter.ranks.clear()
    try:
        supervise(recipe, out=out, starter=starter, options=OPTIONS, max_restarts=2)
    except Stopped:
        supervise(recipe, out=out, starter=starter, options=[*OPTIONS, "--resume"], resume=True)
    record = read_record(out / recipe.name / "record.json")
    lives, steps = record["checkpoint"]["lives"], digits(out / recipe.name)
    ends = [life["ended"] for life in lives]
    if not (out / "fault.met").exists():
        return f"the fault was not met: {ends}"
    wanted = wanted_of(kind, recipe)
    if len(lives) != wanted.lives or not re.match(wanted.says.format(r=rank), ends[0]):
        return f"lives ended so: {ends}"
    if starter.left_running():
        return f"left running: {starter.left_running()}"
    if wanted.end == STOPPED:
        return None if record["status"] == "failed" and steps[:-1] == expected[: FAULT_STEP - 1] else "other steps"
    if record["status"] != "ok" or not record["goodput"]["fraction"]:
        return f"{record['status']}: {record['reason']}"
    return None if steps == list(expected) else "other losses or gradient norms than undisturbed"


def n_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kills(n: int, out: Path, starter: Watched, *, seed: int = 0) -> dict[str, Any]:
    """A run whose ranks are killed n times, each time one of them at a random moment; what came of it.

    The moment lies within 4 s, and within a few steps: however fast the steps, the run lives to be killed n times.
    """
    recipe = strategies()["fsdp"]
    steps = 4 * n
    recipe = replace(recipe, train=replace(recipe.train, steps=steps, time_limit_seconds=1200.0))
    expected = undisturbed(recipe, out / "undisturbed", starter)
    chance, done, n_killed = random.Random(seed), threading.Event(), 0
    steps_file = out / recipe.name / "steps.jsonl"
    starter.ranks.clear()

    def killer() -> None:
        nonlocal n_killed
        seen = 0
        while n_killed < n and not done.wait(0.005):
            if len(starter.ranks) < seen + recipe.world_size:
                continue
            life = starter.ranks[seen : seen + recipe.world_size]
            seen += recipe.world_size
            moment, last_step = time.monotonic() + chance.uniform(0.0, 4.0), n_lines(steps_file) + 2
            while time.monotonic() < moment and n_lines(steps_file) < last_step:
                if done.wait(0.005):
                    return
            victim = chance.choice(life)
            if victim.process.returncode is None:
                os.kill(victim.process.pid, 9)
                n_killed += 1

    thread = threading.Thread(target=killer)
    thread.start()
    start = time.monotonic()
    try:
        record = supervise(recipe, out=out, starter=starter, options=OPTIONS, max_restarts=2 * n)
    finally:
        done.set()
        thread.join()
    lives = record["checkpoint"]["lives"]
    return {
        "kills": n_killed,
        "lives": len(lives),
        "steps": steps,
        "seconds": time.monotonic() - start,
        "exact": record["status"] == "ok" and digits(out / recipe.name) == expected,
        "goodput": record["goodput"]["fraction"],
        "reason": record["reason"],
        "began_training": sum(life["first_step"] is not None for life in lives),
        "left_running": starter.left_running(),
    }


# ---- make faults ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--strategies", nargs="*", default=None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--table", type=Path, help="write the results there, as Markdown")
    arguments = parser.parse_args()
    recipes = {name: recipe for name, recipe in strategies().items() if name in (arguments.strategies or strategies())}
    results: dict[str, dict[str, str | None]] = {}
    start = time.monotonic()
    with Watched() as starter:
        for row, (name, recipe) in enumerate(recipes.items()):
            expected = undisturbed(recipe, arguments.out / name / "undisturbed", starter)
            results[name] = {}
            for column, kind in enumerate(arguments.kinds):
                rank = (row + column) % recipe.world_size
                out = arguments.out / name / kind.replace(" ", "-")
                wrong = results[name][kind] = meet(kind, rank, recipe, out, starter, expected)
                print(
                    f"{time.monotonic() - start:6.0f} s  {name}, {kind}: {wrong or wanted_of(kind, recipe).end}",
                    flush=True,
                )
                write(arguments.table, results, recipes, arguments.kinds, None, time.monotonic() - start)
        killed = kills(arguments.kills, arguments.out / "kills", starter) if arguments.kills else None
    if killed:
        print(killed)
    write(arguments.table, results, recipes, arguments.kinds, killed, time.monotonic() - start)
    wrong = [text for row in results.values() for text in row.values() if text]
    return 1 if wrong or (killed and not killed["exact"]) else 0


def write(
    path: Path | None,
    results: dict[str, dict[str, str | None]],
    recipes: dict[str, Recipe],
    kinds: Sequence[str],
    killed: dict[str, Any] | None,
    seconds: float,
) -> None:
    if path is None:
        return
    here, cells = environment(), [text for row in results.values() for text in row.values()]
    lines = [
        "# Faults: what was injected, and what came of it",
        "",
        "Written by `make faults`. Each cell is a run of 8 steps, saved after every second; one rank meets the fault",
        "at step 6. *Exact*: all losses and gradient norms are those of the undisturbed run, to the digit. The line",
        "that tells of the fault must be the one that the kind asks for, and no process may be left. `single` has no",
        "peers to lose, and goes on.",
        "",
        f"{sum(text is None for text in cells)} of {len(cells)} cells are as they should be"
        f" ({len(results)} of {len(recipes)} strategies x {len(kinds)} kinds, {seconds / 60:.0f} minutes on"
        f" {available_cores()} cores of {here.cpu}, torch {here.torch}, {str(here.time_utc)[:10]}).",
        "",
        "| fault | came of it | strategies |",
        "|---|---|---|",
    ]
    for kind in kinds:
        column = {name: row[kind] for name, row in results.items() if kind in row}
        wrong = [f"{name}: {text}" for name, text in column.items() if text]
        good = len(column) - len(wrong)
        lines.append(f"| {kind} | {KINDS[kind].end} | {'; '.join([f'{good} of {len(column)}', *wrong])} |")
    layouts = (short_layout(vars(recipe.parallel) | {"world_size": recipe.world_size}) for recipe in recipes.values())
    lines += ["", f"Strategies: {', '.join(f'{n} ({of})' for n, of in zip(recipes, layouts, strict=True))}."]
    if killed:
        came = f"{killed['lives']} lives, of which {killed['began_training']} came to train"
        same = "yes, to the digit" if killed["exact"] else f"NO: {killed['reason']}"
        lines += [
            "",
            f"**Kills in a row.** FSDP on 4 ranks, {killed['steps']} steps, saved after every second: SIGKILL to a rank"
            f" {killed['kills']} times, up to 4 s or some steps into a life, in start-ups, steps, saves. {came},"
            f" in {killed['seconds'] / 60:.0f} minutes; goodput {100 * (killed['goodput'] or 0):.1f} %."
            f" The end equals the undisturbed run: **{same}**.",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
