"""Data parallelism: every rank holds all weights, takes its own sequences, and adds its gradients to the others'.

Gradients live in a few flat buckets, in the order in which backward makes them, so that one all-reduce carries many,
and starts while backward still works on the rest (Li et al. 2020, arXiv:2006.15704). It is torch's
DistributedDataParallel in one screen, with three things that need our own: gradients of tensor-parallel DTensors,
backward passes that a pipeline schedule cuts in two, and a switch that puts all communication after backward.
"""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.mesh import as_dtensor, local_part
from parallel.recipe import Recipe


class GradientBuckets:
    """Sums the gradients of `parameters` over `group`, once a step, when all microbatches have added to them.

    After construction p.grad of each parameter is a view into a bucket, and must stay it: zero it with `zero`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], recipe: Recipe, *, group: dist.ProcessGroup) -> None:
        self.group, self.n_backwards = group, recipe.n_microbatches
        self.buckets: list[_Bucket] = []
        left = list(parameters)
        while left:
            members: list[nn.Parameter] = []
            size = 0
            while left and size < int(recipe.ddp.bucket_mib * 2**20):
                members.append(left.pop())  # from the last: in the order of backward
                size += local_part(members[-1].detach()).nbytes
            bucket = _Bucket(members)
            self.buckets.append(bucket)
            for member in members if recipe.ddp.overlap else ():
                member.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

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
        """Waits until every gradient is the sum. Buckets that no hook has sent are sent here."""
        for bucket in self.buckets:
            if bucket.work is None:
                self.send(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # Not the parameters: their hooks hold the bucket, and torch never frees a cycle through such a hook.
        self.n_parameters = len(parameters)
        self.n_arrived = 0
        self.work: dist.Work | None = None
        parts = [local_part(parameter.detach()) for parameter in parameters]
        assert len({part.dtype for part in parts}) == 1
        sizes = [part.numel() for part in parts]
        self.gradients = parts[0].new_zeros(sum(sizes))
        for parameter, part, flat in zip(parameters, parts, self.gradients.split(sizes), strict=True):
            view = flat.view(part.shape)
            if isinstance(parameter, DTensor):
                view = as_dtensor(view, parameter, parameter.device_mesh, parameter.placements)
            parameter.grad = view
