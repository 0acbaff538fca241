"""What is one kernel on CUDA where a CPU takes it apart, for dry runs: by what it reads, makes and keeps for backward.

An RMSNorm in bfloat16 keeps its input and a float32 number a token on CUDA (torch.ops.aten._fused_rms_norm); on a CPU
two copies of its input in float32. Attention in float32 keeps keys and values once for each query head. Products, the
loss and AdamW keep the same on both.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.torch_private import replaced_functions
from parallel.transformer import repeated_for_cuda

NAMESPACE = "parallel_lab"


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Within, what is done with fake tensors on a CPU is what CUDA would do."""

    def rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        return _rms_norm(x, weight)[0]

    def attention(of_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, **options: of_cpu(q, *repeated_for_cuda(q, k, v), **options)

    with replaced_functions(rms_norm=rms_norm, attention=attention):
        yield


def _kernel(makes: Callable[..., Any]) -> Any:
    """An operator of fake tensors alone, by a function that gives what it makes."""
    operator = torch.library.custom_op(f"{NAMESPACE}::{makes.__name__.strip('_')}", makes, mutates_args=())
    operator.register_fake(makes)
    return operator


@_kernel
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_kernel
def _rms_norm_backward_input(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x)


@_kernel
def _rms_norm_backward_weight(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    kept = ctx.saved_tensors  # to be asked for once: what is computed again is then gone
    return _rms_norm_backward_input(grad, *kept), _rms_norm_backward_weight(grad, *kept)


_rms_norm.register_autograd(_backward, setup_context=_keep)
