"""Ranks -> one named mesh, whose dimensions are the keys of [parallel]; and which ranks share what.

A new dimension is a field there, in its place among the others, and what is said of it here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement

from parallel.recipe import MESH_DIMS, Recipe
from parallel.torch_private import set_timeout, silence_flattening

# Dimensions that act as one, under a name of their own.
JOINED = {
    "dp_shard_cp": ("dp_shard", "cp"),  # FSDP shards over these: context ranks hold the same weights, and add gradients
    "data": ("dp_replicate", "dp_shard", "cp"),  # all ranks that see different tokens
}
REPLICA_DIMS = ("dp_replicate", "dp_shard")  # ranks that take different sequences
WEIGHT_DIMS = ("dp_shard_cp", "tp", "pp")  # ranks that may hold different parts of the weights


def build_mesh(recipe: Recipe, device_type: str) -> DeviceMesh:
    """The mesh of MESH_DIMS, whose last varies fastest: its ranks are neighbours. Those JOINED have names, too."""
    mesh = init_device_mesh(device_type, dataclasses.astuple(recipe.parallel), mesh_dim_names=tuple(MESH_DIMS))
    silence_flattening()
    for name, members in JOINED.items():
        mesh[members]._flatten(name)
    for dim in (*MESH_DIMS, *JOINED):
        set_timeout(mesh.get_group(dim), seconds=recipe.train.time_limit_seconds)
    return mesh


def size_of(mesh: DeviceMesh, dim: str) -> int:
    """Ranks along `dim`, which may be one of JOINED: what mesh[dim].size() says, which makes a mesh to tell."""
    names = mesh.mesh_dim_names or ()
    return math.prod(mesh.size(names.index(member)) for member in JOINED.get(dim, (dim,)))


def rank_at(recipe: Recipe, **place: int) -> int:
    """The rank at `place` in the mesh, as cp=1, tp=3; 0 in the dimensions that are not named."""
    rank = 0
    for dim in MESH_DIMS:
        rank = rank * getattr(recipe.parallel, dim) + place.get(dim, 0)
    return rank


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`; the tensor itself where it is not a DTensor. Differentiable."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.requires_grad and not torch.compiler.is_compiling():
        return _LocalPart.apply(tensor)
    return tensor.to_local()


class _LocalPart(torch.autograd.Function):
    """DTensor.to_local of a weight, whose gradient is split as it is: not to find that out saves half the time."""

    @staticmethod
    def forward(ctx: Any, whole: DTensor) -> Tensor:
        ctx.spec = whole._spec
        local = whole.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return DTensor(grad, ctx.spec, requires_grad=False)


def as_dtensor(part: Tensor, whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """`part`, which this rank holds, as a DTensor of the shape of `whole`. The last rank's part may be smaller."""
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def slice_like(whole: Tensor, part: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of it as `part`: a DTensor, or a plain tensor of the same shape.

    tp is the last dimension of a mesh and cuts first; FSDP cuts what tp left.
    """
    if isinstance(part, DTensor):
        mesh = part.device_mesh
        for mesh_dim in reversed(range(mesh.ndim)):
            dim = split_dim(part, mesh_dim)
            if dim is not None:
                rows = part_of(whole.shape[dim], mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
                whole = whole.narrow(dim, rows.start, len(rows))
    return whole


def part_of(n: int, n_parts: int, i: int) -> range:
    """The i-th part of `n` rows as torch.chunk cuts them: all of one size, but the last ones smaller or empty."""
    size = -(-n // n_parts)
    return range(min(i * size, n), min((i + 1) * size, n))


def split_dim(tensor: DTensor, mesh_dim: int) -> int | None:
    """The dim of `tensor` that is split over mesh dimension `mesh_dim`; None where it is replicated."""
    return getattr(tensor.placements[mesh_dim], "dim", None)
