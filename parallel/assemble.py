"""The one place, and the one order, in which a model is split.

    pipeline -> tensor -> context -> recompute -> compile -> FSDP -> weights -> gradient buckets; loss, microbatches

Nothing here assumes a real device or a real process group.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel.actions import Action
from parallel.gradients import clip_gradients, gradient_norm
from parallel.mesh import size_of
from parallel.recipe import AttentionKernel, Recipe
from parallel.strategies.accumulation import Accumulation
from parallel.strategies.chunked_loss import chunked_linear_loss
from parallel.strategies.context import apply_context
from parallel.strategies.data import GradientBuckets
from parallel.strategies.pipeline import PipelineStep, split_pipeline, sum_tied_gradients, tied_copies
from parallel.strategies.recompute import apply_recompute, recomputed
from parallel.strategies.sharding import apply_sharding, before_microbatch
from parallel.strategies.tensor import apply_tensor, tensor_parallel_loss
from parallel.torch_private import no_cached_graphs, safe_guards
from parallel.transformer import Loss, Transformer, cast_once, cross_entropy, linear_cross_entropy, weight_name
from parallel.weights import load_initial_weights

ATTENTION_KERNELS: dict[AttentionKernel, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class Assembled:
    """What one rank trains: its part of the model, and how to get the gradients of one step into it."""

    recipe: Recipe
    stages: list[Transformer]  # one; with a pipeline, this rank's stages
    mesh: DeviceMesh
    microbatches: Callable[[Tensor, Tensor], Tensor]  # Accumulation or PipelineStep
    buckets: GradientBuckets | None
    averaged: int  # data ranks over which gradients are averaged; 1 where they are summed

    def forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """See Engine.gradients. Adds them to each .grad."""
        if self.recipe.parallel.cp > 1:
            tokens, targets = tokens[:, self._positions], targets[:, self._positions]
        with attention_kernel(self.recipe.train.attention), self._casts():
            loss = self.microbatches(tokens, targets)
        if self.buckets is not None:
            self.buckets.finish()
        if self.recipe.parallel.pp > 1:
            sum_tied_gradients(self.stages, mesh=self.mesh["pp"])
        if size_of(self.mesh, "data") > 1:
            dist.all_reduce(loss, group=self.mesh.get_group("data"))
        return loss / self.averaged

    @cached_property
    def _positions(self) -> Tensor:
        """Those of this rank's tokens; on the device, or each step would wait for a copy."""
        rotary = self.stages[0].rotary
        return rotary.positions.to(rotary.cos.device)

    def _casts(self) -> AbstractContextManager[None]:
        """Within, weights are cast once for all microbatches, not in each, which would keep its own for backward.

        FSDP casts what it gathers; and who recomputes keeps no copies, for memory is scarce.
        """
        recipe = self.recipe
        casts = recipe.train.dtype == "bfloat16" and recipe.parallel.dp_shard == 1
        several = recipe.n_microbatches > 1 and recipe.recompute.mode == "none"
        return cast_once(self.stages, torch.bfloat16) if casts and several else nullcontext()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        own_names = (named for stage in self.stages for named in stage.named_parameters())
        return [(weight_name(name, self.recipe.model), parameter) for name, parameter in own_names]

    def gradient(self, name: str) -> list[Tensor]:
        mine = (parameter.grad for theirs, parameter in self.named_parameters() if theirs == name)
        return [gradient for gradient in mine if gradient is not None]

    def zero_gradients(self) -> None:
        if self.buckets is not None:
            self.buckets.drop()
        for _, parameter in self.named_parameters():
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        copies = {id(parameter) for parameter in tied_copies(self.stages)}
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
    compute_dtype: torch.dtype = getattr(torch, train.dtype)
    sharded, data_ranks = parallel.dp_shard > 1, size_of(mesh, "data")

    model = _on_meta(recipe)
    stages = split_pipeline(model, recipe=recipe, pp_rank=mesh.get_local_rank("pp")) if parallel.pp > 1 else [model]

    for stage in stages:
        if parallel.tp > 1:
            apply_tensor(stage, mesh=mesh["tp"], sequence_parallel=recipe.tensor.sequence_parallel)
        if parallel.cp > 1:
            apply_context(stage, mesh=mesh["cp"], method=recipe.context.method)
        apply_recompute(stage, recipe.recompute)
        if train.compile != "none":
            safe_guards()
            for block in stage.blocks.values():
                block.compile(backend=train.compile)
        if sharded:
            apply_sharding(stage, recipe, mesh=mesh)
        load(stage, recipe, device)

    buckets = None
    if not sharded and data_ranks > 1:
        parameters = [parameter for stage in stages for parameter in stage.parameters()]
        buckets = GradientBuckets(parameters, recipe, group=mesh.get_group("data"))

    token_loss: Loss = cross_entropy
    if parallel.tp > 1:
        token_loss = partial(tensor_parallel_loss, recipe=recipe, mesh=mesh["tp"])
    # Each token's share of the mean loss; times the data ranks where FSDP then averages gradients over those.
    averaged = data_ranks if sharded else 1
    scale = averaged / (train.global_batch * train.seq_len)

    for stage in stages:
        _use_loss(stage, recipe, token_loss, scale)

    microbatches: Callable[[Tensor, Tensor], Tensor]
    if parallel.pp > 1:
        microbatches = PipelineStep(
            stages,
            recipe=recipe,
            mesh=mesh["pp"],
            device=device,
            compute_dtype=compute_dtype,
            residual_tokens=train.seq_len // parallel.cp // parallel.tp if recipe.tensor.sequence_parallel else None,
            around=around,
        )
    else:
        before = partial(before_microbatch, stages[0]) if sharded else None
        microbatches = Accumulation(model=stages[0], micro_batch=recipe.micro_batch, before=before)
    return Assembled(recipe, stages, mesh, microbatches, buckets, averaged)


