"""The result of a run, record.json: the same keys for every run, null where nothing was measured.

Whatever made a record (a rank, the launcher, a dry run), whatever reads one (table, page, tracker) finds every key. A
record that is read is data from anywhere: it is completed and checked here, and never executed.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.recipe import MESH_DIMS, Recipe

SCHEMA = 1
STATUSES = ("ok", "refused", "oom", "failed", "timeout")
KINDS = ("measured", "dry-run")
LARGEST_FILE_BYTES = 256 * 2**20  # a record of 16384 ranks takes about 5 MiB

# What live tensor storages are, in the record as <name>_bytes; parallel/measure/memory.py says which is what.
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "other")


@dataclass(kw_only=True)
class Environment:
    """What the numbers depend on. Nothing that names a person, a host or a folder; but a cluster, if asked."""

    time_utc: str | None = None
    parallel_lab: str | None = None
    git_commit: str | None = None
    python: str | None = None
    torch: str | None = None
    numpy: str | None = None
    platform: str | None = None
    cpu: str | None = None
    cores: int | None = None
    accelerators: list[str] | None = None
    device: str | None = None  # what the run chose, known to its ranks alone: device and what follows
    device_memory_bytes: int | None = None  # of one accelerator
    backend: str | None = None
    engine: str | None = None  # that executed the steps, with its version where it is not the lab's own
    cluster: str | None = None  # its name, of --cluster-name or slurm/site.toml
    hosts: list[int] | None = None  # of each rank: those of one number are on one host
    data: str | None = None
    float32_matmul: str | None = None  # on a CPU: torch's precision of float32 products
    note: str | None = None  # why GPUs of the host were not used


@dataclass(kw_only=True)
class Parity:
    reference: str | None = None
    dtype: str | None = None
    max_rel_grad_diff: float | None = None
    max_abs_loss_diff: float | None = None
    passed: bool | None = None
    trained_dtype: str | None = None  # where that has other kernels than float64: as near as it allows
    trained_max_rel_grad_diff: float | None = None
    trained_passed: bool | None = None
    note: str | None = None  # what is known to keep an engine from the exact proof


@dataclass(kw_only=True)
class Spread:
    median: float | None = None
    p10: float | None = None
    p90: float | None = None


@dataclass(kw_only=True)
class Throughput:
    tokens_per_s: float | None = None
    tokens_per_s_per_rank: float | None = None
    step_seconds: Spread = field(default_factory=Spread)
    cpu_seconds_per_step: float | None = None
    cores_used_by_others: float | None = None  # during those steps, of the cores that this run may use; on one host
    step_parts: dict[str, float] | None = None  # {compute_seconds, communication_seconds, idle_seconds}
    steps_timed: int | None = None
    steps_left_out: dict[str, int] | None = None  # reason -> how many


@dataclass(kw_only=True)
class Flops:
    definition: str | None = None
    model_flops_per_token: int | None = None
    model_flops_per_token_causal: int | None = None
    hardware_flops_per_token: float | None = None
    attention_kernels: list[str] | None = None  # those that ran, as torch calls them; none: plain matrix products
    mfu: float | None = None
    mfu_causal: float | None = None
    hfu: float | None = None
    peak_flops: float | None = None
    peak_source: str | None = None
    matmul_ceiling_flops: float | None = None


@dataclass(kw_only=True)
class Memory:
    per_rank: list[dict[str, Any]] | None = None  # {rank, peak_bytes, <category>_bytes, ..., allocator_...}
    max_peak_bytes: int | None = None
    min_peak_bytes: int | None = None
    step: int | None = None  # the one that was observed
    note: str | None = None  # what a reader must know


@dataclass(kw_only=True)
class Pipeline:
    bubble_fraction: float | None = None
    bubble_fraction_ideal: float | None = None
    timeline: list[dict[str, Any]] | None = None  # {rank, stage, microbatch, action, start_seconds, end_seconds}


@dataclass(kw_only=True)
class Checkpoints:
    """What saving cost the last life of a run, and the lives of the run: one more each time it resumed."""

    saves: int | None = None
    bytes: int | None = None  # of the last one, over all ranks
    waited_seconds: float | None = None  # training stood still for a save: median, of the slowest rank
    background_seconds: float | None = None  # from then until it was on the disk; null where nothing is asynchronous
    lives: list[dict[str, Any]] | None = None  # {first_step, last_step, resumed_from, layout, time_utc, ended, ...}


@dataclass(kw_only=True)
class Goodput:
    """What the seconds since the first start of the run were good for, over all its lives."""

    fraction: float | None = None  # trained_seconds / total_seconds
    total_seconds: float | None = None
    trained_seconds: float | None = None  # the steps that count
    startup_seconds: float | None = None
    parity_seconds: float | None = None
    save_seconds: float | None = None
    lost_seconds: float | None = None  # steps trained again, and what was under way when a life ended badly
    between_lives_seconds: float | None = None
    other_seconds: float | None = None  # what is left: between steps, and at the end


@dataclass(kw_only=True)
class Labels:
    """What whoever started the run calls it, so that runs of one kind are found among all others."""

    job_id: str | None = None  # of Slurm
    tags: list[str] | None = None
    note: str | None = None

    @classmethod
    def of_environment(cls) -> "Labels":
        """Of the variables in LABELS, as every process of a run inherits them, and SLURM_JOB_ID."""
        tags, note = (os.environ.get(name) or None for name in LABELS)
        return cls(job_id=os.environ.get("SLURM_JOB_ID"), tags=tags.split(",") if tags else None, note=note)


CLUSTER = "PARALLEL_LAB_CLUSTER"  # the variable; --cluster-name and a Slurm site file set it
LABELS = ("PARALLEL_LAB_TAGS", "PARALLEL_LAB_NOTE")  # tags with "," between
LAYOUT = (*MESH_DIMS, "world_size", "replicas", "n_microbatches", "n_stages")


@dataclass(kw_only=True)
class Record:
    """The result of a run while it is made, with a section for each measure; `as_json` is what is written."""

    schema: int = SCHEMA
    status: str | None = None  # of STATUSES, once it is known
    reason: str | None = None
    kind: str | None = None  # of KINDS
    recipe: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(LAYOUT))
    environment: Environment = field(default_factory=Environment)
    labels: Labels = field(default_factory=Labels)
    steps: list[dict[str, Any]] = field(default_factory=list)  # {step, loss, grad_norm, seconds}
    parity: Parity = field(default_factory=Parity)
    throughput: Throughput = field(default_factory=Throughput)
    flops: Flops = field(default_factory=Flops)
    memory: Memory = field(default_factory=Memory)
    traffic: list[dict[str, Any]] | None = None  # {mesh_dim, collective, calls, bytes_per_rank, bytes_across_hosts}
    pipeline: Pipeline = field(default_factory=Pipeline)
    prediction: dict[str, Any] | None = None  # for a cluster: parallel.foresight.prediction
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    goodput: Goodput = field(default_factory=Goodput)

    @classmethod
    def of(cls, recipe: Recipe, kind: str = "measured") -> "Record":
        """One in which nothing is measured yet; its status, too, is null until it is known."""
        assert kind in KINDS, kind
        layout = {key: getattr(recipe if hasattr(recipe, key) else recipe.parallel, key) for key in LAYOUT}
        here, labels = environment(), Labels.of_environment()
        return cls(kind=kind, recipe=recipe.resolved(), layout=layout, environment=here, labels=labels)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def new_record(recipe: Recipe | Mapping[str, Any]) -> dict[str, Any]:
    """Its JSON. A recipe that was refused is given as the tables its author wrote: it has no layout."""
    if isinstance(recipe, Recipe):
        return Record.of(recipe).as_json()
    here, labels = environment(), Labels.of_environment()
    return Record(kind="measured", recipe=dict(recipe), environment=here, labels=labels).as_json()


# ---- environment ---------------------------------------------------------------------------------------------------


def environment() -> Environment:
    """Of this process and host."""
    return Environment(
        time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        parallel_lab=version("parallel-lab"),
        git_commit=git_commit(),
        python=platform.python_version(),
        torch=version("torch"),
        numpy=version("numpy"),
        platform=platform.platform(),
        cpu=_cpu_model(),
        cores=available_cores(),
        accelerators=_accelerators(),
        cluster=os.environ.get(CLUSTER) or None,
    )


def _accelerators() -> list[str] | None:
    """This host's GPUs by name; None where that is not known."""
    torch = sys.modules.get("torch")  # not imported for this: the launcher lives without it
    try:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else None
    except RuntimeError:  # the GPU whose failure is being recorded
        return None
    except AttributeError:  # a tracker's thread is in the midst of importing it
        return None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # what has been imported stays, whatever becomes of its files
