"""Hugging Face Accelerate as the engine: it wraps the whole model in torch's DDP, or splits it by FSDP2.

    dp_replicate -> DistributedDataParallel        dp_shard -> fully_shard        both -> fully_shard on a mesh of both

Its scale of gradients: `backward` divides a loss by the number of microbatches, and DDP and FSDP2 average over ranks.
The loss here is a sum over tokens, so that both are undone in its scale; then a short last microbatch counts as it is.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from parallel.assemble import plain_model
from parallel.engines.engine import adamw, averaged_times, environment, over_microbatches, scale_of_averages
from parallel.measure.observer import Observer
from parallel.recipe import Recipe, RecipeError


class AccelerateEngine:
    """See Engine. Raises RecipeError where Accelerate has not prepared what the recipe says."""

    name = f"accelerate {accelerate.__version__}"
    settled_step = 3  # in the second DDP arranges its buckets anew, in the order in which gradients came

    def __init__(self, recipe: Recipe, *, mesh: DeviceMesh, device: torch.device) -> None:
        self.recipe, self.mesh = recipe, mesh
        self.observers: list[Observer] = []
        self._averaged = averaged_times(recipe)
        self._whole = plain_model(recipe, device=device, scale=scale_of_averages(recipe, self._averaged))
        self._accelerator = _accelerator(recipe, device)
        prepared: Any = self._accelerator.prepare(self._whole, adamw(recipe, self._whole.parameters()))
        self._model, self._optimizer = prepared
        self.optimizer: torch.optim.Optimizer = self._optimizer.optimizer
        self.waits_in_python = recipe.parallel.dp_shard > 1  # DDP's are in C++
        _refuse_other_split(recipe, self._model)

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        averaged, one = self._averaged, self._microbatch
        return over_microbatches(self.recipe, self.mesh, tokens, targets, averaged=averaged, one=one)

    def _microbatch(self, i: int, tokens: Tensor, targets: Tensor) -> Tensor:
        return accumulated(self._accelerator, self._model, tokens, targets)

    def update(self) -> Tensor:
        largest = self.recipe.train.grad_clip or math.inf
        norm: Tensor = self._accelerator.clip_grad_norm_(self._model.parameters(), largest)
        with record_function("optimizer"):
            self._optimizer.step()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._whole.named_parameters())

    def gradient(self, name: str) -> list[Tensor]:
        gradient = self._whole.get_parameter(name).grad
        return [] if gradient is None else [gradient]

    def holds(self) -> dict[str, list[Tensor]]:
        return {}


def accumulated(accelerator: Accelerator, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Forward and backward of a microbatch, and its loss."""
    with accelerator.accumulate(model):
        with record_function("forward"):
            loss: Tensor = model(tokens, targets)
        with record_function("backward"):
            accelerator.backward(loss)
    return loss


@contextlib.contextmanager
def anew(recipe: Recipe, **variables: object) -> Iterator[None]:
    """Within, an Accelerator is made as if none had been, of this rank and the environment `variables`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else what the proof has set holds for training
    GradientState._reset_state()
    with environment(RANK=dist.get_rank(), WORLD_SIZE=recipe.world_size, **variables):
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it changes that
        yield


def _accelerator(recipe: Recipe, device: torch.device) -> Accelerator:
    replicas, shards = recipe.parallel.dp_replicate, recipe.parallel.dp_shard
    on_cpu = device.type == "cpu"
    with anew(recipe, ACCELERATE_TORCH_DEVICE=device):
        if shards == 1:
            # With views gradients are not kept twice, in buckets and beside them.
            ddp = DistributedDataParallelKwargs(bucket_cap_mb=recipe.ddp.bucket_mib, gradient_as_bucket_view=True)
            return Accelerator(cpu=on_cpu, gradient_accumulation_steps=recipe.n_microbatches, kwargs_handlers=[ddp])
        if on_cpu:  # where Accelerate would take DDP in place of FSDP2 without a word
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        precision = None
        if recipe.train.dtype == "bfloat16":
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=recipe.sharding.reshard_after_forward,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            mixed_precision_policy=precision,
            cpu_ram_efficient_loading=False,
        )
        config = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        return Accelerator(
            gradient_accumulation_steps=recipe.n_microbatches, fsdp_plugin=plugin, parallelism_config=config
        )


def _refuse_other_split(recipe: Recipe, model: nn.Module) -> None:
    replicas, shards = recipe.parallel.dp_replicate, recipe.parallel.dp_shard
    if shards == 1:
        found = type(model).__name__
        right = isinstance(model, DistributedDataParallel) or recipe.world_size == 1
    else:
        wanted = (replicas, shards) if replicas > 1 else (shards,)
        shapes = {p.device_mesh.shape if isinstance(p, DTensor) else None for p in model.parameters()}
        found = f"parameters on meshes {shapes}"
        right = shapes == {wanted}
    if not right:
        remedy = f"has prepared {found} for dp_replicate {replicas} · dp_shard {shards}; use engine.name = native"
        raise RecipeError("engine.name", "accelerate", remedy)