def plain_model(
    recipe: Recipe,
    *,
    device: torch.device,
    scale: float,
    pp_rank: int | None = None,
    context: DeviceMesh | None = None,
    attend: Callable[..., Tensor] | None = None,
    recomputed: Callable[..., Tensor] = recomputed,
) -> Transformer:
    """The same model, with whole initial weights, for an engine that splits them itself.

    scale: of its loss, which is a sum over tokens. pp_rank: of the one stage that is wanted. context: the mesh of cp,
    if the model is to take its rank's part of the tokens, and to attend by `attend`. recomputed: see apply_recompute.
    """
    model = _on_meta(recipe)
    if pp_rank is not None:
        [model] = split_pipeline(model, recipe=recipe, pp_rank=pp_rank)
    if context is not None:
        apply_context(model, mesh=context, method=recipe.context.method, attend=attend)
    apply_recompute(model, recipe.recompute, recomputed=recomputed)
    load_initial_weights(model, recipe, device)
    _use_loss(model, recipe, cross_entropy, scale)
    return model


def _on_meta(recipe: Recipe) -> Transformer:
    compute_dtype: torch.dtype = getattr(torch, recipe.train.dtype)
    weight_dtype = torch.promote_types(compute_dtype, torch.float32)  # bfloat16 computes from float32 weights
    with torch.device("meta"):
        model = Transformer(recipe.model, seq_len=recipe.train.seq_len, compute_dtype=compute_dtype)
        return model.to(weight_dtype)


def _use_loss(model: Transformer, recipe: Recipe, token_loss: Loss, scale: float) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return token_loss(logits, targets) * scale

    model.loss = partial(linear_cross_entropy, loss=loss)
    if recipe.train.loss_chunks > 1:
        model.loss = partial(chunked_linear_loss, loss=loss, n_chunks=recipe.train.loss_chunks)


@contextmanager
def attention_kernel(name: AttentionKernel) -> Iterator[None]:
    """Within, scaled_dot_product_attention has this kernel of ATTENTION_KERNELS, or raises RuntimeError."""
    if name == "auto":
        yield
        return
    with sdpa_kernel(ATTENTION_KERNELS[name]), no_cached_graphs():
        yield
