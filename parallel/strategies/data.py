"""Data parallelism: every rank holds all weights, takes its own sequences, and averages gradients with the others.

Gradients live in a few flat buckets, in the order in which backward makes them, so that one all-reduce carries many,
and starts while backward still works on the rest (Li et al. 2020, arXiv:2006.15704). It is torch's
DistributedDataParallel in one screen, with three things that need our own: gradients of tensor-parallel DTensors,
backward passes that a pipeline schedule cuts in two, and a switch that puts all communication after backward.
"""

from collections.abc import Iterable
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.mesh import local_part


class GradientBuckets:
    """Averages the gradients of `parameters` over `group`, once a step.

    n_backwards: backward passes that add to each gradient before it is sent: the number of microbatches.
    overlap: send a bucket as soon as its last gradient is there; else all of them in `finish`.
    After construction p.grad of each parameter is a view into a bucket, and must stay it: zero it with `zero`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        group: dist.ProcessGroup,
        bucket_bytes: int,
        n_backwards: int,
        overlap: bool,
    ) -> None:
        self.group, self.n_backwards = group, n_backwards
        self.buckets: list[_Bucket] = []
        backward_order = list(parameters)[::-1]  # tied weights are listed once
        start = size = 0
        for i, parameter in enumerate(backward_order):
            size += local_part(parameter.detach()).nbytes
            if size >= bucket_bytes or i == len(backward_order) - 1:
                bucket = _Bucket(members := backward_order[start : i + 1])
                self.buckets.append(bucket)
                for member in members if overlap else ():
                    member.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
                start, size = i + 1, 0

    def _arrived(self, bucket: "_Bucket", _parameter: Tensor) -> None:
        bucket.n_arrived += 1
        if bucket.n_arrived == self.n_backwards * bucket.n_parameters:
            self.send(bucket)

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.n_arrived = 0

    def send(self, bucket: "_Bucket") -> None:
        bucket.work = dist.all_reduce(bucket.gradients, group=self.group, async_op=True)

    def finish(self) -> None:
        """Waits until every gradient is the average. Buckets that no hook has sent (see `overlap`) are sent here."""
        for bucket in self.buckets:
            if bucket.work is None:
                self.send(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None
            bucket.gradients.div_(self.group.size())


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # Not the parameters: their hooks hold the bucket, and torch never frees a cycle through such a hook.
        self.n_parameters = len(parameters)
        self.n_arrived = 0
        self.work: dist.Work | None = None
        parts = [local_part(parameter.detach()) for parameter in parameters]
        assert len({part.dtype for part in parts}) == 1
        self.gradients = parts[0].new_zeros(sum(part.numel() for part in parts))
        for parameter, view in zip(parameters, self.gradients.split([part.numel() for part in parts]), strict=True):
            parameter.grad = _like(parameter, view)


def _like(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """`flat` in the shape of the parameter's local part, as a DTensor where the parameter is one."""
    local = flat.view(local_part(parameter.detach()).shape)
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
