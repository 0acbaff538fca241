"""Activation checkpointing: keep fewer activations, and compute them again in backward (Chen et al. 2016,
arXiv:1604.06174; selective: arXiv:2205.05198). Gradients stay bit-equal. docs/strategies.md has what each mode keeps.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.recipe import Operation, Recompute
from parallel.transformer import Block, Rotary, Transformer, walk

aten = torch.ops.aten
OPERATIONS: dict[Operation, tuple[Any, ...]] = {
    "matmul": (aten.mm.default, aten.addmm.default, aten.bmm.default),
    "attention": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ),
}


def recomputed(function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """function(*args), whose activations are not kept."""
    # Nothing in a block draws random numbers, so their state need not be saved.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def apply_recompute(model: Transformer, options: Recompute, *, recomputed: Callable[..., Tensor] = recomputed) -> None:
    """Makes the blocks of `model` recompute themselves in backward, in place.

    recomputed: another's implementation, for whole blocks.
    """
    blocks = list(model.blocks.values())
    if options.mode == "sqrt":
        # One checkpoint spans several blocks, so it is the model's walk over them that changes.
        model.walk = functools.partial(_walk_in_groups, math.ceil(math.sqrt(len(blocks))))
        return
    every = 1 if options.mode == "selective" else options.every
    for block in blocks[::every] if every else ():
        assert isinstance(block, Block)
        block.run = _selective(options.save) if options.mode == "selective" else recomputed


def _selective(save: tuple[Operation, ...]) -> Callable[..., Tensor]:
    kept = {operation for name in save for operation in OPERATIONS[name]}

    def policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(recomputed, context_fn=contexts)


def _walk_in_groups(size: int, blocks: Iterable[nn.Module], x: Tensor, rotary: Rotary) -> Tensor:
    every_block = list(blocks)
    for start in range(0, len(every_block), size):
        x = recomputed(walk, every_block[start : start + size], x, rotary)
    return x
