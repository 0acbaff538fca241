"""Seconds per step: wall and CPU, at steady state."""

import contextlib
import os
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import torch_private
from parallel.collectives import gathered
from parallel.measure.observer import Observer, Step
from parallel.measure.record import Record, Spread
from parallel.recipe import Recipe

STAT = Path("/proc/stat")
WARM_UP_STEPS = 3  # allocators, caches, connections and compilation settle in the first steps
KEPT_STEPS = 10_000  # the last ones; speed is theirs


class Clock(Observer):
    """Clocks each step, on CUDA by the device's own clock, and says how fast those are that count."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._n_steps, self._ended = 0, 0.0
        # Of each that was not read yet. Seconds: CPU, busy cores; on CUDA the events of its two ends.
        self._unread: deque[tuple[float, float, Any, Any]] = deque()
        self._steps: deque[tuple[int, float, float, float]] = deque()  # number; seconds: wall, CPU, busy cores
        self._left_out: dict[int, str] = {}  # why, on this rank

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        n_graphs = torch_private.n_compiled_graphs()
        busy = self._busy_seconds()
        step.began, start = time.time(), self._event()
        wall, cpu = self._now()
        yield
        wall, cpu = (now - before for now, before in zip(self._now(), (wall, cpu), strict=True))
        busy = self._busy_seconds() - busy
        step.seconds = wall
        self._n_steps += 1
        if torch_private.n_compiled_graphs() > n_graphs:
            self.leave_out(step.number, "compile")
        if self._n_steps <= WARM_UP_STEPS:  # wherever a run begins
            self._left_out[step.number] = "warm-up"
        self._unread.append((cpu, busy, start, self._event()))

    def read(self, step: Step) -> None:
        cpu, busy, start, end = self._unread.popleft()
        if end is not None:
            ends_now = not end.query()
            end.synchronize()
            step.seconds = start.elapsed_time(end) / 1e3
            # The host may have queued this step before the device was done with the one before.
            step.began = time.time() - step.seconds if ends_now else max(step.began, self._ended)
            self._ended = step.began + step.seconds
        self._steps.append((step.number, step.seconds, cpu, busy))
        if len(self._steps) > KEPT_STEPS:
            self._left_out.pop(self._steps.popleft()[0], None)

    def leave_out(self, number: int, reason: str) -> None:
        """That step does not count, on any rank: the others have waited for this one."""
        self._left_out.setdefault(number, reason)

    def timed(self) -> list[int]:
        """The numbers of the steps that count. Collective."""
        for of_rank in gathered(self._left_out):
            self._left_out |= of_rank
        return [number for number, *_ in self._steps if number not in self._left_out]

    def report(self, record: Record) -> None:
        timed = set(self.timed())
        counted = [step for step in self._steps if step[0] in timed]
        seconds = spread([wall for _, wall, *_ in counted])
        cpu_seconds = sum(gathered(sum(cpu for _, _, cpu, _ in counted)))
        busy_seconds = gathered(sum(busy for *_, busy in counted))[0]
        train, speed = self._recipe.train, record.throughput
        if seconds.median:
            speed.tokens_per_s = train.global_batch * train.seq_len / seconds.median
            speed.tokens_per_s_per_rank = speed.tokens_per_s / self._recipe.world_size
        speed.step_seconds = seconds
        speed.cpu_seconds_per_step = cpu_seconds / len(timed) if timed else None
        if busy_seconds and self._on_one_host:
            wall_seconds = sum(wall for _, wall, *_ in counted)
            speed.cores_used_by_others = max(0.0, busy_seconds - cpu_seconds) / wall_seconds
        speed.steps_timed, speed.steps_left_out = len(timed), dict(Counter(self._left_out.values()))

    @property
    def _on_one_host(self) -> bool:
        return int(os.environ.get("LOCAL_WORLD_SIZE", self._recipe.world_size)) == self._recipe.world_size

    def _busy_seconds(self) -> float:
        """In which the cores of this process were busy, whatever with; 0 but on rank 0 of a run on Linux's CPUs."""
        if (dist.is_initialized() and dist.get_rank()) or self._device.type != "cpu" or not STAT.exists():
            return 0.0
        return busy_ticks(STAT.read_text(), os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")

    def _now(self) -> tuple[float, float]:
        """Wall seconds, and CPU seconds of all threads of this process."""
        return time.perf_counter(), sum(os.times()[:2])

    def _event(self) -> Any:
        """On CUDA, one that is recorded when the device has come to it."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def busy_ticks(stat: str, cores: Collection[int]) -> int:
    """Clock ticks of /proc/stat that these cores were not idle, those that a hypervisor took included (man proc)."""
    ticks = 0
    for core, user, nice, system, _idle, _iowait, *others in re.findall(
        r"^cpu(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", stat, re.M
    ):
        if int(core) in cores:
            ticks += sum(map(int, (user, nice, system, *others)))
    return ticks


def spread(seconds: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile; null where nothing was measured, or a single step gives no spread."""
    if len(seconds) < 2:
        return Spread(median=seconds[0] if seconds else None)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Spread(median=statistics.median(seconds), p10=tenths[0], p90=tenths[-1])
