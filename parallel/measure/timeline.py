"""Where the seconds of a step go, in the parts of docs/measures.md, and when each action of the pipeline ran.

A rank on a CPU computes and waits on one thread, so that its waits are clocked where they are. On CUDA the host does
not wait where the device does: there the parts come from a trace of the device (`parts_of_trace`).
"""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallel.actions import Action
from parallel.collectives import gathered
from parallel.measure.clock import Clock
from parallel.measure.observer import Observer, Step
from parallel.measure.record import Record
from parallel.recipe import MESH_DIMS, Recipe
from parallel.torch_private import wrapped_waits

OBSERVED_STEPS = 100  # the last ones, so that a run of a million steps keeps no more than these
UNITS = {"forward": 1, "backward": 2, "backward_input": 1, "backward_weight": 1}  # of time, in the ideal

Interval = tuple[float, float]


@dataclass
class _Step:
    number: int = 0
    seconds: float = 0.0
    actions: list[tuple[Action, Any, Any]] = field(default_factory=list)  # with start and end: times, or CUDA events
    waits: list[Interval] = field(default_factory=list)


class Timeline(Observer):
    """Where the time of the median step went.

    Times are those of the wall clock, which ranks of a host share and which hosts keep within milliseconds.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, *, mesh: DeviceMesh, clock: Clock, waits_in_python: bool = True
    ) -> None:
        self._mesh, self._clock = mesh, clock
        self._on_cuda = device.type == "cuda"
        # Compiled collectives wait where no clock of Python's sees it, and a clock within would break their graph.
        in_graph = recipe.train.compile != "none" and (recipe.parallel.tp > 1 or recipe.parallel.cp > 1)
        self._clocks_waits = waits_in_python and not self._on_cuda and not in_graph
        self._steps: deque[_Step] = deque(maxlen=OBSERVED_STEPS)
        self._step = _Step()
        self._unread: deque[tuple[_Step, Any]] = deque()  # with the time, or the event, of its beginning

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        self._step = _Step(step.number)
        self._unread.append((self._step, self._now()))
        with wrapped_waits(self._clocked()) if self._clocks_waits else contextlib.nullcontext():
            yield

    def read(self, step: Step) -> None:
        done, base = self._unread.popleft()
        done.seconds = step.seconds
        if self._on_cuda:
            for i, (action, *events) in enumerate(done.actions):
                start, end = (step.began + base.elapsed_time(event) / 1e3 for event in events)
                done.actions[i] = (action, start, end)
        self._steps.append(done)

    @contextlib.contextmanager
    def _clocked(self) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self._step.waits.append((start, time.time()))

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        start = self._now()
        yield
        self._step.actions.append((action, start, self._now()))

    def report(self, record: Record) -> None:
        times = self.sections(steps=self._clock.timed())
        record.throughput.step_parts = record.throughput.step_parts or times["step_parts"]
        record.pipeline.bubble_fraction, record.pipeline.timeline = times["bubble_fraction"], times["timeline"]

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sections(self, *, steps: Sequence[int]) -> dict[str, Any]:
        """{step_parts, bubble_fraction, timeline} of that one of `steps` which is of median length. Collective."""
        sections: dict[str, Any] = dict.fromkeys(("step_parts", "bubble_fraction", "timeline"))
        kept = [step for step in self._steps if step.number in steps]
        if not kept:
            return sections
        seconds: list[float] = gathered([step.seconds for step in kept])[0]
        step = kept[seconds.index(statistics.median_low(seconds))]
        busy = [(start, end) for _, start, end in step.actions]
        busy_of_ranks = gathered(busy)
        times = [moment for of_rank in busy_of_ranks for interval in of_rank for moment in interval]
        window = (min(times), max(times)) if times else (0.0, 0.0)
        idle = length([window]) - length(busy)
        waits = union(step.waits)  # one may wait within another
        waited = length(waits) - _overlap(waits, [window]) + _overlap(waits, busy)
        parts = gathered((step.seconds - idle - waited, waited, idle) if self._clocks_waits else None)
        sections["step_parts"] = mean_parts(parts)
        if times:
            sections["bubble_fraction"] = 1 - sum(map(length, busy_of_ranks)) / (len(parts) * length([window]))
            sections["timeline"] = self._rows(step)
        return sections

    def _rows(self, step: _Step) -> list[dict[str, Any]]:
        in_first_pipeline = all(self._mesh.get_local_rank(dim) == 0 for dim in MESH_DIMS if dim != "pp")
        of_ranks = gathered(step.actions if in_first_pipeline else [])
        zero = min(start for actions in of_ranks for _, start, _ in actions)
        return [
            {"rank": rank, "stage": action.stage, "microbatch": action.microbatch, "action": action.name}
            | {"start_seconds": start - zero, "end_seconds": end - zero}
            for rank, actions in enumerate(of_ranks)
            for action, start, end in actions
        ]


def mean_parts(of_ranks: Sequence[tuple[float, float, float] | None]) -> dict[str, float] | None:
    """`step_parts` from the compute, communication and idle seconds of each rank; None where one has none."""
    known = [parts for parts in of_ranks if parts is not None]
    if len(known) < len(of_ranks):
        return None
    keys = ("compute_seconds", "communication_seconds", "idle_seconds")
    return {key: statistics.fmean(values) for key, values in zip(keys, zip(*known, strict=True), strict=True)}


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _overlap(some: Iterable[Interval], others: Sequence[Interval]) -> float:
    """Of intervals that do not overlap among themselves."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in intervals that do not overlap."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


# ---- the ideal -----------------------------------------------------------------------------------------------------


def ideal_bubble(orders: Sequence[Sequence[Action]]) -> float:
    """The bubble of a pipeline whose ranks do these actions in these orders, if messages took no time.

    A forward takes one unit, a backward two, each half of a split backward one: the usual model (arXiv:2401.10241).
    An action starts when the rank is done with the one before, and the neighbouring stage with what it needs from it.
    """
    last = max(action.stage for order in orders for action in order)
    queues, clocks = [deque(order) for order in orders], [0] * len(orders)
    done: dict[Action, int] = {}  # when
    while any(queues):
        ready = {rank: _ready(queue[0], done, last) for rank, queue in enumerate(queues) if queue}
        assert set(ready.values()) != {None}, "an order in which every rank waits for another"
        for rank, when in ready.items():
            if when is not None:
                action = queues[rank].popleft()
                clocks[rank] = done[action] = max(clocks[rank], when) + UNITS[action.name]
    busy = sum(UNITS[action.name] for action in done)
    return 1 - busy / (len(orders) * max(clocks))


def _ready(action: Action, done: Mapping[Action, int], last: int) -> int | None:
    """When the stage beside it, of stages 0 to `last`, has done what `action` needs; None if it has not."""
    name, stage, microbatch = action
    if name == "backward_weight" or (stage == 0 and name == "forward") or (stage == last and name != "forward"):
        return 0  # this rank's own earlier actions are enough
    if name == "forward":
        return done.get(Action(name, stage - 1, microbatch))
    in_one, in_two = (Action(half, stage + 1, microbatch) for half in ("backward", "backward_input"))
    return done.get(in_one, done.get(in_two))
