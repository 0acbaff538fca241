"""Data parallelism: every rank holds all weights, takes its own sequences, and adds its gradients to the others'.

Gradients live in a few flat buckets, in the order in which backward makes them, so that one all-reduce carries many,
and starts while backward still works on the rest (Li et al. 2020, arXiv:2006.15704). It is torch's
DistributedDataParallel in one screen, with three things that need our own: gradients of tensor-parallel DTensors,
backward passes that a pipeline schedule cuts in two, and a switch that puts all communication after backward.
"""

import weakref
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.mesh import as_dtensor, local_part
from parallel.recipe import Recipe


class GradientBuckets:
    """Sums the gradients of `parameters` over `group`, once a step, when all microbatches have added to them.

    The first gradient of a step is moved into its bucket, to which later ones are added; so a bucket takes memory from
    then on until `drop`, and none during the first forward, which is where activations take most.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], recipe: Recipe, *, group: dist.ProcessGroup) -> None:
        self.group, self.n_backwards, self.overlap = group, recipe.n_microbatches, recipe.ddp.overlap
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
            for i, member in enumerate(members):
                member.register_post_accumulate_grad_hook(partial(self._arrived, bucket, i))

    def _arrived(self, bucket: "_Bucket", i: int, parameter: Tensor) -> None:
        bucket.take(i, parameter)
        bucket.n_arrived += 1
        if self.overlap and bucket.n_arrived == self.n_backwards * len(bucket.parameters):
            self.send(bucket)

    def drop(self) -> None:
        """For the next step, in which every .grad must be None at first."""
        for bucket in self.buckets:
            bucket.drop()

    def send(self, bucket: "_Bucket") -> None:
        bucket.work = dist.all_reduce(bucket.gradients, group=self.group, async_op=True)

    def finish(self) -> None:
        """Waits until every gradient is the sum. Buckets that no hook has sent are sent here."""
        for bucket in self.buckets:
            if bucket.work is None:
                bucket.take_all()  # schedules that split backward add gradients up where no hook sees it
                self.send(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # Weakly: their hooks hold the bucket, and torch never frees a cycle through such a hook.
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.work: dist.Work | None = None
        assert len({parameter.dtype for parameter in parameters}) == 1
        self.drop()

    def drop(self) -> None:
        self.n_arrived = 0
        self.views: list[Tensor] = []  # into self.gradients: each parameter's .grad
        self.gradients = torch.empty(0)  # flat, once a gradient was taken

    def take(self, i: int, parameter: Tensor) -> None:
        """Moves the gradient of the i-th parameter into the bucket, if it is not there yet."""
        if not self.views:
            self._allocate()
        if parameter.grad is not self.views[i]:
            assert parameter.grad is not None
            local_part(self.views[i]).copy_(local_part(parameter.grad))
            parameter.grad = self.views[i]

    def take_all(self) -> None:
        for i, parameter in enumerate(self._members()):
            self.take(i, parameter)

    def _allocate(self) -> None:
        members = self._members()
        parts = [local_part(member.detach()) for member in members]
        sizes = [part.numel() for part in parts]
        self.gradients = parts[0].new_empty(sum(sizes))
        for member, part, flat in zip(members, parts, self.gradients.split(sizes), strict=True):
            view = flat.view(part.shape)
            if isinstance(member, DTensor):
                view = as_dtensor(view, member, member.device_mesh, member.placements)
            self.views.append(view)

    def _members(self) -> list[Tensor]:
        return [member for reference in self.parameters if (member := reference()) is not None]
