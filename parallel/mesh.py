"""Ranks -> one named mesh of five dimensions, and the sub-meshes that strategies ask for."""

import dataclasses
import warnings

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from parallel.recipe import Recipe

# FSDP2 itself slices the flattened dimension that it is given, and is then told that this will change.
warnings.filterwarnings("ignore", message="Slicing a flattened dim", category=UserWarning)


def build_mesh(recipe: Recipe, device_type: str) -> DeviceMesh:
    """The mesh (pp, dp_replicate, dp_shard, cp, tp); tp varies fastest, so that its ranks are neighbours.

    Beside the five, two flattened dimensions can be asked for by name:
    `dp_shard_cp`: the ranks FSDP shards over, since context ranks hold the same weights and add their gradients;
    `data`: all ranks that see different tokens, dp_replicate x dp_shard x cp.
    """
    names = tuple(field.name for field in dataclasses.fields(recipe.parallel))
    mesh = init_device_mesh(device_type, dataclasses.astuple(recipe.parallel), mesh_dim_names=names)
    mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    mesh["dp_replicate", "dp_shard", "cp"]._flatten("data")
    return mesh


def group_of(mesh: DeviceMesh, dim: str) -> dist.ProcessGroup:
    """The process group of this rank along one dimension of the mesh."""
    return mesh[dim].get_group()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`; the tensor itself where it is not a DTensor. Differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slice_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of `parameter`, a DTensor or a plain tensor of the same shape.

    tp is the last dimension of a mesh and cuts first; FSDP cuts what tp left.
    """
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for mesh_dim in reversed(range(mesh.ndim)):
            dim = split_dim(parameter, mesh_dim)
            if dim is not None:
                rows = part_of(whole.shape[dim], mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
                whole = whole.narrow(dim, rows.start, len(rows))
    return whole


def part_of(n: int, n_parts: int, i: int) -> range:
    """The i-th part of `n` rows as torch.chunk cuts them: all of one size, but the last ones smaller or empty."""
    size = -(-n // n_parts)
    return range(min(i * size, n), min((i + 1) * size, n))


def split_dim(parameter: DTensor, mesh_dim: int) -> int | None:
    """The dim of `parameter` that is split over mesh dimension `mesh_dim`; None where it is replicated."""
    return getattr(parameter.placements[mesh_dim], "dim", None)
