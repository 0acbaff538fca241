"""Tensor parallelism: every matrix of a block is split over the ranks of `tp` (Megatron-LM, arXiv:1909.08053).

    attention   q, k, v by rows of W (each rank its heads)          out by columns of W     -> partial sums
    SwiGLU      gate, up by rows of W (each rank its hidden units)  down by columns of W    -> partial sums
    embedding   by vocabulary                                       -> partial sums
    output      by vocabulary                                       -> this rank's logits

Each pair needs one communication before it and one after. Without sequence parallelism (SP) the residual stream is
whole on every rank; with it (arXiv:2205.05198) norms and residuals hold T/tp tokens each:

    without SP   before: nothing,    its backward: all-reduce      after: all-reduce,      its backward: nothing
    with SP      before: all-gather, its backward: reduce-scatter  after: reduce-scatter,  its backward: all-gather

Weights rest as DTensors, for checkpoints, clipping and FSDP need their placement. The computation runs on the local
parts: dispatching each operation through DTensor costs a sixth of a step on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.collectives import all_gather, all_reduce, reduce_scatter
from parallel.mesh import as_dtensor, local_part, part_of
from parallel.recipe import Recipe
from parallel.transformer import Block, Embedding, Linear, RMSNorm, Transformer, cross_entropy, lookup

SEQUENCE = 1  # the dim of x (B, T, D) that sequence parallelism splits
# What forward does, and what its backward does; None: nothing.
Conjugates = tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]


def apply_tensor(model: Transformer, *, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Splits `model` over the 1-D `mesh`, in place. Its parameters may be on the meta device."""
    group = mesh.get_group()
    before, after = (GATHER_SEQUENCE, SCATTER_SEQUENCE) if sequence_parallel else (SUM_GRADIENT, SUM)

    def norm(whole: RMSNorm) -> LocalNorm:
        return LocalNorm(whole, mesh, group if sequence_parallel else None)

    for block in model.blocks.values():
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        attention.q, attention.k, attention.v, mlp.gate, mlp.up = (
            LocalLinear(linear, mesh, Shard(0)) for linear in (attention.q, attention.k, attention.v, mlp.gate, mlp.up)
        )
        attention.out, mlp.down = (LocalLinear(linear, mesh, Shard(1)) for linear in (attention.out, mlp.down))
        for pair in (attention, mlp):
            _communicate(pair, group, before=before, after=after)
        block.attention_norm, block.mlp_norm = norm(block.attention_norm), norm(block.mlp_norm)

    if model.embedding is not None:
        model.embedding = VocabParallelEmbedding(model.embedding, mesh)
        _communicate(model.embedding, group, after=after)
    if model.output is not None and model.norm is not None:
        model.norm, model.output = norm(model.norm), LocalLinear(model.output, mesh, Shard(0))
        model.tie()
        _communicate(model.output, group, before=before)


# ---- modules that compute on the local part of a DTensor weight -----------------------------------------------------


class LocalLinear(Linear):
    def __init__(self, whole: Linear, mesh: DeviceMesh, placement: Placement) -> None:
        nn.Module.__init__(self)  # and not Linear's, which makes a weight
        self.weight = _split_weight(whole.weight, mesh, placement)

    def own_weight(self) -> Tensor:
        return local_part(self.weight)


class LocalNorm(RMSNorm):
    """group: with sequence parallelism, where each rank's weight gradient covers its tokens only."""

    def __init__(self, whole: RMSNorm, mesh: DeviceMesh, group: dist.ProcessGroup | None) -> None:
        nn.Module.__init__(self)
        self.eps, self.group = whole.eps, group
        self.weight = _split_weight(whole.weight, mesh, Replicate())

    def forward(self, x: Tensor) -> Tensor:
        weight = local_part(self.weight)
        if self.group is not None:
            weight = _Communicate.apply(weight, self.group, *SUM_GRADIENT)
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)


