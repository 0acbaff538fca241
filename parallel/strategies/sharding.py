"""FSDP and HSDP: each rank owns a part of every weight, and fetches the rest block by block (FSDP2, arXiv:2304.11277).

reshard_after_forward = true    drop a block's weights after its forward, fetch them again in backward (ZeRO-3)
reshard_after_forward = false   keep them until its backward (gradients and optimizer state stay split: ZeRO-2)
dp_replicate > 1                HSDP: parts are split over dp_shard, and their gradients averaged over replicas
"""

import functools

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.transformer import Transformer


def apply_sharding(
    model: Transformer,
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    prefetch: int,
) -> None:
    """Splits the parameters of `model` over the last dimension of `mesh`: one group a block, one for the rest.

    mesh: (dp_shard_cp) for FSDP, (dp_replicate, dp_shard_cp) for HSDP. Gradients are averaged over the whole mesh, in
    float32 where the computation is in bfloat16.
    """
    precision = MixedPrecisionPolicy()
    if compute_dtype == torch.bfloat16:
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=precision)
    blocks = list(model.blocks.values())
    for block in blocks:
        shard(block, reshard_after_forward=reshard_after_forward)
    if model.embedding is not None and not model.tied:
        shard(model.embedding, reshard_after_forward=reshard_after_forward)
    if model.norm is not None and model.output is not None and not model.tied:
        # Last in forward, first in backward: dropping these weights between the two would gain nothing.
        shard([model.norm, model.output], reshard_after_forward=False)
    shard(model, reshard_after_forward=False)
    if prefetch > 1:  # 1 is what FSDP2 does by itself
        units: list[FSDPModule] = [module for module in blocks if isinstance(module, FSDPModule)]
        for i, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + prefetch])
            unit.set_modules_to_backward_prefetch(units[max(0, i - prefetch) : i][::-1])


def before_microbatch(model: Transformer, last: bool) -> None:
    """HSDP: only the last microbatch's gradient travels between replicas; the sums before it stay in the shards."""
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(last)