def git_commit() -> str | None:
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
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*\S)", info.read_text(errors="replace"), re.M) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine() or None


# ---- files ---------------------------------------------------------------------------------------------------------


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes `record` as JSON; NaN and infinities become null. Whoever reads sees the old file or the new, whole."""
    assert record["status"] in STATUSES, record["status"]
    write_json(path, record)


def write_json(path: Path, value: Any) -> None:
    """The same for anything that JSON can say."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            partial.write_text(record_json(value) + "\n", encoding="utf-8")
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within, as of a full disk, says which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def record_json(record: Any) -> str:
    return json.dumps(finite(record), indent=1, allow_nan=False, default=str)  # TOML has dates


def finite(value: Any) -> Any:
    """`value` with null where a number is NaN or infinite, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps in a steps.jsonl; none where there is no file.

    Lines that are no step are left out, as is the one in which its writer was stopped.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):  # a null byte in the path
        return []
    steps = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            steps.append(finite(json.loads(line)))
    return [step for step in steps if _is_step(step)]


def _is_step(row: Any) -> bool:
    """What a Journal has written, and nobody has changed: whoever reads it counts with each value."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(value is None or type(value) in (int, float) for value in row.values())


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The records of `directory` itself and of the folders in it, by name of folder."""
    folders = [directory, *sorted(directory.iterdir())] if directory.is_dir() else []
    return [read_record(path) for folder in folders if os.path.lexists(path := folder / "record.json")]


def read_record(path: Path) -> dict[str, Any]:
    """The record in the file `path`, with every key; a failed one with the reason where there is none to be had."""
    try:
        if not path.is_file():  # a pipe would be waited on for ever
            raise ValueError("is not a file")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ValueError(f"is larger than {LARGEST_FILE_BYTES} bytes")
        data = finite(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
        for key, allowed in (("schema", (SCHEMA,)), ("status", STATUSES), ("kind", KINDS)):
            if data.get(key) not in allowed:
                raise ValueError(f"{key} is {str(data.get(key))[:40]!r}, not {' or '.join(map(str, allowed))}")
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or str(error) or "nested too deeply"
        data = {"status": "failed", "reason": f"record.json cannot be used: {said}"}
    record = _completed(data, Record().as_json())
    record["steps"] = [step for step in record["steps"] if isinstance(step, dict)]
    if not isinstance(record["recipe"].get("name"), str):
        record["recipe"]["name"] = path.absolute().parent.name
    if record["reason"] is not None:
        record["reason"] = str(record["reason"])
    return record


def _completed(data: Any, blank: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with every key of `blank`: sections are tables and lists are lists, whatever was written."""
    complete = {**blank, **(data if isinstance(data, dict) else {})}
    for key, empty in blank.items():
        if isinstance(empty, dict):
            complete[key] = _completed(complete[key], empty)
        elif isinstance(empty, list) and not isinstance(complete[key], list):
            complete[key] = []
    return complete
