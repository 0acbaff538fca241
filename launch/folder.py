"""The folders of results: DIR/<name>/ of a run, and of a comparison, whose variants are runs in it.

    run          recipe.toml  record.json  steps.jsonl  lives.json  logs/rank-<r>.log  trace-rank-<r>.json.gz
                 checkpoints/ (parallel/checkpoint/files.py)  tensorboard/  wandb/ (launch/trackers.py)
    comparison   comparison.json (the variants, in order)  table.txt  page.html  <variant>/  predicted/<variant>/
                 tensorboard/  wandb/
    of Slurm     slurm.json (numbers of the jobs)  logs/slurm-<job>.log

A folder that holds something else is refused, and no file but these is ever removed; those of wandb/ are not either,
for they may not have been sent yet. While a run is under way its launcher and its rank 0 hold a lock (flock(2)) on its
folder, and so does who runs a comparison on that of the comparison; a lock ends with its process, however that ends.
"""

import contextlib
import fcntl
import json
import os
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.checkpoint.files import CHECKPOINTS, candidates, last_readable, refuse_unfit, step_folders
from parallel.measure.lives import LIVES, NO_RECORD, close_life, closed, goodput
from parallel.measure.record import Environment, Labels, Record, read_record, read_steps
from parallel.recipe import Recipe, RecipeError, check_name, load_recipe

RUN_FILES = ("recipe.toml", "record.json", "steps.jsonl", LIVES)
COMPARISON_FILES = ("comparison.json", "table.txt", "page.html")
SUBMITTED = "slurm.json"  # the numbers of its jobs, where `lab submit` started it
PREDICTED = "predicted"  # dry runs of a comparison's variants
LAST_STEPS = 10  # whose speed is that of a run under way


def refuse_other_folder(folder: Path, marks: tuple[str, ...]) -> None:
    """RecipeError where `folder` holds something, but none of the files that mark it as a run or a comparison."""
    try:
        if folder.exists() and not folder.is_dir():
            raise RecipeError("--out", str(folder), "is a file; give another folder or another name")
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be read ({error.strerror}); give another folder") from None
    if held and not held & set(marks):
        kind = "run" if marks == RUN_FILES else "comparison"
        remedy = f"holds something that is no {kind}; give another folder or another name"
        raise RecipeError("--out", str(folder), remedy)


def refuse_checkpoints(folder: Path) -> None:
    """RecipeError where a run that starts afresh would mix its checkpoints with those of an earlier one."""
    if found := step_folders(folder):
        remedy = f"holds checkpoints up to {found[0].name}; go on with --resume, or give another folder or name"
        raise RecipeError("--out", str(folder), remedy)


def resumed_run(
    recipe: Recipe, folder: Path, *, resume: bool, resume_from: Path | None, restarted: bool = False
) -> Path | None:
    """The folder of the run that one in `folder` goes on from; None where it starts afresh.

    restarted: nobody asked, so that what has no checkpoint yet starts as it did at first, but as the same run.
    Raises RecipeError where it cannot: what can be known before its ranks have looked at every byte.
    """
    if restarted and not candidates(folder):
        return resume_from or folder
    resume = resume or restarted
    if not resume:
        refuse_checkpoints(folder)
    run = folder if resume else resume_from
    if run is None:
        return None
    checkpoint = last_readable(run)
    if checkpoint is not None:
        ended = not restarted and read_record(folder / "record.json")["status"] == "ok"
        refuse_unfit(recipe, checkpoint, resume=resume, ended=ended or not resume)
    elif not resume or candidates(run):
        raise RecipeError("--resume" if resume else "--resume-from", str(run), "holds no checkpoint that can be read")
    elif not recipe.checkpoint.every:
        raise RecipeError("checkpoint.every", 0, f"keeps no checkpoints, and --resume finds none in {folder}; set it")
    return run


def prepare_run(folder: Path, *, resume: bool = False) -> str | None:
    """A folder for a run, without what an earlier one of this name left, or as its next life needs it.

    How the last life of the run ended, where it goes on and nobody has read that yet. Raises RecipeError.
    """
    refuse_other_folder(folder, RUN_FILES)
    if not resume:
        refuse_checkpoints(folder)
    ended = None
    try:
        if resume:
            ended = remove_results(folder, resume=True)
        else:
            remove_run(folder)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINTS).exists():
            (folder / CHECKPOINTS / "writable").touch()
            (folder / CHECKPOINTS / "writable").unlink()
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be written ({error.strerror}); give another folder") from None
    return ended


