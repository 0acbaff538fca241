"""DeepSpeed as the engine: ZeRO shares optimizer state, gradients and weights among ranks (arXiv:1910.02054).

    dp_replicate -> stage 0, which shares nothing        dp_shard -> the stage that engine.zero_stage says
    both -> stage 3 with hpZ: parts of the weights of all ranks, and beside them a copy in parts of dp_shard ranks
            (ZeRO++, arXiv:2306.10209)
    cp -> Ulysses (arXiv:2309.14509)        tp -> AutoTP        pp -> see deepspeed_pipeline.py

Its scale of gradients: `backward` divides a loss by the number of microbatches, and gradients are averaged over the
ranks that take different sequences; those of one sequence are added, but averaged in stage 3. The loss here is a sum
over tokens, so that all this is undone in its scale; then a short last microbatch counts as it is. Gradients of ranks
are added in float32 at most, whatever they were computed in: there is no float64 here.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import record_function

from parallel.assemble import plain_model
from parallel.engines.engine import adamw, averaged_times, over_microbatches, scale_of_averages
from parallel.measure.observer import Observer
from parallel.mesh import as_dtensor, local_part, size_of
from parallel.recipe import Recipe, RecipeError
from parallel.strategies.recompute import recomputed
from parallel.transformer import causal_attention

BUCKET_ELEMENTS = 25 * 2**20 // 4  # DDP's 25 MiB; 500 million by default, and of these a buffer is kept


class DeepSpeedEngine:
    """See Engine. Raises RecipeError where DeepSpeed has not prepared the stage that the recipe says."""

    name = f"deepspeed {deepspeed.__version__}"
    settled_step = 3  # in the first ZeRO-3 learns the order in which weights are needed
    waits_in_python = True

    def __init__(self, recipe: Recipe, *, mesh: DeviceMesh, device: torch.device) -> None:
        self.recipe, self.mesh = recipe, mesh
        self.observers: list[Observer] = []
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # A collective of inference alone, which it would compile for a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # its device, which it looks up again and again
        self._stage = stage_of(recipe)
        self._averaged = averaged_times(recipe) * (recipe.parallel.cp if self._stage == 3 else 1)
        self._recomputed: Callable[..., Tensor] = recomputed
        if recipe.engine.checkpointing == "deepspeed":
            self._recomputed = deepspeed.checkpointing.checkpoint
        model, mpu = self._model(device)
        self._named = self._names(model)
        self._shapes = {name: parameter.shape for name, parameter in self._named}
        self.optimizer = adamw(recipe, model.parameters())
        self._engine: Any = self._initialized(model, mpu)
        self._zero: Any = self._engine.optimizer  # of a class for each stage; without one it is the AdamW
        self._refuse_other_split()

    def _refuse_other_split(self) -> None:
        recipe, zero, of_parameters = self.recipe, self._zero, [parameter for _, parameter in self._named]
        hybrid = recipe.parallel.dp_shard if recipe.parallel.dp_replicate > 1 and self._stage == 3 else 1
        matrices = 7 * recipe.model.n_layers if recipe.parallel.tp > 1 else 0
        wanted = {
            "zero_stage": self._stage,
            "weights shared": self._stage == 3,
            "optimizer of its own": self._stage > 0,
            "ranks of hpZ": hybrid,
            "optimizer offloaded": recipe.engine.offload != "none",
            "weights offloaded": recipe.engine.offload == "parameters",
            "matrices split by AutoTP": matrices,
        }
        shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in self._named}
        found = {
            "zero_stage": self._engine.zero_optimization_stage(),
            "weights shared": all(hasattr(parameter, "ds_id") for parameter in of_parameters),
            "optimizer of its own": zero is not self.optimizer,
            "ranks of hpZ": getattr(of_parameters[0], "ds_secondary_tensor_group_size", 1) if hybrid > 1 else 1,
            "optimizer offloaded": bool(getattr(zero, "offload_optimizer", getattr(zero, "cpu_offload", False))),
            "weights offloaded": bool(getattr(zero, "offload_param", False)),
            "matrices split by AutoTP": sum(shape != self._shapes[name] for name, shape in shapes.items()),
        }
        for what, value in wanted.items():
            if found[what] != value:
                remedy = f"has prepared {what}: {found[what]}, where the recipe says {value}; use engine.name = native"
                raise RecipeError("engine.name", recipe.engine.name, remedy)

    def _initialized(self, model: nn.Module, mpu: Any) -> Any:
        return deepspeed.initialize(model=model, optimizer=self.optimizer, config=config_of(self.recipe), mpu=mpu)[0]

    def _model(self, device: torch.device) -> tuple[nn.Module, Any]:
        """What DeepSpeed is given to split, and the groups that it does not make itself."""
        recipe = self.recipe
        ulysses = _Ulysses(self.mesh) if recipe.parallel.cp > 1 else None
        self._whole = plain_model(
            recipe,
            device=device,
            scale=scale_of_averages(recipe, self._averaged),
            context=self.mesh["cp"] if ulysses else None,
            attend=ulysses.attend if ulysses else None,
            recomputed=self._recomputed,
        )
        return self._whole, ulysses

    def _names(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return list(model.named_parameters())

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.recipe.parallel.cp > 1:
            positions = self._whole.rotary.positions
            tokens, targets = tokens[:, positions], targets[:, positions]
        averaged, one = self._averaged, self._microbatch
        return over_microbatches(self.recipe, self.mesh, tokens, targets, averaged=averaged, one=one)

    def _microbatch(self, i: int, tokens: Tensor, targets: Tensor) -> Tensor:
        if i > 0:
            self._engine.step()  # counts: it updates after the last one alone
        with record_function("forward"):
            loss: Tensor = self._engine(tokens, targets)
        with record_function("backward"):
            self._engine.backward(loss)
        return loss

    def update(self) -> Tensor:
        norm = self._gradient_norm() if self._stage == 0 else None  # which it does not tell
        with record_function("optimizer"):
            self._step()
        return torch.as_tensor(self._engine.get_global_grad_norm()) if norm is None else norm

    def _step(self) -> None:
        self._engine.step()

    def _gradient_norm(self) -> Tensor:
        square = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for name, _ in self._named:
            for gradient in self.gradient(name):
                of_part = torch.linalg.vector_norm(local_part(gradient)).double().square()
                square += of_part if isinstance(gradient, DTensor) else of_part / size_of(self.mesh, "tp")
        dist.all_reduce(square, group=self.mesh.get_group("tp"))
        return square.sqrt()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named

    def gradient(self, name: str) -> list[Tensor]:
        """Collective."""
        gradient = safe_get_full_grad(dict(self._named)[name]) if name in self._shapes else None
        if gradient is None:
            return []
        shape = self._shapes[name]
        for dim in range(len(shape)):
            if gradient.shape[dim] < shape[dim]:  # the part of AutoTP
                whole = torch.empty(shape, device="meta")
                return [as_dtensor(gradient, whole, self.mesh["tp"], [Shard(dim)])]
        return [gradient]

    def holds(self) -> dict[str, list[Tensor]]:
        if self._stage == 0:
            return {}
        # Another copy of this rank's part of the weights, in float32, which the optimizer updates.
        masters = [master for group in self.optimizer.param_groups for master in group["params"]]
        if self._stage == 3:
            masters = self._zero.fp32_partitioned_groups_flat
            gradients = [self._zero.grad_partitions_flat_buffer]
            of_each = [(p.ds_tensor, p.ds_secondary_tensor) for _, p in self._named]  # type: ignore[attr-defined]
            parts = [part for pair in of_each for part in pair if part is not None]  # the second with hpZ, in forward
        else:
            gradients = [g for group in self._zero.averaged_gradients.values() for g in group or []]
            parts = []
        gradients += [master.grad for master in masters if master.grad is not None]
        return {"parameters": parts, "gradients": gradients, "optimizer": masters}


class _Ulysses:
    """The mesh's groups, as DeepSpeed asks for them, and its attention over those of cp."""

    initialize_sequence_parallel = None  # by its being there DeepSpeed tells groups of sequences from those of tensors

    def __init__(self, mesh: DeviceMesh) -> None:
        self._sequence, self._all, self._tensor = (mesh.get_group(dim) for dim in ("cp", "data", "tp"))
        self._distributed = DistributedAttention(_attend_whole, self._sequence, scatter_idx=2, gather_idx=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """causal_attention over the sequence of all ranks. q (B, H, T/cp, E), k and v (B, K, T/cp, E)"""
        y: Tensor = self._distributed(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0)
        return y.transpose(1, 2)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        return self._sequence.size()

    def get_sequence_parallel_rank(self) -> int:
        return self._sequence.rank()

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self._all

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._all.size()

    def get_sequence_data_parallel_rank(self) -> int:
        return self._all.rank()


def _attend_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """causal_attention, for q (B, T, H/cp, E), k and v (B, T, K/cp, E)."""
    return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def stage_of(recipe: Recipe) -> int:
    return recipe.engine.zero_stage if recipe.parallel.dp_shard > 1 or recipe.parallel.pp > 1 else 0


def config_of(recipe: Recipe) -> dict[str, Any]:
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
        if recipe.parallel.dp_replicate > 1:
            zero["zero_hpz_partition_size"] = recipe.parallel.dp_shard
    if recipe.engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if recipe.engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    # Every matrix of a block; embedding and output stay whole.
    by_rows = [r".*attention\.[qkv]\.weight$", r".*mlp\.(gate|up)\.weight$"]
    by_columns = [r".*attention\.out\.weight$", r".*mlp\.down\.weight$"]
    specs = [
        {"patterns": by_rows, "partition_type": "column"},  # of the transposed weight
        {"patterns": by_columns, "partition_type": "row"},
    ]
    partition = {"use_default_specs": False, "layer_specs": specs}
    tensor = {"autotp_size": recipe.parallel.tp, "partition_config": partition} if recipe.parallel.tp > 1 else {}
    return {
        "tensor_parallel": tensor,
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.n_microbatches,
        "gradient_clipping": recipe.train.grad_clip,
        "bf16": {"enabled": recipe.train.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as it is
        "zero_force_ds_cpu_optimizer": False,  # for what is offloaded, too, where its own would be compiled
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
