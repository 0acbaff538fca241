"""Everything here that depends on torch's private parts, of 2.11 to 2.13: when torch changes, this is the file to read.

A patch holds within its context manager alone.
"""

import contextlib
import functools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]  # a function -> the one that takes its place


def _wrapped(owner: Any, name: str, wrapper: Wrapper) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(owner, name, wrapper(getattr(owner, name)))


# ---- observing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def wrapped_waits(wrapper: Wrapper) -> Iterator[None]:
    """Within, whoever waits for a collective waits in wrapper(wait)."""
    with _wrapped(dist.Work, "wait", wrapper), _wrapped(functional, "wait_tensor", wrapper):
        yield


@contextlib.contextmanager
def wrapped_storages(resize: Wrapper) -> Iterator[None]:
    """FSDP2 frees and regrows gathered weights by resizing their storage, which is no operator: within, by `resize`."""
    with _wrapped(torch.UntypedStorage, "resize_", resize):
        yield


@contextlib.contextmanager
def shapes_apart() -> Iterator[Callable[[], bool]]:
    """DTensor runs each new operator once on FakeTensors of global shape, to learn that of its result, and no dispatch
    mode can tell them from others: within, what this gives says whether it does so now.
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    running: list[bool] = []

    @contextlib.contextmanager
    def propagating() -> Iterator[None]:
        running.append(True)
        try:
            yield
        finally:
            running.pop()

    with _wrapped(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagating()):
        yield lambda: bool(running)


@contextlib.contextmanager
def told_of_streams(*, mark: Callable[[Any], Any], wait: Callable[[Any, Any], None]) -> Iterator[None]:
    """Within, the streams and events of torch.cpu, which do nothing, tell what they would do on a device.

    mark: of a stream, gives what shall stand for the end of all that is on it by now. wait: of a stream, and of that.
    """

    def record(event: Any, stream: Any = None) -> None:
        event.mark = mark(stream or torch.cpu.current_stream())

    def wait_event(stream: Any, event: Any) -> None:
        wait(stream, getattr(event, "mark", event))

    with (
        _wrapped(torch.cpu.Stream, "record_event", lambda _: lambda stream: mark(stream)),
        _wrapped(torch.cpu.Stream, "wait_event", lambda _: wait_event),
        _wrapped(torch.cpu.Stream, "wait_stream", lambda _: lambda stream, other: wait(stream, mark(other))),
        _wrapped(torch.cpu.Event, "record", lambda _: record),
    ):
        yield


@contextlib.contextmanager
def replaced_functions(*, rms_norm: Callable[..., Tensor], attention: Wrapper) -> Iterator[None]:
    """Within, these two of torch.nn.functional are other ones; not by a torch function mode, which would not see what
    backward computes again.
    """
    with (
        _wrapped(torch.nn.functional, "rms_norm", lambda _: rms_norm),
        _wrapped(torch.nn.functional, "scaled_dot_product_attention", attention),
    ):
        yield


def n_compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # takes half a second to import
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


# ---- torch.compile -------------------------------------------------------------------------------------------------


def safe_guards() -> None:
    """Turns a short cut of torch 2.11's guards off that reads freed memory; later ones have it off. pytorch#181873"""
    import torch._dynamo.config as dynamo_config  # half a second, and of use where something is compiled alone

    dynamo_config.use_recursive_dict_tags_for_guards = False


def no_cached_graphs() -> contextlib.AbstractContextManager[Any]:
    """Within, nothing compiled comes from disk: graphs are found there whatever attention kernel they were made for."""
    return functorch_config.patch(enable_autograd_cache=False)


# ---- groups and meshes -----------------------------------------------------------------------------------------------


def silence_flattening() -> None:
    """FSDP2 itself slices the flattened dimension that it is given, and is then told that this will change."""
    warnings.filterwarnings("ignore", message="Slicing a flattened dim", category=UserWarning)


