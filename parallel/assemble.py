"""The one place, and the one order, in which a model is split.

    pipeline -> tensor -> context -> recompute -> compile -> FSDP -> weights -> gradient buckets; loss, microbatches

Nothing here assumes a real device or a real process group.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel.actions import Action
from parallel.gradients import clip_gradients, gradient_norm
from parallel.mesh import group_of
from parallel.recipe import AttentionKernel, Dtype, Recipe
from parallel.strategies.accumulation import Accumulation
from parallel.strategies.context import apply_context, local_positions
from parallel.strategies.data import GradientBuckets
from parallel.strategies.pipeline import PipelineStep, split_pipeline, sum_tied_gradients, tied_copies
from parallel.strategies.recompute import apply_recompute
from parallel.strategies.sharding import apply_sharding, before_microbatch
from parallel.strategies.tensor import apply_tensor, residual_tokens, rows_of_rank, tensor_parallel_loss
from parallel.torch_private import no_cached_graphs, safe_guards
from parallel.transformer import Transformer, cross_entropy, weight_name
from parallel.weights import load_initial_weights

ATTENTION_KERNELS: dict[AttentionKernel, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass
class Assembled:
    """What one rank trains: its part of the model, and how to get the gradients of one step into it."""

    recipe: Recipe
    stages: list[Transformer]  # one; with a pipeline, this rank's stages
    mesh: DeviceMesh
    positions: Tensor | None  # of each sequence, those that this rank takes; None: all
    microbatches: Callable[[Tensor, Tensor], Tensor]  # Accumulation or PipelineStep
    buckets: GradientBuckets | None

    def forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Leaves the gradient of the mean loss of the global batch in each .grad; that loss, on every rank.

        tokens, targets: what this rank's replica trains on in one step, int64 (replica_batch, seq_len).
        """
        if self.positions is not None:
            tokens, targets = tokens[:, self.positions], targets[:, self.positions]
        with attention_kernel(self.recipe.train.attention):
            loss = self.microbatches(tokens, targets)
        if self.buckets is not None:
            self.buckets.finish()
        if self.recipe.parallel.pp > 1:
            sum_tied_gradients(self.stages, recipe=self.recipe, mesh=self.mesh["pp"])
        if self.mesh["data"].size() > 1:
            dist.all_reduce(loss, group=group_of(self.mesh, "data"))
        return loss / self.mesh["data"].size()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the whole model. Copies in two stages bear the same name."""
        return [
            (weight_name(name, self.recipe.model), parameter)
            for stage in self.stages
            for name, parameter in stage.named_parameters()
        ]

    def gradient(self, name: str) -> list[Tensor]:
        """This rank's gradients of the parameter of that name: none, one, or that of each of two copies."""
        mine = (parameter.grad for theirs, parameter in self.named_parameters() if theirs == name)
        return [gradient for gradient in mine if gradient is not None]

    def zero_gradients(self) -> None:
        if self.buckets is not None:
            self.buckets.zero()
        else:
            for _, parameter in self.named_parameters():
                parameter.grad = None

    def gradient_norm(self) -> Tensor:
        copies = {id(parameter) for parameter in tied_copies(self.stages, recipe=self.recipe)}
        counted = [parameter for _, parameter in self.named_parameters() if id(parameter) not in copies]
        return gradient_norm(counted, self.mesh)

    def clip_gradients(self, *, norm: Tensor, largest: float) -> None:
        clip_gradients((parameter for _, parameter in self.named_parameters()), norm=norm, largest=largest)


