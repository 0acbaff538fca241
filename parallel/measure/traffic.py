"""Traffic: what a rank sends during a step, by mesh dimension and kind of collective."""

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.mesh import JOINED, size_of
from parallel.recipe import MESH_DIMS

NO_PAYLOAD = ("barrier", "monitored_barrier_", "wait_tensor", "check_for_nan", "_wrap_tensor_autograd")

# Of these it is known what a rank sends. Their operators begin like them, but for underscores and the i of isend: there
# are several of each, in place or functional, into one tensor or a list, coalesced or not.
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv")


class TrafficLog(TorchDispatchMode):
    """Counts every collective and point-to-point message that this rank takes part in while the log is entered.

        with TrafficLog(mesh) as log:
            ...  # a step
        log.rows()  # [{"mesh_dim": "tp", "collective": "all_reduce", "calls": 34, "bytes_per_rank": 278528, ...}, ...]

    bytes_per_rank are those that this rank sends by the textbook algorithm (docs/measures.md), with padding, and
    bytes_across_hosts those of them that go to a rank on another host: None where `hosts`, the numbers of the ranks'
    hosts, are not given. Barriers carry nothing and a group of one rank sends nothing: neither has a row. What is not
    of COLLECTIVES has one with null for its bytes.

    mesh_dim is the dimension of `mesh` (of build_mesh) whose ranks talk to each other; dimensions that act as one are
    joined ("dp_shard·cp"), "world" is all ranks where no dimension is, and "none" a group that the mesh does not know.

    Works on real tensors and process groups, and on FakeTensors and a fake group. Enter it after a FakeTensorMode.
    """

    def __init__(self, mesh: DeviceMesh, hosts: Sequence[int] | None = None) -> None:
        super().__init__()
        self._hosts = hosts
        self._dim_of_ranks = dims_of_ranks(mesh)
        self._dim_of_group: dict[str, str] = {}
        # By dimension and collective: calls, bytes and those across hosts, exact until the end, as 3 ranks give thirds.
        self._sent: dict[tuple[str, str], tuple[int, Fraction | None, Fraction | None]] = {}

    def rows(self) -> list[dict[str, Any]]:
        """Of a record, by the first two: {mesh_dim, collective, calls, bytes_per_rank, bytes_across_hosts}."""
        return [
            {"mesh_dim": dim, "collective": collective, "calls": calls}
            | {"bytes_per_rank": None if n_bytes is None else round(n_bytes)}
            | {"bytes_across_hosts": None if across is None else round(across)}
            for (dim, collective), (calls, n_bytes, across) in sorted(self._sent.items())
        ]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they turn into operators on local tensors, which come by here
        if carries(func):
            self._record(func._opname, by_name(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, arguments: dict[str, Any]) -> None:
        group = group_of(arguments.get("process_group", arguments.get("group_name")))
        if group.size() == 1:
            return
        known = collective_of(operator)
        key = (self._dim(group), known or operator.strip("_"))
        calls, before, across = self._sent.get(key, (0, Fraction(0), Fraction(0)))
        if known is None or before is None:
            self._sent[key] = calls + 1, None, None
            return
        n_bytes = bytes_put_in(arguments)
        sent = before + n_bytes * _share_sent(known, group, arguments)
        if self._hosts is None or across is None:
            self._sent[key] = calls + 1, sent, None
        else:
            far = [self._hosts[rank] != self._hosts[dist.get_rank()] for rank in dist.get_process_group_ranks(group)]
            self._sent[key] = calls + 1, sent, across + n_bytes * _share_sent(known, group, arguments, far)

    def _dim(self, group: dist.ProcessGroup) -> str:
        name = group.group_name
        if name not in self._dim_of_group:
            self._dim_of_group[name] = self._dim_of_ranks.get(ranks_of(group), "none")
        return self._dim_of_group[name]


def carries(operator: Any) -> bool:
    """Whether an operator of torch is a collective or a message, with something in it."""
    return operator.namespace in ("c10d", "_c10d_functional") and operator._opname not in NO_PAYLOAD


def collective_of(operator: str) -> str | None:
    """That of COLLECTIVES which an operator of this name is."""
    spelt = operator.replace("_", "").removeprefix("i")
    if operator == "alltoall_":  # of lists, with a length of its own for each rank
        return None
    return next((collective for collective in COLLECTIVES if spelt.startswith(collective.replace("_", ""))), None)


def bytes_put_in(arguments: dict[str, Any]) -> int:
    """By this rank: those of the first argument whose name begins with input, or where there is none with tensor."""
    payload = next(arguments[name] for start in ("input", "tensor") for name in arguments if name.startswith(start))
    return sum(tensor.nbytes for tensor in tensors_in(payload))


def _share_sent(
    collective: str, group: dist.ProcessGroup, arguments: dict[str, Any], only: Sequence[bool] | None = None
) -> Fraction | int:
    """How many times the bytes that this rank puts in it sends: in a ring, or of a broadcast in a chain.

    only: the ranks of the group to which what is sent counts; None: all.
    Patarasuk and Yuan 2009 (doi:10.1016/j.jpdc.2008.09.002); NCCL sends the same with its ring algorithm.
    """
    if collective == "all_to_all":  # all but the part it keeps
        rows = arguments["input_split_sizes"] or [1] * group.size()  # none given: equal parts
        counted = [only is None or only[rank] for rank in range(group.size())]
        counted[group.rank()] = False
        return Fraction(sum(itertools.compress(rows, counted)), max(1, sum(rows)))
    to = arguments["dst"] if collective == "send" else (group.rank() + 1) % group.size()
    if only is not None and not only[to]:
        return 0
    if collective == "broadcast":
        return int(group.rank() == arguments.get("root_rank", arguments.get("src")))
    if collective in ("send", "recv"):
        return int(collective == "send")
    rest = Fraction(group.size() - 1, group.size())
    return {"all_reduce": 2 * rest, "all_gather": rest * group.size(), "reduce_scatter": rest}[collective]


def by_name(operator: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call: the positions of the same ones differ between operators of a kind."""
    defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    return defaults | dict(zip(defaults, args, strict=False)) | kwargs


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an argument or result of an operator: a tensor, or lists of them to any depth."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def dims_of_ranks(mesh: DeviceMesh) -> dict[tuple[int, ...], str]:
    """Global ranks of this rank's groups -> dimension.

    Names go by ranks, not by group: torch gives a dimension that spans all ranks the default group, and a flattened
    dimension with one member of more than one rank is that member.
    """
    dims: dict[tuple[int, ...], str] = {}
    for name in (*MESH_DIMS, *JOINED):
        members = [dim for dim in JOINED.get(name, (name,)) if size_of(mesh, dim) > 1]
        dims.setdefault(ranks_of(mesh.get_group(name)), "·".join(members))
    return {tuple(range(dist.get_world_size())): "world"} | dims


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def group_of(argument: Any) -> dist.ProcessGroup:
    """A group as an operator takes it: by name, as itself (functional, torch 2.13), or boxed for TorchScript."""
    if isinstance(argument, str):
        return _resolve_process_group(GroupName(argument))
    return argument if isinstance(argument, dist.ProcessGroup) else dist.ProcessGroup.unbox(argument)