class VocabParallelEmbedding(Embedding):
    """Looks up the tokens among its own rows and gives zero for the others: the sum over ranks is the embedding."""

    def __init__(self, whole: Embedding, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.compute_dtype = whole.compute_dtype
        self.weight = _split_weight(whole.weight, mesh, Shard(0))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = local_part(self.weight)
        assert isinstance(self.weight, DTensor)
        local = tokens - rows_of_rank(self.weight.shape[0], self.weight.device_mesh).start
        elsewhere = (local < 0) | (local >= rows.shape[0])
        x = lookup(local.masked_fill(elsewhere, 0), rows).to(self.compute_dtype)
        return x.masked_fill(elsewhere.unsqueeze(-1), 0.0)  # (B, T, D), a partial sum


def rows_of_rank(n_rows: int, mesh: DeviceMesh) -> range:
    """The rows of a matrix split by rows that this tp rank holds; tp is the mesh's last dimension."""
    return part_of(n_rows, mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))


def _split_weight(weight: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's part of the whole `weight`, as a DTensor. The last part may be smaller."""
    whole = part = weight.detach()
    if isinstance(placement, Shard):
        part = whole.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()].clone()
    return nn.Parameter(as_dtensor(part, whole, mesh, [placement]))


def _communicate(
    module: nn.Module,
    group: dist.ProcessGroup,
    *,
    before: Conjugates | None = None,
    after: Conjugates | None = None,
) -> None:
    if before is not None:
        module.register_forward_pre_hook(lambda _, args: (_Communicate.apply(args[0], group, *before), *args[1:]))
    if after is not None:
        module.register_forward_hook(lambda _module, _args, out: _Communicate.apply(out, group, *after))


# ---- the four communications ----------------------------------------------------------------------------------------


_gather, _scatter = (functools.partial(each, dim=SEQUENCE) for each in (all_gather, reduce_scatter))

SUM_GRADIENT: Conjugates = (None, all_reduce)  # f in the Megatron paper
SUM: Conjugates = (all_reduce, None)  # g
GATHER_SEQUENCE: Conjugates = (_gather, _scatter)
SCATTER_SEQUENCE: Conjugates = (_scatter, _gather)


class _Communicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, *conjugates: Callable[..., Tensor] | None) -> Tensor:
        forward, ctx.conjugate = conjugates
        ctx.group = group
        return forward(x, group=group) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.conjugate(grad, group=ctx.group) if ctx.conjugate else grad, None, None, None


# ---- the loss on vocabulary shards ----------------------------------------------------------------------------------


def tensor_parallel_loss(logits: Tensor, targets: Tensor, *, recipe: Recipe, mesh: DeviceMesh) -> Tensor:
    """`cross_entropy` for logits (B, T, V/tp) of this rank and targets (B, T): their sum over tokens, on every rank."""
    vocab_size, group = recipe.model.vocab_size, mesh.get_group()
    first = rows_of_rank(vocab_size, mesh).start
    if recipe.tensor.loss_parallel:
        return _VocabParallelCrossEntropy.apply(logits, targets, first, group)
    return cross_entropy(_GatherVocabulary.apply(logits, vocab_size, first, group), targets)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum over tokens of log Σ exp(logits) - logits[target]; what travels is two numbers a token, not V."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        ctx.logits_dtype = logits.dtype
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, T, V/tp)
        largest = all_reduce(logits.amax(dim=-1), group=group, op="max")  # (B, T)
        logits = logits - largest.unsqueeze(-1)
        local = targets - first
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)  # (B, T, 1)
        at_target = logits.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)  # (B, T)
        exponentials = logits.exp()
        denominator, at_target = all_reduce(torch.stack((exponentials.sum(dim=-1), at_target)), group=group)
        ctx.save_for_backward(exponentials.div_(denominator.unsqueeze(-1)), local, elsewhere)
        return (denominator.log() - at_target).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, elsewhere = ctx.saved_tensors
        ours = torch.where(elsewhere, 0.0, -1.0).to(probabilities.dtype).unsqueeze(-1)  # (B, T, 1)
        return (probabilities.scatter_add(-1, local, ours) * grad).to(ctx.logits_dtype), None, None, None


class _GatherVocabulary(torch.autograd.Function):
    """Forward: logits of all ranks side by side, (B, T, V). Backward: each rank takes its own columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, vocab_size: int, first: int, group: dist.ProcessGroup) -> Tensor:
        ctx.columns = slice(first, first + logits.shape[-1])
        widest = -(-vocab_size // group.size())  # a collective takes equal parts: pad the last
        padded = F.pad(logits, (0, widest - logits.shape[-1]))
        return all_gather(padded, dim=2, group=group)[..., :vocab_size]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[..., ctx.columns], None, None, None
