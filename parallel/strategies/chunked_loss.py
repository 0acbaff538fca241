"""The output projection and its loss, one chunk of the tokens after the other.

Logits (B, T, V), their copy in float32, and the gradients of both are the largest tensors of a model with a large
vocabulary: 12 GB for 8192 tokens of Llama 3. Here no more of them are alive than those of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.transformer import Loss


def chunked_linear_loss(x: Tensor, weight: Tensor, targets: Tensor, *, loss: Loss, n_chunks: int) -> Tensor:
    """`loss` of the logits x Wᵀ, and of these a chunk at a time.

    x (B, T, D), weight (V, D), targets (B, T) -> scalar. n_chunks: into how many the B·T tokens are cut, in sizes that
    differ by one at most.
    """
    return _ChunkedLinearLoss.apply(x, weight, targets, loss, n_chunks)


class _ChunkedLinearLoss(torch.autograd.Function):
    """Forward computes the gradients too, while a chunk's logits are at hand (Liger Kernel, arXiv:2410.10989, 3.2).

    So there are three products a chunk, as without chunks. To compute the logits again in backward would be a fourth,
    and a fifth where a pipeline cuts backward in two. The price is that between forward and backward the gradient of W
    is kept: in a pipeline, one for each microbatch in flight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, loss: Loss, n_chunks: int) -> Tensor:
        dx = x.new_empty(x.shape)
        sum_dtype = torch.promote_types(x.dtype, torch.float32)
        dw, total = torch.zeros_like(weight, dtype=sum_dtype), x.new_zeros((), dtype=sum_dtype)
        chunks = (tensor.flatten(0, 1).tensor_split(n_chunks) for tensor in (x, targets, dx))
        for x_td, targets_t, dx_td in zip(*chunks, strict=True):
            total += _chunk(x_td, weight, targets_t, dx_td, dw, loss)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None


def _chunk(x_td: Tensor, weight: Tensor, targets_t: Tensor, dx_td: Tensor, dw: Tensor, loss: Loss) -> Tensor:
    """The loss of a chunk of t tokens; puts the gradient of x into dx_td, and adds that of W to dw."""
    logits = F.linear(x_td, weight).unsqueeze(0).requires_grad_()  # (1, t, V)
    with torch.enable_grad():
        chunk_loss = loss(logits, targets_t.unsqueeze(0))
    (dlogits,) = torch.autograd.grad(chunk_loss, logits)
    torch.mm(dlogits[0], weight, out=dx_td)
    dw += dlogits[0].T @ x_td
    return chunk_loss.detach()
