"""What one step of a rank computes, holds and sends: the same counters for a run and for a dry run."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.actions import Action
from parallel.measure.accelerators import Peak
from parallel.measure.flops import FlopCounter, flops_section
from parallel.measure.memory import MemoryTracker, allocator_peaks, reset_allocator_peaks
from parallel.measure.observer import Observer, Step, nested
from parallel.measure.record import Memory, Record
from parallel.measure.tape import Event
from parallel.measure.timeline import ideal_bubble
from parallel.measure.traffic import TrafficLog
from parallel.recipe import Recipe


class Measures(NamedTuple):
    """Of one step of one rank."""

    flops: int
    memory: dict[str, Any]  # peak_bytes, and parameters_bytes, ... at that peak; the CUDA allocator's own peaks
    traffic: list[dict[str, Any]] | None  # {mesh_dim, collective, calls, bytes_per_rank, bytes_across_hosts}
    actions: list[Action]  # of the pipeline, in order
    attention_kernels: set[str]
    tape: Sequence[Event] = ()  # of a dry run that was asked for it


class Counters(Observer):
    """Counts, which slows it down, the `nth` step that it sees: the second, for the first makes the optimizer's state.

    holds: see MemoryTracker.

    Compiled code makes tensors where no tracker sees them: there FLOPs alone are counted, and memory and traffic are
    None but for the allocator's own peaks.
    """

    def __init__(
        self,
        recipe: Recipe,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        mesh: DeviceMesh,
        device: torch.device,
        nth: int = 2,
        hosts: Sequence[int] | None = None,
        holds: Callable[[], Mapping[str, Sequence[Tensor]]] = dict,
    ) -> None:
        self._compiled = recipe.train.compile != "none"
        self._parameters, self._optimizer, self._mesh, self._device = list(parameters), optimizer, mesh, device
        self._left, self._hosts, self._holds = nth, hosts, holds
        self._actions: list[Action] = []
        self.number: int | None = None  # of the step that was counted
        self.measures: Measures | None = None

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        self._left -= 1
        if self._left != 0:
            yield
            return
        self.number = step.number
        reset_allocator_peaks(self._device)
        log = TrafficLog(self._mesh, self._hosts)
        tracker = MemoryTracker(self._parameters, self._optimizer, device=self._device, holds=self._holds)
        with FlopCounter() as flops, nested([] if self._compiled else [log, tracker]):
            yield
        memory: dict[str, Any] = dict.fromkeys(tracker.peak()) if self._compiled else tracker.peak()
        traffic = None if self._compiled else log.rows()
        memory |= allocator_peaks(self._device)
        self.measures = Measures(flops.flops, memory, traffic, self._actions, flops.attention)

    def around(self, action: Action) -> contextlib.AbstractContextManager[None]:
        if self._left == 0:
            self._actions.append(action)
        return contextlib.nullcontext()


def fill_in(
    record: Record,
    recipe: Recipe,
    counted: Mapping[int, Measures],
    *,
    kinds: Mapping[int, int],
    step: int | None,
    peak: Peak,
    ceiling: float | None,
    note: str | None,
) -> None:
    """Gives `record`, of a run or a dry run, the sections flops, memory, traffic and pipeline.

    counted: by rank; none where nothing was counted. kinds: ranks that say everything, and how many are like each: what
    is a sum or an extreme over all is null where one of them was not counted. peak: of a rank's device; ceiling: FLOP/s
    of the fastest product measured there. The record's step seconds, if it has any, are those of MFU and HFU.
    """
    complete = kinds.keys() <= counted.keys()
    executed = sum(n * counted[rank].flops for rank, n in kinds.items()) if complete else None
    seconds = record.throughput.step_seconds.median
    flops = functools.partial(flops_section, recipe, hardware_flops=executed, step_seconds=seconds, ceiling=ceiling)
    try:
        record.flops = flops(peak=peak)
    except ValueError as error:  # more ran than the peak allows: then no share of it is worth a number
        record.flops = flops(peak=Peak(None, str(error)))
    if not counted:
        return
    if record.kind == "measured":  # a dry run has those of a CPU
        record.flops.attention_kernels = sorted(set[str]().union(*(one.attention_kernels for one in counted.values())))
    per_rank = [{"rank": rank, **one.memory} for rank, one in sorted(counted.items())]
    record.memory = Memory(per_rank=per_rank, step=step, note=note)
    peaks = [one["peak_bytes"] for one in per_rank]
    if complete and None not in peaks:
        record.memory.max_peak_bytes, record.memory.min_peak_bytes = max(peaks), min(peaks)
    record.traffic = largest_traffic([one.traffic for one in counted.values()])
    orders = {frozenset(action.stage for action in one.actions): one.actions for one in counted.values() if one.actions}
    if sum(map(len, orders)) == recipe.n_stages > 1:  # of every rank of the pipeline
        record.pipeline.bubble_fraction_ideal = ideal_bubble(list(orders.values()))


def largest_traffic(of_ranks: Sequence[list[dict[str, Any]] | None]) -> list[dict[str, Any]] | None:
    """The `traffic` of a record: of each kind of message, the row of the rank that sends most, and the most that any
    sends to another host."""
    if None in of_ranks:
        return None
    rows = [row for of_rank in of_ranks for row in of_rank or []]
    largest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["bytes_per_rank"] or 0, reverse=True):
        before = largest.setdefault((row["mesh_dim"], row["collective"]), dict(row))
        if row["bytes_across_hosts"] is not None:
            before["bytes_across_hosts"] = max(row["bytes_across_hosts"], before["bytes_across_hosts"])
    return [row for _, row in sorted(largest.items())]
