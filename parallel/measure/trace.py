"""A trace of one step, for ui.perfetto.dev, and what a GPU's says of the step's parts."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.collectives import gathered
from parallel.measure.clock import Clock
from parallel.measure.observer import Observer, Step
from parallel.measure.record import Record
from parallel.measure.timeline import length, mean_parts, union
from parallel.mesh import size_of
from parallel.process import say


class Trace(Observer):
    """Each rank writes its trace of step `number` to `folder`/trace-rank-<r>.json.gz."""

    def __init__(self, folder: Path, device: torch.device, *, mesh: DeviceMesh, number: int, clock: Clock) -> None:
        self._path, self._device = folder / f"trace-rank-{dist.get_rank()}.json.gz", device
        self._number, self._clock = number, clock
        self._pipeline = mesh.get_group("pp").group_desc if size_of(mesh, "pp") > 1 else ""

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        if step.number != self._number:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        synchronize = torch.get_device_module(self._device).synchronize
        synchronize(self._device)  # with the step before
        with profile(activities=activities) as profiler, record_function(f"step {step.number}"):
            yield
            synchronize(self._device)
        profiler.export_chrome_trace(str(self._path))
        self._clock.leave_out(step.number, "profile")
        dist.barrier()  # the next step shall not wait for whoever still writes
        say(f"step {step.number}: traces in {self._path.parent}/trace-rank-*.json.gz, for ui.perfetto.dev")

    def report(self, record: Record) -> None:
        if self._device.type == "cuda":
            record.throughput.step_parts = mean_parts(gathered(parts_of_trace(self._path, pipeline=self._pipeline)))


def parts_of_trace(path: Path, *, pipeline: str) -> tuple[float, float, float] | None:
    """Compute, exposed communication and idle seconds of the traced step (docs/measures.md); None without a GPU.

    pipeline: description of the group whose messages are waited for as for a stage, not as for bytes.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return None
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    step = next(span for span in spans if span["name"].startswith("step "))
    compute, collectives = [], []
    for kernel in kernels:
        start = max(kernel["ts"], step["ts"])
        interval = (start, max(start, kernel["ts"] + kernel["dur"]))
        if not kernel["name"].startswith("nccl"):
            compute.append(interval)
        elif "SendRecv" not in kernel["name"] or kernel["args"].get("Process Group Description") != pipeline:
            collectives.append(interval)
    compute_us, either_us = length(union(compute)), length(union(compute + collectives))
    return compute_us / 1e6, (either_us - compute_us) / 1e6, max(0.0, step["dur"] - either_us) / 1e6
