"""The result of a run, record.json: the same keys for every run, null where nothing was measured.

Whatever made a record (a rank, the launcher, a dry run), whatever reads one (table, page, tracker) finds every key. A
record that is read is data from anywhere: it is completed and checked here, and never executed.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.recipe import Recipe

SCHEMA = 1
STATUSES = ("ok", "refused", "oom", "failed", "timeout")
KINDS = ("measured", "dry-run")
LARGEST_FILE_BYTES = 256 * 2**20  # a record of 16384 ranks takes about 5 MiB

SPREAD = ("median", "p10", "p90")
LAYOUT = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "world_size", "replicas", "n_microbatches", "n_stages")
ENVIRONMENT = (
    *("time_utc", "parallel_lab", "git_commit", "python", "torch", "numpy"),
    *("platform", "cpu", "cores", "accelerators"),
    *("device", "backend", "data"),  # what the run chose: known to its ranks alone
)
FLOPS = (
    *("definition", "model_flops_per_token", "model_flops_per_token_causal", "hardware_flops_per_token"),
    *("mfu", "mfu_causal", "hfu", "peak_flops", "peak_source", "matmul_ceiling_flops"),
)


def new_record(recipe: Recipe | Mapping[str, Any], kind: str = "measured") -> dict[str, Any]:
    """A record in which nothing is measured yet; its status, too, is null until it is known.

    A recipe that was refused is given as the tables its author wrote: it has no layout.
    """
    assert kind in KINDS, kind
    record = _blank() | {"kind": kind, "environment": environment()}
    if not isinstance(recipe, Recipe):
        return record | {"recipe": dict(recipe)}
    derived = {key: getattr(recipe, key) for key in ("world_size", "replicas", "n_microbatches", "n_stages")}
    return record | {"recipe": recipe.resolved(), "layout": dataclasses.asdict(recipe.parallel) | derived}


def _blank() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "status": None,
        "reason": None,
        "kind": None,
        "recipe": {},
        "layout": dict.fromkeys(LAYOUT),
        "environment": dict.fromkeys(ENVIRONMENT),
        "steps": [],  # {step, loss, grad_norm, seconds}
        "parity": dict.fromkeys(("reference", "dtype", "max_rel_grad_diff", "max_abs_loss_diff", "passed")),
        "throughput": {
            "tokens_per_s": None,
            "tokens_per_s_per_rank": None,
            "step_seconds": dict.fromkeys(SPREAD),
            "cpu_seconds_per_step": None,
            "step_parts": None,  # {compute_seconds, communication_seconds, idle_seconds}
            "steps_timed": None,
            "steps_left_out": None,  # reason -> how many
        },
        "flops": dict.fromkeys(FLOPS),
        "memory": dict.fromkeys(("per_rank", "max_peak_bytes", "min_peak_bytes")),
        "traffic": None,
        "pipeline": dict.fromkeys(("bubble_fraction", "bubble_fraction_ideal", "timeline")),
    }


# ---- environment ---------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the numbers depend on. Nothing that names a person, a host or a folder."""
    return dict.fromkeys(ENVIRONMENT) | {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "parallel_lab": version("parallel-lab"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerators": _accelerators(),
    }


def _accelerators() -> list[str] | None:
    """This host's GPUs by name; None where that is not known."""
    torch = sys.modules.get("torch")  # not imported for this: the launcher lives without it
    if torch is None:
        return None
    try:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except RuntimeError:  # the GPU whose failure is being recorded
        return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" where files differ from it; None where this is no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps below another project's repository
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or None


# ---- files ---------------------------------------------------------------------------------------------------------


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `record` as JSON; NaN and infinities become null. Whoever reads sees the old file or the new, whole."""
    assert record["status"] in STATUSES, record["status"]
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(record_json(record) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def record_json(record: Any) -> str:
    return json.dumps(_finite(record), indent=1, allow_nan=False, default=str)  # TOML has dates


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """The steps in a steps.jsonl, up to where its writer was stopped; none where there is no file."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    steps = []
    for line in lines:
        try:
            step = json.loads(line, parse_constant=lambda constant: None)
        except (ValueError, RecursionError):
            break
        if isinstance(step, dict):
            steps.append(step)
    return steps


def read_records(directory: str | Path) -> list[dict[str, Any]]:
    """The records of `directory` itself and of the folders in it, by name of folder, each with every key.

    One that cannot be read is a record too: failed, with the reason.
    """
    directory = Path(directory)
    folders = [directory, *sorted(directory.iterdir())] if directory.is_dir() else []
    paths = [folder / "record.json" for folder in folders if folder.is_dir()]
    return [read_record(path) for path in paths if os.path.lexists(path)]


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in the file `path`; a failed one with the reason where there is none to be had."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would be waited on for ever
            raise ValueError("is not a file")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ValueError(f"is larger than {LARGEST_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        # 1e999 is valid JSON and infinite: _finite sees to it.
        return _checked(_finite(json.loads(text, parse_constant=lambda constant: None)), path)
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or str(error) or "nested too deeply"
        reason = f"record.json cannot be used: {said}"
        return _blank() | {"status": "failed", "reason": reason, "recipe": {"name": path.absolute().parent.name}}


def _checked(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    for key, allowed in (("schema", (SCHEMA,)), ("status", STATUSES), ("kind", KINDS)):
        if data.get(key) not in allowed:
            raise ValueError(f"{key} is {str(data.get(key))[:40]!r}, not {' or '.join(map(str, allowed))}")
    record = _completed(data, _blank())
    record["steps"] = [step for step in record["steps"] or [] if isinstance(step, dict)]
    if not isinstance(record["recipe"].get("name"), str):
        record["recipe"]["name"] = path.absolute().parent.name
    if record["reason"] is not None:
        record["reason"] = str(record["reason"])
    return record


def _completed(data: Mapping[str, Any], blank: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with every key of `blank`: sections are tables and lists are lists, whatever was written."""
    complete = dict(data)
    for key, empty in blank.items():
        value = data.get(key)
        if isinstance(empty, dict):
            complete[key] = _completed(value if isinstance(value, dict) else {}, empty)
        else:
            complete[key] = value if isinstance(value, list) or not isinstance(empty, list) else []
    return complete
