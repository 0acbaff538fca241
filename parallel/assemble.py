"""The one place, and the one order, in which a model is split.

    pipeline -> tensor -> context -> recompute -> compile -> FSDP -> weights -> gradient buckets

Nothing here assumes a real device or a real process group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from parallel.gradients import clip_gradients, gradient_norm
from parallel.mesh import group_of, local_part, slice_like
from parallel.recipe import Recipe
from parallel.strategies.context import apply_context, local_positions
from parallel.strategies.data import GradientBuckets
from parallel.strategies.pipeline import PipelineStep, split_pipeline, sum_tied_gradients, tied_copies, weight_name
from parallel.strategies.recompute import apply_recompute
from parallel.strategies.sharding import apply_sharding, before_microbatch
from parallel.strategies.tensor import apply_tensor, rows_of_rank, tensor_parallel_loss
from parallel.transformer import Transformer, cross_entropy, initial_weight

ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Assembled:
    """What one rank trains: its part of the model, and how to get the gradients of one step into it."""

    recipe: Recipe
    stages: list[Transformer]  # one; with a pipeline, this rank's stages
    mesh: DeviceMesh
    forward_backward: Callable[[Tensor, Tensor], Tensor]
    buckets: GradientBuckets | None
    pipeline: PipelineStep | None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the whole model. Copies in two stages bear the same name."""
        return [
            (weight_name(name, recipe=self.recipe), parameter)
            for stage in self.stages
            for name, parameter in stage.named_parameters()
        ]

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
    load: Callable[[Transformer, Recipe, torch.device], None] | None = None,
) -> Assembled:
    """Splits the recipe's model over `mesh` (see build_mesh) and gives this rank its part, with initial weights.

    `forward_backward(tokens, targets)` takes what this rank's replica trains on in one step, int64 (replica_batch,
    seq_len) on `device`; it leaves the gradient of the mean loss of the global batch in each parameter's .grad, and
    returns that loss, on every rank.

    load: moves a stage from meta to the device, in place of load_initial_weights.
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
        (load or load_initial_weights)(stage, recipe, device)

    buckets = None
    if not sharded and mesh["data"].size() > 1:
        buckets = GradientBuckets(
            [parameter for stage in stages for parameter in stage.parameters()],
            group=group_of(mesh, "data"),
            bucket_bytes=int(recipe.ddp.bucket_mib * 2**20),
            n_backwards=recipe.n_microbatches,
            overlap=recipe.ddp.overlap,
        )
    forward_backward, pipeline = _forward_backward(recipe, stages, mesh, device, buckets)
    return Assembled(recipe, stages, mesh, forward_backward, buckets, pipeline)


def _compile_blocks(stage: Transformer, *, backend: str) -> None:
    import torch._dynamo.config as dynamo_config  # a second, and of use here alone

    # A short cut of torch 2.11's guards that reads freed memory; later ones have it off. pytorch/pytorch#181873
    dynamo_config.use_recursive_dict_tags_for_guards = False
    for block in stage.blocks.values():
        block.compile(backend=backend)


@torch.no_grad()
def load_initial_weights(model: Transformer, recipe: Recipe, device: torch.device) -> None:
    """Moves `model` from meta to `device` and fills this rank's part of each weight."""
    load_no_weights(model, recipe, device)
    model.rotary.reset_buffers()
    for name, parameter in model.named_parameters():
        whole = initial_weight(
            weight_name(name, recipe=recipe),
            parameter.shape,
            seed=recipe.train.seed,
            n_layers=recipe.model.n_layers,
            device=device,
        )
        local_part(parameter).copy_(slice_like(whole, parameter))


def load_no_weights(model: Transformer, recipe: Recipe, device: torch.device) -> None:
    """Moves `model` from meta to `device`, and leaves its weights and tables as the memory happens to be."""
    model.to_empty(device=device)
    if recipe.model.tied_embeddings and model.embedding is not None and model.output is not None:
        model.output.weight = model.embedding.weight  # to_empty made them two


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Within, scaled_dot_product_attention has this kernel of ATTENTION_KERNELS, or raises RuntimeError."""
    # What torch.compile keeps on disk from other runs is found by the graph, whatever kernel that was compiled with.
    with sdpa_kernel(ATTENTION_KERNELS[name]), functorch_config.patch(enable_autograd_cache=False):
        yield


def _forward_backward(
    recipe: Recipe, stages: list[Transformer], mesh: DeviceMesh, device: torch.device, buckets: GradientBuckets | None
) -> tuple[Callable[[Tensor, Tensor], Tensor], PipelineStep | None]:
    train, parallel, data_ranks = recipe.train, recipe.parallel, mesh["data"].size()
    # Each token's share of the mean loss; times data_ranks because gradients are then averaged over those.
    scale = data_ranks / (train.global_batch * train.seq_len)
    token_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    if parallel.tp > 1:
        token_loss = tensor_parallel_loss(
            mesh=mesh["tp"], vocab_size=recipe.model.vocab_size, loss_parallel=recipe.tensor.loss_parallel
        )
    positions = None
    if parallel.cp > 1:
        positions = local_positions(
            seq_len=train.seq_len,
            cp=parallel.cp,
            cp_rank=mesh.get_local_rank("cp"),
            method=recipe.context.method,
        ).to(device)

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return token_loss(logits, targets) * scale

    def accumulate(tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one microbatch after the other; their summed loss."""
        model = stages[0]
        total = torch.zeros((), dtype=torch.float64, device=device)
        starts = range(0, len(tokens), recipe.micro_batch)
        for start in starts:
            if parallel.dp_shard > 1:
                before_microbatch(model, last=start == starts[-1])
            rows = slice(start, start + recipe.micro_batch)  # the last microbatch may be short
            with record_function("forward"):
                loss = loss_of(model(tokens[rows]), targets[rows])
            with record_function("backward"):
                loss.backward()
            total += loss.detach()
        return total

    pipeline = None
    if parallel.pp > 1:
        pipeline = PipelineStep(
            stages,
            recipe=recipe,
            mesh=mesh["pp"],
            device=device,
            compute_dtype=DTYPES[train.dtype],
            loss=loss_of,
            vocab_size=len(rows_of_rank(recipe.model.vocab_size, mesh["tp"])),
        )

    run = pipeline or accumulate
    kernel = nullcontext if train.attention == "auto" else partial(attention_kernel, train.attention)

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        if positions is not None:
            tokens, targets = tokens[:, positions], targets[:, positions]
        with kernel():
            loss = run(tokens, targets)
        if buckets is not None:
            buckets.finish()
        if parallel.pp > 1:
            sum_tied_gradients(stages, recipe=recipe, mesh=mesh["pp"])
        if data_ranks > 1:
            dist.all_reduce(loss, group=group_of(mesh, "data"))
        return loss / data_ranks

    return forward_backward, pipeline
