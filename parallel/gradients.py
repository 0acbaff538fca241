"""The gradient's global norm, and clipping by it, in every layout."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.mesh import WEIGHT_DIMS, local_part, size_of, split_dim


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of the parameter's gradient."""
    assert parameter.grad is not None
    return local_part(parameter.grad)


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> Tensor:
    """‖g‖₂ over the whole model, on every rank: a float64 scalar.

    `parameters` are this rank's; a weight that two pipeline stages share must be in one stage's list only. mesh is
    that of `build_mesh`.
    """
    tp, squares = size_of(mesh, "tp"), []
    for parameter in parameters:
        # In the gradient's own type, which needs no copy of it; the few numbers that come of it are added in float64.
        square = torch.linalg.vector_norm(local_gradient(parameter)).double().square()
        if tp > 1 and isinstance(parameter, DTensor) and split_dim(parameter, -1) is None:
            square = square / tp  # the sum over tp, the last dimension, counts each copy
        squares.append(square)
    total = torch.stack(squares).sum()
    for dim in WEIGHT_DIMS:
        # Without FSDP each cp rank holds whole weights.
        if size_of(mesh, dim) > 1 and (dim != "dp_shard_cp" or size_of(mesh, "dp_shard") > 1):
            dist.all_reduce(total, group=mesh.get_group(dim))
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], *, norm: Tensor, largest: float) -> None:
    """Scales all gradients by largest / norm where the global `norm` is above `largest`."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, scale.to(gradients[0]))