def remove_run(folder: Path) -> None:
    """Removes the files of a run, those we know and nothing else, and its folders where that leaves them empty."""
    remove_results(folder)
    for path in (folder / "recipe.toml", folder / SUBMITTED, *folder.glob("logs/rank-*.log"), *slurm_logs(folder)):
        path.unlink(missing_ok=True)
    for path in (folder / "logs", folder / "tensorboard", folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove_results(folder: Path, *, resume: bool = False) -> str | None:
    """resume: those alone that the next life of the run makes anew; and how the last one ended."""
    ended = close_life(folder) if resume else None
    known = [folder / "record.json"]
    if not resume:
        known += [folder / "steps.jsonl", folder / LIVES, *events(folder)]
    for path in (*known, *folder.glob("*.json.*.partial"), *folder.glob("trace-rank-*.json.gz")):
        path.unlink(missing_ok=True)
    return ended


# ---- who runs there ------------------------------------------------------------------------------------------------


def hold(folder: Path) -> int:
    """A descriptor: until it is closed, or this process has ended, a run is under way in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    _lock(descriptor, fcntl.LOCK_SH)
    return descriptor


@contextlib.contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Within, a comparison is under way in `folder`, and no other can be. Raises RecipeError where another is."""
    refuse_other_folder(folder, COMPARISON_FILES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be written ({error.strerror}); give another folder") from None
    try:
        if not _lock(descriptor, fcntl.LOCK_EX):
            remedy = f"{_holder(folder)} has a comparison under way there; wait for its end, or give another folder"
            raise RecipeError("--out", str(folder), remedy)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """False where another process has a lock and keeps it: who only asks, as `under_way` does, has it for a moment."""
    with contextlib.suppress(OSError):  # a file system without locks
        for _ in range(10):
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.01)
        return False
    return True


def _holder(folder: Path) -> str:
    """The process that says in comparison.json that it is its own."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        return f"process {int(listed['process'])} (since {str(listed['since'])[:25]})"
    return "another process"


def under_way(folder: Path) -> bool | None:
    """Whether somebody holds it; None where that cannot be told, as on some file systems that hosts share."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


def refuse_under_way(folder: Path) -> None:
    if under_way(folder):
        remedy = "a run is under way there; wait for its end, or give another folder or another name"
        raise RecipeError("--out", str(folder), remedy)


def abandoned(folder: Path) -> dict[str, Any] | None:
    """The record of a run that has left none, because its launcher was killed: of the steps and lives that it had.

    None where there is no such run, or one may be under way.
    """
    if not _without_record(folder) or under_way(folder) is not False:
        return None
    record = _begun(folder)
    lives, ended = closed(folder)
    goes_on = "; lab run --resume goes on" if candidates(folder) else ""
    record.status, record.reason = "failed", f"{ended or NO_RECORD}{goes_on}"
    record.checkpoint.lives, record.goodput = lives, goodput(lives, record.steps)
    return record.as_json()


def running(folder: Path) -> dict[str, Any] | None:
    """What a run that is under way would record now: of status "running", with its steps and the speed of the last.

    None where none is, or that cannot be told.
    """
    if not _without_record(folder) or not under_way(folder):
        return None
    record = _begun(folder)
    last = record.steps[-1]["step"] if record.steps else 0
    record.status, record.reason = "running", f"step {last}"
    if train := record.recipe.get("train"):  # the recipe could be read
        record.reason += f" of {train['steps']}"
        if seconds := [row["seconds"] for row in record.steps[-LAST_STEPS:] if row.get("seconds")]:
            record.throughput.tokens_per_s = train["global_batch"] * train["seq_len"] / statistics.median(seconds)
    return record.as_json()


def _without_record(folder: Path) -> bool:
    return (folder / LIVES).is_file() and not os.path.lexists(folder / "record.json")


def _begun(folder: Path) -> Record:
    """Of the recipe of a run and the steps that it has done."""
    record = Record(kind="measured", recipe={"name": folder.absolute().name})
    with contextlib.suppress(RecipeError):
        record = Record.of(load_recipe(folder / "recipe.toml"))
        record.environment, record.labels = Environment(), Labels()  # those of the run are not known
    record.steps = read_steps(folder / "steps.jsonl")
    return record


def prepare_comparison(folder: Path, name: str, variants: Sequence[str], *, keep: Collection[str] = ()) -> None:
    """A folder for a comparison, without what an earlier one left, but for the variants to keep. Raises RecipeError."""
    refuse_other_folder(folder, COMPARISON_FILES)
    for variant in variants:
        refuse_other_folder(folder / variant, RUN_FILES)
        if variant not in keep:
            refuse_checkpoints(folder / variant)
    try:
        for variant in {*variants, *variant_order(folder)}.difference(keep):
            remove_run(folder / variant)
            remove_run(folder / PREDICTED / variant)
        folder.mkdir(parents=True, exist_ok=True)
        known = [folder / file for file in ("table.txt", "page.html", SUBMITTED)]
        for path in (*known, *events(folder), *slurm_logs(folder)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be written ({error.strerror}); give another folder") from None
    list_variants(folder, name, variants)


def list_variants(folder: Path, name: str, variants: Sequence[str]) -> None:
    """Marks `folder` as that of a comparison. Raises RecipeError."""
    refuse_other_folder(folder, COMPARISON_FILES)
    process = {"process": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    listed = json.dumps({"name": name, "variants": list(variants)} | process, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(listed + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be written ({error.strerror}); give another folder") from None


def variant_order(folder: Path) -> dict[str, int]:
    """The variants of the comparison in `folder` and the place of each; none where it is no comparison."""
    try:
        names = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["variants"]
        for name in names:
            check_name("variant", name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: place for place, name in enumerate(names)}


def events(folder: Path) -> list[Path]:
    """Those of TensorBoard."""
    return sorted(folder.glob("tensorboard/events.out.tfevents.*"))


def slurm_logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("logs/slurm-*.log"))


def rank_log(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank-{rank}.log"


def recipe_toml(recipe: Recipe) -> str:
    """The resolved recipe as a TOML file, which can be run again."""
    tables = recipe.resolved()
    lines = [f"name = {_toml(tables.pop('name'))}"]
    for section, table in tables.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON is TOML for numbers, booleans, strings and lists of them, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
