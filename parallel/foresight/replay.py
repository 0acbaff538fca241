"""What a rank's tape (parallel.measure.tape) takes on a cluster: each operator and message by the formulas of price.py,
on the streams on which it would run.

The host gives operators out in their order, one after the other; each starts when the host has given it out and its
stream is done with what came before. The messages of a group go one after the other, each when its stream has come to
it. Where a stream waits, it waits; what is left of a message by then is exposed.
"""

import itertools
import math
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.actions import Action
from parallel.foresight.price import (
    FIXED_SECONDS,
    PARTS,
    RING_HIDDEN,
    Constants,
    Links,
    Rates,
    fused_attention,
    memory_rate,
    operator_share,
    product,
)
from parallel.measure.tape import Begin, End, Event, Mark, Message, Operator, Wait

Seconds = dict[str, float]  # by part of a step


class Done(NamedTuple):
    """An action of a pipeline."""

    action: Action
    seconds: float
    before: float = 0.0  # seconds between the action before and this one: gradients of a stage that is done, for one


@dataclass(frozen=True)
class Played:
    """What one rank does, if it never waits for another of its pipeline."""

    parts: Seconds  # add up to what its tape takes
    actions: tuple[Done, ...]  # in their order

    @property
    def around(self) -> float:
        """Seconds before the first action, and after the last."""
        return sum(self.parts.values()) - sum(it.before + it.seconds for it in self.actions)


def played(tape: Sequence[Event], rates: Rates, constants: Constants) -> Played:
    return _Player(_Costs(rates, constants), tape).play()


# ---- seconds of one operator, one message --------------------------------------------------------------------------


class _Costs:
    def __init__(self, rates: Rates, constants: Constants) -> None:
        self._rates, self._constants = rates, constants
        self._links = Links(rates, constants)
        self._seconds_per_byte = float(operator_share(rates, constants, compiled=0)) / memory_rate(rates)
        self.host = float(rates.launch_seconds * constants["launch"])
        self.hidden = {"data_messages": rates.data_hidden * constants["overlap"], "context_messages": RING_HIDDEN}

    def operator(self, it: Operator) -> float:
        r, k = self._rates, self._constants
        if it.kind == "bytes":
            return it.n_bytes / memory_rate(r) if it.updates else it.n_bytes * self._seconds_per_byte
        if it.kind == "product":
            matrices, m, n, inner = it.shape
            return float(product(r, k, m, n, inner, element_bytes=it.element_bytes, matrices=matrices))
        heads, queries, keys, head_dim, causal = it.shape
        pairs, piece = heads * queries * keys / (1 + causal), max(queries, keys)
        back = it.kind == "attention_backward"
        return float(fused_attention(r, k, pairs, head_dim=head_dim, piece=piece, backward=back))

    def message(self, it: Message) -> float:
        links, among = self._links, {"ranks": it.ranks, "stride": it.stride}
        if it.collective == "all_reduce":
            seconds = links.all_reduce(it.n_bytes, **among)
        elif it.collective == "all_to_all":
            seconds = links.all_to_all(it.n_bytes, **among)
        elif it.collective == "recv" and it.dim != "pp":
            seconds = links.pass_on(it.n_bytes, **among)
        elif it.collective in ("send", "recv"):
            seconds = links.send(it.n_bytes, stride=it.stride)
        elif it.collective == "reduce_scatter":
            seconds = links.scatter(it.n_bytes, **among)
        else:
            seconds = links.gather(it.n_bytes, **among)
        if part_of(it) == "tensor_messages":
            seconds *= self._constants["tensor_messages"] * (1 - self._rates.tensor_hidden)
        return float(seconds)


def part_of(it: Message) -> str:
    if it.dim == "cp" and it.collective == "all_reduce":
        return "data_messages"  # of gradients, where context ranks are all that see different tokens
    return {"tp": "tensor_messages", "cp": "context_messages", "pp": "pipeline_messages"}.get(it.dim, "data_messages")


# ---- one rank ------------------------------------------------------------------------------------------------------


@dataclass
class _Queue:
    """A stream, as far as it has come."""

    free: float = 0.0
    part: str = "launches"  # what it came last to wait for


