"""What came of what was submitted, from Slurm and from the files of the runs."""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from launch.folder import variant_order
from launch.slurm import OVER, jobs, submitted
from launch.table import remark_on, three_digits
from launch.terminal import CommandError, printable, watch
from parallel.measure.record import read_record, read_steps, record_json
from parallel.recipe import RecipeError, load_recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="of a run, a comparison, or several of them")
    parser.add_argument("--watch", action="store_true", help="until all has ended")


def run(arguments: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []

    def look() -> tuple[str, bool]:
        rows[:] = _rows(arguments.folder)
        ended = not arguments.watch or all(row["state"] in ("done", "failed") for row in rows)
        return record_json(rows) if arguments.json else _table(rows), ended

    watch(look, clear=not arguments.json)
    return 1 if any(row["state"] in ("failed", "unknown") for row in rows) else 0


def _rows(folder: Path) -> list[dict[str, Any]]:
    folders = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    found = [(path, noted) for path in folders if (noted := submitted(path)) is not None]
    if not found:
        raise CommandError(f"{folder} holds nothing that `lab submit` has noted (slurm.json); give its folder")
    known: dict[str, dict[str, str]] = {}
    try:
        known = jobs([number for _, noted in found for number in (noted["job"], *filter(None, [noted["report"]]))])
    except CommandError as error:  # the files say what they can
        print(f"lab: {printable(error)}", file=sys.stderr)
    rows = []
    for path, noted in found:
        variants = variant_order(path)
        for name in variants or noted["tasks"]:
            task = noted["tasks"].get(name)
            rows.append(_row(path / name if variants else path, name, task, known.get(task or "")))
    return rows


def _row(folder: Path, name: str, task: str | None, job: dict[str, str] | None) -> dict[str, Any]:
    """{name, job, state, reason, requeued, nodes, step, steps, loss, tokens_per_s}, None for what is not known.

    state: pending, running, done, failed, or unknown, where Slurm does not know the job and there is no record.
    """
    steps = read_steps(folder / "steps.jsonl")
    last = steps[-1] if steps else {}
    row: dict[str, Any] = {"name": name, "job": task, "state": "failed", "reason": None}
    row |= {"requeued": int(job["RestartCnt"] or 0) if job else None, "nodes": job["NodeList"] if job else None}
    row |= {"step": last.get("step"), "steps": None, "loss": last.get("loss"), "tokens_per_s": None}
    with contextlib.suppress(RecipeError):  # its task has not begun
        train = load_recipe(folder / "recipe.toml").train
        row["steps"] = train.steps
        row["tokens_per_s"] = train.global_batch * train.seq_len / last["seconds"] if last.get("seconds") else None
    state = job["State"] if job else None
    if job and state in ("PENDING", "REQUEUED"):
        return row | {"state": "pending", "reason": job["Reason"]}
    if state and state not in OVER:
        return row | {"state": "running", "reason": None if state == "RUNNING" else state.lower()}
    if (folder / "record.json").exists():
        record = read_record(folder / "record.json")
        if task is None and record["status"] == "refused":
            return row | {"state": "done", "reason": "refused, as expected"}
        if not remark_on(record):
            return row | {"state": "done"}
        said = f"; Slurm says {state}" if state not in (None, "COMPLETED", "FAILED") else ""
        return row | {"reason": _why(record) + said}
    if state is None:
        return row | {"state": "unknown", "reason": "Slurm does not know its job, and there is no record.json"}
    full = ", and its disk is full" if shutil.disk_usage(folder).free < 2**20 else ""
    return row | {"reason": f"Slurm says {state}; there is no record.json{full}"}


def _why(record: dict[str, Any]) -> str:
    first_line, *_ = str(record["reason"]).splitlines() or [""]
    return "parity FAILED" if record["status"] == "ok" else f"{record['status']}: {first_line}"


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    return "\n".join(printable(f"{row['name']:<{width}}  {_in_words(row)}".rstrip()) for row in rows)


def _in_words(row: dict[str, Any]) -> str:
    words = [f"{row['state']:<7}"]
    if row["step"] is not None:
        words.append(f"step {row['step']}/{row['steps'] or '?'}")
        if isinstance(row["loss"], float):
            words.append(f"loss {row['loss']:.4f}")
    if row["state"] == "running" and row["tokens_per_s"]:
        words.append(f"{three_digits(row['tokens_per_s'])} tokens/s")
    if row["requeued"]:
        words.append(f"requeued {row['requeued']} time{'s' * (row['requeued'] > 1)}")
    if row["reason"]:
        words.append(f"({row['reason']})")
    return "  ".join([*words, *([f"job {row['job']}"] if row["job"] else [])])
