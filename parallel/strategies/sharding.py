"""FSDP and HSDP: each rank owns a part of every weight, and fetches the rest block by block (FSDP2, arXiv:2304.11277).

With reshard_after_forward a block's weights are dropped after its forward, and fetched again in backward.
"""

import functools

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.recipe import Recipe
from parallel.transformer import Transformer


def apply_sharding(model: Transformer, recipe: Recipe, *, mesh: DeviceMesh) -> None:
    """Splits the parameters of `model` over dp_shard_cp of `mesh` (of build_mesh): one group a block, one for the rest.

    Gradients are averaged over replicas too, in float32 where the computation is in bfloat16.
    """
    precision = MixedPrecisionPolicy()
    if recipe.train.dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = mesh["dp_replicate", "dp_shard_cp"] if recipe.parallel.dp_replicate > 1 else mesh["dp_shard_cp"]
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=precision)
    reshard, prefetch = recipe.sharding.reshard_after_forward, recipe.sharding.prefetch
    units = [shard(block, reshard_after_forward=reshard) for block in model.blocks.values()]
    if model.embedding is not None and not model.tied:
        shard(model.embedding, reshard_after_forward=reshard)
    if model.norm is not None and model.output is not None and not model.tied:
        # Last in forward, first in backward: dropping these weights between the two would gain nothing.
        shard([model.norm, model.output], reshard_after_forward=False)
    shard(model, reshard_after_forward=False)
    for i, unit in enumerate(units if prefetch > 1 else ()):  # 1 is what FSDP2 does by itself
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + prefetch])
        unit.set_modules_to_backward_prefetch(units[max(0, i - prefetch) : i][::-1])


def before_microbatch(model: Transformer, last: bool) -> None:
    """HSDP: only the last microbatch's gradient travels between replicas; the sums before it stay in the shards."""
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(last)
