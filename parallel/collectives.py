"""The collectives that strategies use, on one dim of a tensor, under the names of torch 2.11 to 2.13.

They are torch's functional ones, which return a new tensor: where the forward of an autograd.Function works in place,
torch.compile of torch 2.11 silently loses the gradient. Where nothing is compiled, the most frequent one goes without
their wrapper.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

# torch 2.13 renamed these and warns at the old names, which are all that 2.11 has.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def all_gather(x: Tensor, *, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts side by side along `dim`: (..., n, ...) -> (..., n · ranks, ...)."""
    parts = functional.wait_tensor(_all_gather(x.contiguous(), 0, group))
    return parts if dim == 0 else torch.cat(parts.chunk(group.size()), dim=dim)


def reduce_scatter(x: Tensor, *, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along `dim`, of the sum over ranks: (..., n, ...) -> (..., n / ranks, ...)."""
    parts = x if dim == 0 else torch.cat(x.chunk(group.size(), dim=dim))
    return functional.wait_tensor(_reduce_scatter(parts.contiguous(), "sum", 0, group))


def all_reduce(x: Tensor, *, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """The sum (or op = "max") over ranks, in a new tensor."""
    if not torch.compiler.is_compiling():
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
        return x
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), op, group))


def exchange(message: Tensor, *, to: int, source: int, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts to send `message` to rank `to`, modulo the group's size. The function returned waits for `source`'s."""
    message, size = message.contiguous(), group.size()
    received = torch.empty_like(message)
    sends = dist.P2POp(dist.isend, message, group=group, group_peer=to % size)
    receives = dist.P2POp(dist.irecv, received, group=group, group_peer=source % size)
    works = dist.batch_isend_irecv([sends, receives])

    def receive() -> Tensor:
        for work in works:
            work.wait()
        return received

    return receive


def gathered(value: Any) -> list[Any]:
    """The objects that the ranks give, by rank, on every rank. For what is small and rare: they are pickled."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
