"""Seconds per step: wall and CPU, at steady state."""

import contextlib
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import torch

from parallel import torch_private
from parallel.collectives import gathered
from parallel.measure.observer import Observer, Step
from parallel.measure.record import Record, Spread
from parallel.recipe import Recipe

WARM_UP_STEPS = 3  # allocators, caches, connections and compilation settle in the first steps
KEPT_STEPS = 10_000  # the last ones; speed is theirs


class Clock(Observer):
    """Clocks each step, with the device's work done, and says how fast those are that count."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._n_steps = 0
        self._steps: deque[tuple[int, float, float]] = deque()  # number, wall and CPU seconds
        self._left_out: dict[int, str] = {}  # why, on this rank

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        n_graphs = torch_private.n_compiled_graphs()
        wall, cpu = self._now()
        yield
        wall, cpu = (now - before for now, before in zip(self._now(), (wall, cpu), strict=True))
        step.seconds = wall
        self._n_steps += 1
        if torch_private.n_compiled_graphs() > n_graphs:
            self.leave_out(step.number, "compile")
        if self._n_steps <= WARM_UP_STEPS:  # wherever a run begins
            self._left_out[step.number] = "warm-up"
        self._steps.append((step.number, wall, cpu))
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
        seconds = spread([wall for number, wall, _ in self._steps if number in timed])
        cpu_seconds = sum(gathered(sum(cpu for number, _, cpu in self._steps if number in timed)))
        train, speed = self._recipe.train, record.throughput
        if seconds.median:
            speed.tokens_per_s = train.global_batch * train.seq_len / seconds.median
            speed.tokens_per_s_per_rank = speed.tokens_per_s / self._recipe.world_size
        speed.step_seconds = seconds
        speed.cpu_seconds_per_step = cpu_seconds / len(timed) if timed else None
        speed.steps_timed, speed.steps_left_out = len(timed), dict(Counter(self._left_out.values()))

    def _now(self) -> tuple[float, float]:
        """Wall seconds, and CPU seconds of all threads of this process."""
        torch.get_device_module(self._device).synchronize(self._device)
        return time.perf_counter(), sum(os.times()[:2])


def spread(seconds: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile; null where nothing was measured, or a single step gives no spread."""
    if len(seconds) < 2:
        return Spread(median=seconds[0] if seconds else None)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Spread(median=statistics.median(seconds), p10=tenths[0], p90=tenths[-1])
