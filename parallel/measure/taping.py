"""Tapes a step of a dry run: each operator by its shapes, each message by its group, on the streams of a device.

A CPU has one queue, but the code that trains says which stream of a device each thing is for: FSDP2 asks torch.cpu for
streams and events, which do nothing there, and are listened to here. A collective that returns when it is done holds
its stream; the result of one that returns at once is waited for by the first operator that touches it.
"""

import contextlib
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import cuda_kernels
from parallel.actions import Action
from parallel.measure.observer import Observer, Step
from parallel.measure.tape import Begin, End, Event, Kind, Mark, Message, Operator, Wait
from parallel.measure.traffic import (
    by_name,
    bytes_put_in,
    carries,
    collective_of,
    dims_of_ranks,
    group_of,
    ranks_of,
    tensors_in,
)
from parallel.torch_private import shapes_apart, told_of_streams

aten = torch.ops.aten
PRODUCTS = {aten.mm: ("self", "mat2"), aten.bmm: ("self", "mat2"), aten.addmm: ("mat1", "mat2")}
ATTENTION = "_scaled_dot_product_"
ROWS = (aten.embedding, aten.gather, aten.index)  # read the rows of a table that they give, not all of it
COPIES = (aten.copy_, aten._foreach_copy_, aten.zero_, aten.fill_)  # do not read what they write
BLIND = (aten.nll_loss_backward,)  # do not read what they are given
NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")


class Taping(Observer):
    """The tape of the `nth` step that it sees, on fake tensors."""

    def __init__(self, mesh: DeviceMesh, *, nth: int) -> None:
        self._dim_of_ranks, self._left = dims_of_ranks(mesh), nth
        self.tape: list[Event] = []

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        self._left -= 1
        with _Mode(self.tape, self._dim_of_ranks) if self._left == 0 else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        if self._left == 0:
            self.tape.append(Begin(action))
        yield
        if self._left == 0:
            self.tape.append(End(action))


class _Mode(TorchDispatchMode):
    def __init__(self, tape: list[Event], dim_of_ranks: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self._tape, self._dim_of_ranks = tape, dim_of_ranks
        self._points = itertools.count(1)
        self._streams = {id(torch.cpu.current_stream()): 0}  # FSDP2 keeps those that it makes
        self._under_way: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # results of messages
        self._updates = False  # the gradients are done
        self._watching = contextlib.ExitStack()

    def __enter__(self) -> "_Mode":
        self._watching.enter_context(told_of_streams(mark=self._mark, wait=self._wait))
        self._of_shapes = self._watching.enter_context(shapes_apart())
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._watching.close()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._of_shapes():
            return result
        if carries(func):
            self._message(func, by_name(func, args, kwargs), result)
        elif func._opname == "wait_tensor":
            self._wait_for(tensors_in(args))
        elif func.namespace in ("aten", "fsdp", cuda_kernels.NAMESPACE) and func._opname not in NOTHING:
            self._operator(func, args, kwargs, result)
        return result

    # ---- operators ----

    def _operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        if not any(isinstance(tensor, FakeTensor) for tensor in (*given, *made)):
            return  # the mesh counts its ranks on the host
        here = {tensor.untyped_storage()._cdata for tensor in given}
        if not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in here for tensor in made):
            self._add("view")
            return
        self._wait_for(given)
        packet, call = func._overloadpacket, by_name(func, args, kwargs)
        self._updates |= packet is aten.linalg_vector_norm
        if packet in PRODUCTS:
            left, right = (call[name] for name in PRODUCTS[packet])
            m, inner, n = left.shape[-2], left.shape[-1], right.shape[-1]
            self._add("product", (math.prod(left.shape[:-2]), m, n, inner), left.element_size())
        elif func._opname.startswith(ATTENTION):
            q, k = call["query"], call["key"]  # (B, H, t, E), (B, K, t', E)
            kind: Kind = "attention_backward" if func._opname.endswith("backward") else "attention"
            shape = (math.prod(q.shape[:2]), q.shape[2], k.shape[2], q.shape[3], int(call["is_causal"]))
            self._add(kind, shape, q.element_size())
        else:
            arguments = func._schema.arguments
            changed = [call[it.name] for it in arguments if it.alias_info is not None and it.alias_info.is_write]
            written = {id(tensor): tensor for tensor in tensors_in((made, changed))}
            read = made if packet in ROWS else [] if packet in BLIND else given
            if packet in COPIES or "out" in kwargs:
                read = [tensor for tensor in given if id(tensor) not in written]
            self._add("bytes", (), 1, sum(map(_bytes, read)) + sum(map(_bytes, written.values())))

    def _add(self, kind: Kind, shape: tuple[int, ...] = (), element_bytes: int = 1, n_bytes: int = 0) -> None:
        self._tape.append(Operator(self._stream(), kind, shape, element_bytes, n_bytes, self._updates))

    # ---- messages and streams ----

    def _message(self, func: Any, call: dict[str, Any], result: Any) -> None:
        group = group_of(call.get("process_group", call.get("group_name")))
        ranks, collective = ranks_of(group), collective_of(func._opname) or func._opname.strip("_")
        if len(ranks) == 1:
            return
        self._wait_for(tensors_in(call))
        n_bytes = bytes_put_in(call) * (len(ranks) if collective == "all_gather" else 1)
        dim, point = self._dim_of_ranks.get(ranks, "none"), next(self._points)
        blocks = call.get("async_op", call.get("asyncOp")) is False  # as torch 2.13 and 2.11 call it
        self._tape.append(
            Message(self._stream(), dim, collective, n_bytes, len(ranks), ranks[1] - ranks[0], point, blocks)
        )
        if not blocks and collective != "send":
            given = [value for name, value in call.items() if not name.startswith("input")]
            for tensor in tensors_in((given, result)):
                storage = tensor.untyped_storage()
                self._under_way[storage._cdata] = weakref.ref(storage), point

    def _wait_for(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._under_way.get(storage._cdata)
            if known is None:
                continue
            del self._under_way[storage._cdata]
            if known[0]() is storage:  # and not a later one at its place
                self._wait(torch.cpu.current_stream(), known[1])

    def _stream(self, stream: Any = None) -> int:
        return self._streams.setdefault(id(stream or torch.cpu.current_stream()), len(self._streams))

    def _mark(self, stream: Any) -> int:
        point = next(self._points)
        self._tape.append(Mark(self._stream(stream), point))
        return point

    def _wait(self, stream: Any, point: int | None) -> None:
        if point is not None:  # of the step before
            self._tape.append(Wait(self._stream(stream), point))


def _bytes(tensor: Tensor) -> int:
    """Of what it shows: a row that is repeated is read once."""
    shown = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(shown) * tensor.element_size()
