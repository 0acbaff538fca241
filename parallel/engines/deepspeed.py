"""DeepSpeed as the engine: ZeRO shares optimizer state, gradients and weights among ranks (arXiv:1910.02054).

    dp_replicate -> stage 0, which shares nothing        dp_shard -> the stage that engine.zero_stage says

Its scale of gradients: `backward` divides a loss by the number of microbatches, and gradients are averaged over ranks.
The loss here is a sum over tokens, so that both are undone in its scale; then a short last microbatch counts as it is.
Gradients of ranks are added in float32 at most, whatever they were computed in: there is no float64 here.
"""

import logging
import os
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from parallel.engines.engine import adamw, model_of_averages, over_microbatches
from parallel.measure.observer import Observer
from parallel.recipe import Recipe, RecipeError

BUCKET_ELEMENTS = 25 * 2**20 // 4  # DDP's 25 MiB; 500 million by default, and of these a buffer is kept


class DeepSpeedEngine:
    """See Engine. Raises RecipeError where DeepSpeed has not prepared the stage that the recipe says."""

    name = f"deepspeed {deepspeed.__version__}"
    settled_step = 3  # in the first ZeRO-3 learns the order in which weights are needed
    waits_in_python = True

    def __init__(self, recipe: Recipe, *, mesh: DeviceMesh, device: torch.device) -> None:
        self.recipe, self.mesh = recipe, mesh
        self.observers: list[Observer] = []
        self._whole = model_of_averages(recipe, device)
        self._named = list(self._whole.named_parameters())
        self.optimizer = adamw(recipe, self._whole.parameters())
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # A collective of inference alone, which it would compile for a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._stage = stage_of(recipe)
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # its device, which it looks up again and again
        self._engine, *_ = deepspeed.initialize(model=self._whole, optimizer=self.optimizer, config=_config(recipe))
        self._zero: Any = self._engine.optimizer  # of a class for each stage; without one it is the AdamW
        found = self._engine.zero_optimization_stage(), all(hasattr(p, "ds_id") for _, p in self._named)
        if found != (self._stage, self._stage == 3) or (self._stage > 0) != (self._zero is not self.optimizer):
            remedy = f"has prepared stage {found[0]} for engine.zero_stage {self._stage}; use engine.name = native"
            raise RecipeError("engine.name", "deepspeed", remedy)

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return over_microbatches(self.recipe, tokens, targets, one=self._microbatch)

    def _microbatch(self, i: int, tokens: Tensor, targets: Tensor) -> Tensor:
        if i > 0:
            self._engine.step()  # counts: it updates after the last one alone
        with record_function("forward"):
            loss: Tensor = self._engine(tokens, targets)
        with record_function("backward"):
            self._engine.backward(loss)
        return loss

    def update(self) -> Tensor:
        norm = None
        if self._stage == 0:  # it does not tell
            norm = torch.nn.utils.get_total_norm([p.grad for _, p in self._named if p.grad is not None])
        with record_function("optimizer"):
            self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm()) if norm is None else norm

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named

    def gradient(self, name: str) -> list[Tensor]:
        """Collective."""
        gradient = safe_get_full_grad(dict(self._named)[name])
        return [] if gradient is None else [gradient]

    def holds(self) -> dict[str, list[Tensor]]:
        if self._stage == 0:
            return {}
        # Another copy of this rank's part of the weights, in float32, which the optimizer updates.
        masters = [master for group in self.optimizer.param_groups for master in group["params"]]
        if self._stage == 3:
            masters = self._zero.fp32_partitioned_groups_flat
            gradients = [self._zero.grad_partitions_flat_buffer]
            parts = [parameter.ds_tensor for _, parameter in self._named]  # type: ignore[attr-defined]
        else:
            gradients = [g for group in self._zero.averaged_gradients.values() for g in group or []]
            parts = []
        gradients += [master.grad for master in masters if master.grad is not None]
        return {"parameters": parts, "gradients": gradients, "optimizer": masters}


def stage_of(recipe: Recipe) -> int:
    return recipe.engine.zero_stage if recipe.parallel.dp_shard > 1 else 0


def _config(recipe: Recipe) -> dict[str, Any]:
    bucket = min(BUCKET_ELEMENTS, recipe.model.n_parameters)
    zero: dict[str, Any] = dict(stage=stage_of(recipe), reduce_bucket_size=bucket, allgather_bucket_size=bucket)
    if stage_of(recipe) == 3:
        # Small weights are shared, too, and all are dropped after their use; a block is fetched ahead. By default a
        # model of less than a billion weights is fetched as a whole, and stays until backward.
        model = recipe.model
        unit = max(model.block_matrices, model.vocab_size * model.d_model)
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * unit,
            "stage3_prefetch_bucket_size": unit,
        }
    return {
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.n_microbatches,
        "gradient_clipping": recipe.train.grad_clip,
        "bf16": {"enabled": recipe.train.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as it is
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