@contextlib.contextmanager
def one_thread_per_gloo_group() -> Iterator[None]:
    """Within, a new gloo group has one thread for its collectives, where by default it has two.

    When one is done, its thread notes the collective's name as the group's last, without a lock. A long one (that of a
    reduce-scatter, ALLREDUCE_COALESCED) lies on the heap, where two threads that are done at once free it twice, or
    write the next name into memory freed by the other: some time later malloc finds it, and the rank dies.

    And all such groups of this process share a device for their connections, which has a thread of its own that wakes
    100 times a second, whether there is something to do or not.
    """
    gloo: Any = dist.ProcessGroupGloo  # of which torch's stubs do not know all

    def with_one_thread(init: Callable[..., None]) -> Callable[..., None]:
        def make(group: Any, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._devices = _gloo_devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
            options._threads, options._timeout = 1, timeout
            init(group, store, rank, size, options)

        return make

    with _wrapped(gloo, "__init__", with_one_thread):
        yield


@functools.cache
def _gloo_devices(names: str) -> list[Any]:
    gloo: Any = dist.ProcessGroupGloo
    devices = [gloo.create_device(interface=name) for name in names.split(",") if name]
    return devices or [gloo.create_default_device()]


def set_timeout(group: dist.ProcessGroup, *, seconds: float) -> None:
    """Groups of a mesh do not take the timeout of the run's group, but 10 minutes on NCCL and 30 on gloo."""
    if dist.get_backend(group) != "fake":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


# ---- dry runs ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_group(*, rank: int, world_size: int) -> Iterator[None]:
    """Within, this process is `rank` of a world whose collectives return at once, on fake tensors too."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  teaches fake tensors the collectives
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with _lazy_chunks(), _static_stages(), _messages_hold():
            yield
    finally:
        dist.destroy_process_group()
        debug._clear_sharding_prop_cache()  # which remembers meshes: an equal one would get these dead groups


class _Chunks:
    """torch.chunk as a list that makes only the chunks it is asked for; those past the end are empty."""

    def __init__(self, tensor: Tensor, n_chunks: int, dim: int) -> None:
        self.tensor, self.dim, self.size = tensor, dim, -(-tensor.shape[dim] // n_chunks)

    def __getitem__(self, i: int) -> Tensor:
        start = i * self.size
        size = min(self.size, self.tensor.shape[self.dim] - start)
        return self.tensor.narrow(self.dim, start, size) if size > 0 else self.tensor.new_empty(0)


def _lazy_chunks() -> contextlib.AbstractContextManager[Any]:
    """FSDP cuts each parameter in as many tensors as there are ranks, and takes one: minutes at 16,384 ranks."""
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param

    return mock.patch.object(fsdp_param, "_chunk_with_empty", _Chunks)


def _static_stages() -> contextlib.AbstractContextManager[Any]:
    """From torch 2.12 on stages vote on whether they know their shapes (ours do), and read the result from a tensor."""
    import torch.distributed.pipelining.schedules as schedules

    def elect(_schedule: Any, stages: list[Any], *_: Any) -> None:
        from torch.distributed.pipelining._utils import InferenceMode

        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    return mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", elect, create=True)  # torch 2.11 has no vote


def several_stages_orders(
    schedule: Any, pp: int, n_microbatches: int, stages_per_rank: int
) -> list[list[tuple[str, int, int]]]:
    """Of each rank what a schedule of several stages a rank does: (name, stage, microbatch)."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    names = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}

    def each(action: Any) -> list[tuple[str, int, int]]:
        if action is None:
            return []
        if action.sub_actions:  # of which two go on at once, as dualpipev's
            return [single for part in action.sub_actions for single in each(part)]
        return [
            (names.get(kind := action.computation_type.name, kind.lower()), action.stage_index, action.microbatch_index)
        ]

    orders = get_schedule_ops(schedule, pp, n_microbatches, stages_per_rank)
    return [[single for action in order for single in each(action)] for order in orders]


@contextlib.contextmanager
def _messages_hold() -> Iterator[None]:
    """A real message keeps its tensor until its work is forgotten; the fake group's are done, and keep nothing."""
    import torch.distributed.pipelining.schedules as schedules

    def holding(send: Callable[..., Any]) -> Callable[..., Any]:
        def sent(messages: list[dist.P2POp], *arguments: Any, **options: Any) -> list[Any]:
            held = types.SimpleNamespace(messages=messages, wait=lambda: None)  # stands among the works
            return [*send(messages, *arguments, **options), held]

        return sent

    with _wrapped(dist, "batch_isend_irecv", holding), _wrapped(schedules, "_batch_p2p", holding):
        yield
