"""Activation checkpointing: keep fewer activations, and compute them again in backward (Chen et al. 2016,
arXiv:1604.06174). Gradients stay bit-equal.

    full        each block keeps its input only
    every(n)    so does each n-th block
    sqrt        √N groups of √N blocks keep one input each
    selective   each block keeps the results of the operations named, and recomputes the cheap rest (arXiv:2205.05198)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.recipe import Recompute
from parallel.transformer import Transformer

aten = torch.ops.aten
OPERATIONS: dict[str, tuple[Any, ...]] = {
    "matmul": (aten.mm.default, aten.addmm.default, aten.bmm.default),
    "attention": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ),
}


def apply_recompute(model: Transformer, options: Recompute) -> None:
    """Makes the blocks of `model` recompute themselves in backward, in place."""
    blocks = list(model.blocks.values())
    if options.mode == "sqrt":
        # One checkpoint spans several blocks, so it is the model's walk over them that changes.
        model.run_blocks = functools.partial(_run_groups, model, math.ceil(math.sqrt(len(blocks))))  # type: ignore[method-assign]
        return
    every = 1 if options.mode == "selective" else options.every
    for i, block in enumerate(blocks):
        if every and i % every == 0:
            again = _selective(options.save) if options.mode == "selective" else _recomputed
            block.forward = functools.partial(again, block.forward)


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    # Nothing in a block draws random numbers, so their state need not be saved.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _selective(save: tuple[str, ...]) -> Callable[..., Tensor]:
    kept = {operation for name in save for operation in OPERATIONS[name]}

    def policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return recomputed


def _run_groups(model: Transformer, size: int, x: Tensor) -> Tensor:
    def run(group: list[nn.Module], x: Tensor) -> Tensor:
        for block in group:
            x = block(x, model.rotary)
        return x

    blocks = list(model.blocks.values())
    for start in range(0, len(blocks), size):
        x = _recomputed(run, blocks[start : start + size], x)
    return x