def assemble(
    recipe: Recipe,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    load: Callable[[Transformer, Recipe, torch.device], None] = load_initial_weights,
    around: Callable[[Action], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Assembled:
    """Splits the recipe's model over `mesh` (see build_mesh) and gives this rank its part, with initial weights.

    load: moves a stage from meta to the device. around: each action of a pipeline happens within what it returns.
    """
    parallel, train = recipe.parallel, recipe.train
    compute_dtype = DTYPES[train.dtype]
    weight_dtype = torch.promote_types(compute_dtype, torch.float32)  # bfloat16 computes from float32 weights
    sharded = parallel.dp_shard > 1

    with torch.device("meta"):
        model = Transformer(recipe.model, seq_len=train.seq_len, compute_dtype=compute_dtype).to(weight_dtype)
    stages = split_pipeline(model, recipe=recipe, pp_rank=mesh.get_local_rank("pp")) if parallel.pp > 1 else [model]

    for stage in stages:
        if parallel.tp > 1:
            apply_tensor(stage, mesh=mesh["tp"], sequence_parallel=recipe.tensor.sequence_parallel)
        if parallel.cp > 1:
            apply_context(stage, mesh=mesh["cp"], method=recipe.context.method)
        apply_recompute(stage, recipe.recompute)
        if train.compile != "none":
            _compile_blocks(stage, backend=train.compile)
        if sharded:
            hybrid = parallel.dp_replicate > 1
            apply_sharding(
                stage,
                mesh=mesh["dp_replicate", "dp_shard_cp"] if hybrid else mesh["dp_shard_cp"],
                compute_dtype=compute_dtype,
                reshard_after_forward=recipe.sharding.reshard_after_forward,
                prefetch=recipe.sharding.prefetch,
            )
        load(stage, recipe, device)

    buckets = None
    if not sharded and mesh["data"].size() > 1:
        buckets = GradientBuckets(
            [parameter for stage in stages for parameter in stage.parameters()],
            group=group_of(mesh, "data"),
            bucket_bytes=int(recipe.ddp.bucket_mib * 2**20),
            n_backwards=recipe.n_microbatches,
            overlap=recipe.ddp.overlap,
        )

    token_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    if parallel.tp > 1:
        token_loss = tensor_parallel_loss(
            mesh=mesh["tp"], vocab_size=recipe.model.vocab_size, loss_parallel=recipe.tensor.loss_parallel
        )
    # Each token's share of the mean loss; times the data ranks because gradients are then averaged over those.
    scale = mesh["data"].size() / (train.global_batch * train.seq_len)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return token_loss(logits, targets) * scale

    positions = None
    if parallel.cp > 1:
        positions = local_positions(
            seq_len=train.seq_len,
            cp=parallel.cp,
            cp_rank=mesh.get_local_rank("cp"),
            method=recipe.context.method,
        ).to(device)
    microbatches: Callable[[Tensor, Tensor], Tensor]
    if parallel.pp > 1:
        n_tokens = train.seq_len if positions is None else len(positions)
        split_sequence = parallel.tp > 1 and recipe.tensor.sequence_parallel
        microbatches = PipelineStep(
            stages,
            recipe=recipe,
            mesh=mesh["pp"],
            device=device,
            compute_dtype=compute_dtype,
            loss=loss,
            tokens=n_tokens,
            residual_tokens=residual_tokens(n_tokens, tp=parallel.tp, sequence_parallel=split_sequence),
            vocab_size=len(rows_of_rank(recipe.model.vocab_size, mesh["tp"])),
            around=around,
        )
    else:
        before = partial(before_microbatch, stages[0]) if sharded else None
        microbatches = Accumulation(stages[0], micro_batch=recipe.micro_batch, loss=loss, before=before)
    return Assembled(recipe, stages, mesh, positions, microbatches, buckets)


def _compile_blocks(stage: Transformer, *, backend: str) -> None:
    safe_guards()
    for block in stage.blocks.values():
        block.compile(backend=backend)


@contextmanager
def attention_kernel(name: AttentionKernel) -> Iterator[None]:
    """Within, scaled_dot_product_attention has this kernel of ATTENTION_KERNELS, or raises RuntimeError."""
    if name == "auto":
        yield
        return
    with sdpa_kernel(ATTENTION_KERNELS[name]), no_cached_graphs():
        yield
