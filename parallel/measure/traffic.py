"""Traffic: what a rank sends during a step, by mesh dimension and kind of collective."""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import JOINED

NAMESPACES = ("c10d", "_c10d_functional")
NO_PAYLOAD = ("barrier", "monitored_barrier_", "wait_tensor", "check_for_nan", "_wrap_tensor_autograd")

# The operators of torch.distributed that carry data -> collective, and which argument is what this rank contributes.
# A collective has several operators: in place or functional, into one tensor or a list, coalesced or not.
OPERATORS = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "all_reduce": ("all_reduce", "input"),
    "all_reduce_": ("all_reduce", "input"),
    "all_reduce_coalesced": ("all_reduce", "inputs"),
    "all_reduce_coalesced_": ("all_reduce", "inputs"),
    "_allgather_base_": ("all_gather", "input_tensor"),
    "allgather_": ("all_gather", "input_tensors"),
    "allgather_coalesced_": ("all_gather", "input_list"),
    "allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "all_gather_into_tensor": ("all_gather", "input"),
    "all_gather_into_tensor_out": ("all_gather", "input"),
    "all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "alltoall_base_": ("all_to_all", "input"),
    "all_to_all_single": ("all_to_all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "broadcast": ("broadcast", "input"),
    "send": ("send", "tensors"),
    "isend": ("send", "tensor"),
    "recv_": ("recv", "tensors"),
    "recv_any_source_": ("recv", "tensors"),
    "irecv": ("recv", "tensor"),
}


class TrafficLog(TorchDispatchMode):
    """Counts every collective and point-to-point message that this rank takes part in while the log is entered.

        with TrafficLog(mesh) as log:
            ...  # a step
        log.rows()  # [{"mesh_dim": "tp", "collective": "all_reduce", "calls": 34, "bytes_per_rank": 278528}, ...]

    bytes_per_rank are those that this rank sends by the textbook algorithm, whatever the library does. With n bytes
    that the rank puts in and N ranks in the group:

        all_reduce      2·n·(N-1)/N    ring: a reduce-scatter, then an all-gather of the parts
        all_gather      n·(N-1)        ring; n is the rank's part, so of the whole (N-1)/N
        reduce_scatter  n·(N-1)/N      ring; n is the whole
        all_to_all      n·(N-1)/N      pairwise: all but the part it keeps
        broadcast       n on the root, 0 elsewhere: ranks pass it on in a chain, and the root sends it once
        send, recv      n, 0

    Patarasuk and Yuan 2009 (doi:10.1016/j.jpdc.2008.09.002); NCCL sends the same with its ring algorithm. Padding that
    travels is counted. Barriers carry nothing and a group of one rank sends nothing: neither has a row. A collective
    that is not listed here has a row with null for its bytes.

    mesh_dim is the dimension of `mesh` (of build_mesh) whose ranks talk to each other; dimensions that act as one are
    joined ("dp_shard·cp"), "world" is all ranks where no dimension is, and "none" a group that the mesh does not know.

    Works on real tensors and process groups, and on FakeTensors and a fake group. Enter it after a FakeTensorMode.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self._dim_of_ranks = _dim_of_ranks(mesh)
        self._dim_of_group: dict[str, str] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._bytes: dict[tuple[str, str], Fraction | None] = {}  # exact until the end: an N of 3 gives thirds

    def rows(self) -> list[dict[str, Any]]:
        """The `traffic` of a record: {mesh_dim, collective, calls, bytes_per_rank}, sorted by the first two."""
        return [
            {
                "mesh_dim": dim,
                "collective": collective,
                "calls": calls,
                "bytes_per_rank": None if (sent := self._bytes[dim, collective]) is None else round(sent),
            }
            for (dim, collective), calls in sorted(self._calls.items())
        ]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they turn into operators on local tensors, which come by here
        if func.namespace in NAMESPACES:
            names = (argument.name for argument in func._schema.arguments)
            self._record(func._opname, dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, arguments: dict[str, Any]) -> None:
        if operator in NO_PAYLOAD:
            return
        group = _group(arguments.get("process_group", arguments.get("group_name")))
        if group.size() == 1:
            return
        collective, payload = OPERATORS.get(operator, (operator.strip("_"), ""))
        key = (self._dim(group), collective)
        self._calls[key] = self._calls.get(key, 0) + 1
        before = self._bytes.get(key, Fraction(0))
        if collective in SENT and before is not None:
            n_bytes = sum(tensor.nbytes for tensor in tensors_in(arguments[payload]))
            self._bytes[key] = before + SENT[collective](n_bytes, group, arguments)
        else:
            self._bytes[key] = None

    def _dim(self, group: dist.ProcessGroup) -> str:
        name = group.group_name
        if name not in self._dim_of_group:
            self._dim_of_group[name] = self._dim_of_ranks.get(_ranks(group), "none")
        return self._dim_of_group[name]


def _all_to_all(n_bytes: int, group: dist.ProcessGroup, arguments: dict[str, Any]) -> Fraction:
    rows = arguments["input_split_sizes"] or [1] * group.size()  # none given: equal parts
    return n_bytes * (1 - Fraction(rows[group.rank()], max(1, sum(rows))))


def _broadcast(n_bytes: int, group: dist.ProcessGroup, arguments: dict[str, Any]) -> Fraction:
    root = arguments.get("root_rank", arguments.get("src"))
    return Fraction(n_bytes if group.rank() == root else 0)


SENT: dict[str, Callable[[int, dist.ProcessGroup, dict[str, Any]], Fraction]] = {
    "all_reduce": lambda n, group, _: Fraction(2 * n * (group.size() - 1), group.size()),
    "all_gather": lambda n, group, _: Fraction(n * (group.size() - 1)),
    "reduce_scatter": lambda n, group, _: Fraction(n * (group.size() - 1), group.size()),
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send": lambda n, *_: Fraction(n),
    "recv": lambda *_: Fraction(0),
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument or result of an operator: a tensor, or lists of them to any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _dim_of_ranks(mesh: DeviceMesh) -> dict[tuple[int, ...], str]:
    """Global ranks of this rank's groups -> dimension.

    Names go by ranks, not by group: torch gives a dimension that spans all ranks the default group, and a flattened
    dimension with one member of more than one rank is that member.
    """
    assert mesh.mesh_dim_names is not None
    dims: dict[tuple[int, ...], str] = {}
    for name in (*mesh.mesh_dim_names, *JOINED):
        members = JOINED.get(name, (name,))
        joined = "·".join(member for member in members if mesh[member].size() > 1)
        dims.setdefault(_ranks(mesh.get_group(name)), joined)
    dims.setdefault(tuple(range(dist.get_world_size())), "world")
    return dims


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _group(argument: Any) -> dist.ProcessGroup:
    """A group as an operator takes it: by name, as itself (functional, torch 2.13), or boxed for TorchScript."""
    if isinstance(argument, str):
        return _resolve_process_group(GroupName(argument))
    return argument if isinstance(argument, dist.ProcessGroup) else dist.ProcessGroup.unbox(argument)
