"""Seconds per step: wall and CPU, at steady state."""

import os
import statistics
import time
from collections.abc import Sequence

import torch

WARM_UP_STEPS = 3  # allocators, caches, connections and compilation settle in the first steps


class Clock:
    """Wall and CPU seconds since the last `lap`, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> tuple[float, float]:
        """(wall seconds, CPU seconds of all threads of this process) since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter(), sum(os.times()[:2])
        before = getattr(self, "_before", now)
        self._before = now
        return now[0] - before[0], now[1] - before[1]


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, 10th and 90th percentile; null where nothing was measured, or a single step gives no spread."""
    median = statistics.median(seconds) if seconds else None
    if len(seconds) < 2:
        return {"median": median, "p10": None, "p90": None}
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": median, "p10": tenths[0], "p90": tenths[-1]}