@dataclass
class _Player:
    costs: _Costs
    tape: Sequence[Event]
    parts: Seconds = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    host: float = 0.0
    clock: float = 0.0  # the end of what the rank computed last, or waited for
    streams: dict[int, _Queue] = field(default_factory=lambda: {0: _Queue()})
    groups: dict[str, float] = field(default_factory=dict)  # when its last message is there
    points: dict[int, tuple[float, str]] = field(default_factory=dict)
    busy: list[tuple[float, float]] = field(default_factory=list)  # when the rank computes
    busy_before: list[float] = field(default_factory=list)  # seconds, by each of those
    under_way: list[tuple[float, float, str]] = field(default_factory=list)  # messages that others than it wait for

    def play(self) -> Played:
        last = max((i for i, event in enumerate(self.tape) if isinstance(event, End)), default=-1)
        windows: list[tuple[Action, float, float, float]] = []  # with the end of the one before, its start and end
        for i, event in enumerate(self.tape):
            match event:
                case Operator():
                    self._operator(event)
                case Message():
                    self._message(event, of_schedule=event.dim == "pp" and i < last)
                case Mark():
                    queue = self._stream(event.stream)
                    self.points[event.point] = (queue.free, queue.part)
                case Wait():
                    self._wait(event.stream, *self.points.get(event.point, (0.0, "launches")))
                case Begin():
                    self._settle()
                    began = self.clock
                case End():
                    self._settle()
                    windows.append((event.action, windows[-1][3] if windows else began, began, self.clock))
        for queue in self.streams.values():
            self._wait(0, queue.free, queue.part)
        self._settle()
        self.busy_before = [0.0, *itertools.accumulate(stop - begin for begin, stop in self.busy)]
        self.parts["launches"] += max(0.0, self.host - self.clock)
        self.parts["optimizer"] += FIXED_SECONDS
        done = [
            Done(action, end - start + self._lost(start, end), start - before + self._lost(before, start))
            for action, before, start, end in windows
        ]
        for part, seconds in self._contended(0.0, self.clock).items():
            self.parts[part] += seconds
        return Played(self.parts, tuple(done))

    def _operator(self, it: Operator) -> None:
        self.host += self.costs.host
        if it.kind == "view":
            return
        queue, seconds = self._stream(it.stream), self.costs.operator(it)
        start = max(queue.free, self.host)
        if it.stream == 0:
            self._gap(start)
            self.parts[_part_of_operator(it)] += seconds
            self.busy.append((start, start + seconds))
            self.clock = start + seconds
        queue.free = start + seconds

    def _message(self, it: Message, *, of_schedule: bool) -> None:
        self.host += self.costs.host
        if it.collective == "send" or of_schedule:
            return  # who receives pays; and those between stages are of the whole pipeline
        queue, part = self._stream(it.stream), part_of(it)
        start = max(queue.free, self.host, self.groups.get(it.dim, 0.0))
        end = self.groups[it.dim] = start + self.costs.message(it)
        self.points[it.point] = (end, part)
        if it.blocks:
            self._wait(it.stream, end, part)
        if it.stream != 0 or not it.blocks:
            self.under_way.append((start, end, part))

    def _wait(self, stream: int, until: float, part: str) -> None:
        queue = self._stream(stream)
        if until > queue.free:
            queue.free, queue.part = until, part

    def _stream(self, number: int) -> _Queue:
        return self.streams.setdefault(number, _Queue())

    def _gap(self, until: float) -> None:
        """Up to there the rank computes nothing: for the sake of what came last, the host or a message."""
        queue = self.streams[0]
        self.parts[queue.part if until == queue.free else "launches"] += until - self.clock

    def _settle(self) -> None:
        """Has waited for all that it was told to wait for."""
        self._gap(self.streams[0].free)
        self.clock = self.streams[0].free

    def _lost(self, start: float, end: float) -> float:
        return sum(self._contended(start, end).values())

    def _contended(self, start: float, end: float) -> Seconds:
        """What computing and messages cost each other between those times: they share memory and multiprocessors."""
        lost: Seconds = {}
        for begin, stop, part in self.under_way:
            if begin < end and stop > start:
                both = self._busy_until(min(stop, end)) - self._busy_until(max(begin, start))
                lost[part] = lost.get(part, 0.0) + both * (1 - float(self.costs.hidden.get(part, 1.0)))
        return lost

    def _busy_until(self, time: float) -> float:
        """Seconds for which the rank has computed by then."""
        i = bisect_right(self.busy, (time, math.inf))
        return self.busy_before[i] - (max(0.0, self.busy[i - 1][1] - time) if i else 0.0)


def _part_of_operator(it: Operator) -> str:
    if it.updates:
        return "optimizer"
    kinds = {"product": "products", "bytes": "other_operators"}
    return kinds.get(it.kind, "attention")


