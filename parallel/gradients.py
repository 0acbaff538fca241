"""The gradient's global norm, and clipping by it, in every layout."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.mesh import WEIGHT_DIMS, group_of, local_part, split_dim


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> Tensor:
    """‖g‖₂ over the whole model, on every rank: a float64 scalar.

    `parameters` are this rank's; a weight that two pipeline stages share must be in one stage's list only. mesh is
    that of `build_mesh`.
    """
    squares = []
    sharded = False
    for parameter in parameters:
        assert parameter.grad is not None
        square = torch.linalg.vector_norm(local_part(parameter.grad), dtype=torch.float64).square()
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names
            assert names is not None
            sharded = sharded or "dp_shard_cp" in names
            if "tp" in names and split_dim(parameter, names.index("tp")) is None:
                square = square / parameter.device_mesh.size(names.index("tp"))  # the sum over tp counts each copy
        squares.append(square)
    total = torch.stack(squares).sum()
    for dim in WEIGHT_DIMS:
        if mesh[dim].size() > 1 and (dim != "dp_shard_cp" or sharded):
            dist.all_reduce(total, group=group_of(mesh, dim))
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], *, norm: Tensor, largest: float) -> None:
    """Scales all gradients by largest / norm where the global `norm` is above `largest`."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, scale.to(gradients[0]))