# ---- a pipeline ----------------------------------------------------------------------------------------------------


def makespan(orders: Sequence[Sequence[Done]], *, hop: float) -> tuple[list[float], list[float]]:
    """When each rank is done with all its actions, and how long it waited in all for messages on their way.

    orders: of each rank. A message takes `hop` from when both ranks have come to it: the one that sends has made it,
    the one that receives has done the action before.
    """
    last = max(it.action.stage for order in orders for it in order)
    rank_of = {it.action.stage: rank for rank, order in enumerate(orders) for it in order}
    queues = [deque(order) for order in orders]
    clocks, waited = [0.0] * len(orders), [0.0] * len(orders)
    done: dict[Action, float] = {}
    while any(queues):
        went_on = False
        for rank, queue in enumerate(queues):
            while queue:
                action, seconds, before = queue[0]
                needed = _needed(action, last)
                there = [when for other in needed if (when := done.get(other)) is not None]
                if needed and not there:
                    break
                queue.popleft()
                ready = max(clocks[rank], *there) if there else clocks[rank]
                start = max(ready, clocks[rank] + before)
                if needed and rank_of[needed[0].stage] != rank:
                    waited[rank] += max(0.0, ready + hop - start)
                    start = max(start, ready + hop)
                clocks[rank] = done[action] = start + seconds
                went_on = True
        assert went_on, "an order in which every rank waits for another"
    return clocks, waited


def _needed(action: Action, last: int) -> list[Action]:
    """Of the neighbouring stage; of a backward in one or in two, either."""
    name, stage, microbatch = action
    if name == "forward":
        return [Action(name, stage - 1, microbatch)] if stage else []
    if name == "backward_weight" or stage == last:
        return []
    return [Action(half, stage + 1, microbatch) for half in ("backward", "backward_input")]


def _like(known: Mapping[tuple[str, int, int], Done], action: Action, place: int) -> Done:
    """On the stage at `place` of a rank, from what another does that is like it, but may cut other backwards in two."""
    same = known.get((action.name, place, action.microbatch))
    if same is not None:
        return same._replace(action=action)

    def mean(name: str) -> float:
        return statistics.fmean(
            [it.seconds for (its, at, _), it in known.items() if (its, at) == (name, place)] or [0.0]
        )

    halves = mean("backward_input") + mean("backward_weight")
    return Done(action, mean(action.name) or (halves if action.name == "backward" else mean("backward") / 2))


@dataclass(frozen=True)
class Walk:
    """What a dry run has taped of a step, by rank of the pipeline; of one alone, {0: its tape}."""

    tapes: Mapping[int, Sequence[Event]]
    alike: Sequence[int]  # of each rank of the pipeline, the one of those that does the same
    orders: Sequence[Sequence[Action]] = ()  # of each rank

    def seconds(self, rates: Rates, constants: Constants, *, hop: float) -> Seconds:
        """Of a step by part. hop: of a message from stage to stage."""
        each = {rank: played(tape, rates, constants) for rank, tape in self.tapes.items()}
        if not self.orders:
            [alone] = each.values()
            return alone.parts
        return over_all_stages(self.orders, each, alike=self.alike, hop=hop)


def over_all_stages(
    orders: Sequence[Sequence[Action]], of_ranks: Mapping[int, Played], *, alike: Sequence[int], hop: float
) -> Seconds:
    """Seconds of a step by part, of the rank that ends last, with its bubble.

    of_ranks: by rank of the pipeline. alike: of each rank, the one of those that does the same.
    """
    timed = []
    for order, rank in zip(orders, alike, strict=True):
        mine = of_ranks[rank].actions
        places = {stage: place for place, stage in enumerate(dict.fromkeys(action.stage for action in order))}
        theirs = {stage: place for place, stage in enumerate(dict.fromkeys(it.action.stage for it in mine))}
        known = {(it.action.name, theirs[it.action.stage], it.action.microbatch): it for it in mine}
        timed.append([_like(known, action, places[action.stage]) for action in order])
    ends, waited = makespan(timed, hop=hop)
    totals = [end + of_ranks[rank].around for end, rank in zip(ends, alike, strict=True)]
    # The rank that computes most, of those that end last but for what they wait for each other at the end.
    busiest = max(range(len(orders)), key=lambda rank: sum(of_ranks[alike[rank]].parts.values()))
    parts = dict(of_ranks[alike[busiest]].parts)
    parts["pipeline_messages"] += waited[busiest]
    parts["bubble"] = max(totals) - sum(parts.values())
    return parts
