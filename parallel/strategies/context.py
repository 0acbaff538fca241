"""Context parallelism: cp ranks share every sequence. docs/strategies.md has what each method sends.

Norms, projections, MLP and loss treat each token alone, so a rank runs them on its own t = T/cp tokens. Attention alone
looks across the sequence. B sequences, T tokens in all, H query heads, K key/value heads, E = head_dim; with tensor
parallelism H and K are those of one rank. Ring and all-gather sum gradients over ranks in float32 at least.

A causal query sees only the keys before it, so late tokens are more work than early ones. For ring and all-gather the
sequence is therefore cut into 2·cp chunks, and rank r holds chunk r and chunk 2·cp-1-r: every rank has equal work.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import all_gather, exchange, reduce_scatter
from parallel.recipe import Context, ContextMethod
from parallel.transformer import Block, Transformer, causal_attention

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v


def local_slices(*, seq_len: int, cp: int, cp_rank: int, method: ContextMethod) -> list[slice]:
    """Which parts of the sequence rank `cp_rank` holds: a chunk of cp, or in zig-zag two chunks of 2·cp."""
    assert method in METHODS and 0 <= cp_rank < cp
    zigzag = Context(method=method).zigzag
    chunks, n_chunks = ([cp_rank, 2 * cp - 1 - cp_rank], 2 * cp) if zigzag else ([cp_rank], cp)
    assert seq_len % n_chunks == 0
    size = seq_len // n_chunks
    return [slice(chunk * size, (chunk + 1) * size) for chunk in chunks]


def apply_context(
    model: Transformer, *, mesh: DeviceMesh, method: ContextMethod, attend: Callable[..., Tensor] | None = None
) -> None:
    """Makes the attention of every block look across the ranks of `mesh` (one dimension, cp).

    Afterwards the model takes the tokens at `model.rotary.positions`, and gives their logits. The weights' gradients
    are those of these tokens: data parallelism has to sum them over cp too. Works on any device, meta included.
    attend: another's implementation of the method, for q, k and v as causal_attention takes them.
    """
    attend = attend or functools.partial(METHODS[method], group=mesh.get_group())
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.attention.attend = attend
    cp, cp_rank, seq_len = mesh.size(), mesh.get_local_rank(), len(model.rotary.positions)
    model.rotary.keep(local_slices(seq_len=seq_len, cp=cp, cp_rank=cp_rank, method=method))


class _Piece(NamedTuple):
    """A rectangle of the attention matrix that is all visible, or a square on its diagonal."""

    queries: slice  # of mine
    keys: slice  # of those at hand
    causal: bool


# ---- ring ----------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # dynamo cannot trace point-to-point messages
def ring_attention(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """causal_attention over the sequence of all ranks, by ring (Liu et al. 2023, arXiv:2310.01889).

    q (B, H, t, E), k and v (B, K, t, E), in zig-zag (the balance of Brandon et al. 2023, arXiv:2311.09431, with chunks
    in place of stripes) -> (B, H, t, E)
    """
    return _Ring.apply(q, k, v, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        q, kv = _last_dim_dense(q), torch.stack((k, v))  # (2, B, K, t, E), one message
        out, lse = _attend(q, _ring_pieces(kv, group))
        ctx.group = group
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, kv, out, lse = ctx.saved_tensors
        grad, rank = _last_dim_dense(grad), ctx.group.rank()
        dq = torch.zeros_like(q, dtype=lse.dtype)
        receive_dkv = None
        for theirs, piece in _ring_pieces(kv, ctx.group):
            parts = _piece_gradients(grad, q, theirs, out, lse, piece)
            # The gradients of a rank's keys start on the next rank and follow the keys round, until they are home.
            dkv = receive_dkv() if receive_dkv else torch.zeros_like(kv, dtype=lse.dtype)
            _add_gradients(dq, dkv, parts, piece)
            if piece.causal:  # they are mine
                own_dkv = dkv
            else:
                receive_dkv = exchange(dkv, to=rank + 1, source=rank - 1, group=ctx.group)
        dk, dv = own_dkv + receive_dkv() if receive_dkv else own_dkv
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None


def _ring_pieces(kv: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[Tensor, _Piece]]:
    """K and V of each rank: mine, those of the rank before, ...; and the half of them that my queries see.

    The next travel during each yield.
    """
    rank, cp, half = group.rank(), group.size(), kv.shape[-2] // 2
    everything, early, late = slice(None), slice(half), slice(half, None)
    for step in range(cp):
        receive = exchange(kv, to=rank + 1, source=rank - 1, group=group) if step < cp - 1 else None
        if step == 0:
            yield kv, _Piece(everything, everything, causal=True)
        elif step <= rank:  # of a rank before: its early chunk lies before both of mine, its late one after both
            yield kv, _Piece(everything, early, causal=False)
        else:  # of a rank after: both of its chunks lie between mine
            yield kv, _Piece(late, everything, causal=False)
        if receive:
            kv = receive()


# ---- all-gather ----------------------------------------------------------------------------------------------------


@torch.compiler.disable  # traced, in-place work in the forward of a Function loses the gradient in torch 2.11
def all_gather_attention(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """causal_attention over the sequence of all ranks, by collecting K and V (Llama 3, arXiv:2407.21783, 3.3.2).

    Simple, and cheap where grouped queries make K and V small; every layer keeps the K and V of the whole sequence.
    q (B, H, t, E), k and v (B, K, t, E), in zig-zag -> (B, H, t, E)
    """
    return _AllGather.apply(q, k, v, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        q, kv = _last_dim_dense(q), torch.stack((k, v))  # (2, B, K, t, E)
        of_ranks = all_gather(kv, dim=0, group=group)  # (cp·2, B, K, t, E)
        early, late = of_ranks.unflatten(0, (-1, 2)).chunk(2, dim=-2)  # (cp, 2, B, K, t/2, E) each
        kv = torch.cat((early, late.flip(0))).movedim(0, -3).flatten(-3, -2)  # (2, B, K, T, E), in sequence order
        out, lse = _attend(q, _prefix_pieces(kv, group))
        ctx.group = group
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, kv, out, lse = ctx.saved_tensors
        grad, cp = _last_dim_dense(grad), ctx.group.size()
        dq, dkv = torch.zeros_like(q, dtype=lse.dtype), torch.zeros_like(kv, dtype=lse.dtype)
        for _, piece in _prefix_pieces(kv, ctx.group):
            _add_gradients(dq, dkv, _piece_gradients(grad, q, kv, out, lse, piece), piece)
        early, late = dkv.unflatten(-2, (2 * cp, -1)).movedim(-3, 0).chunk(2)  # (cp, 2, B, K, t/2, E) each
        of_ranks = torch.cat((early, late.flip(0)), dim=-2).flatten(0, 1)  # (cp·2, B, K, t, E)
        dk, dv = reduce_scatter(of_ranks, dim=0, group=ctx.group).to(q.dtype)  # (B, K, t, E) each
        return dq.to(q.dtype), dk, dv, None


def _prefix_pieces(kv: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[Tensor, _Piece]]:
    """Each of my two chunks of queries sees the chunks before it, and itself up to the diagonal."""
    rank, cp = group.rank(), group.size()
    size = kv.shape[-2] // (2 * cp)
    for queries, chunk in ((slice(size), rank), (slice(size, None), 2 * cp - 1 - rank)):
        if chunk > 0:
            yield kv, _Piece(queries, slice(chunk * size), causal=False)
        yield kv, _Piece(queries, slice(chunk * size, (chunk + 1) * size), causal=True)


# ---- Ulysses -------------------------------------------------------------------------------------------------------


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """causal_attention over the sequence of all ranks, each for H/cp heads (Jacobs et al. 2023, arXiv:2309.14509).

    q (B, H, t, E), k and v (B, K, t, E), contiguous chunks of the sequence -> (B, H, t, E)
    """
    cp = group.size()
    if k.shape[1] < cp:  # a key head serves queries on several ranks: each gets a copy
        k, v = (x.repeat_interleave(cp // x.shape[1], dim=1) for x in (k, v))
    n_heads = [x.shape[1] // cp for x in (q, k, v)]
    by_heads = torch.cat([x.unflatten(1, (cp, -1)).movedim(1, 0) for x in (q, k, v)], dim=2)
    by_tokens = _AllToAll.apply(by_heads, group)  # (cp, B, (H+2K)/cp, t, E), first dim: rank to, then rank from
    q, k, v = by_tokens.movedim(0, 2).flatten(2, 3).split(n_heads, dim=1)
    y = causal_attention(q, k, v)  # (B, H/cp, T, E)
    y = _AllToAll.apply(y.unflatten(2, (cp, -1)).movedim(2, 0), group)  # (cp, B, H/cp, t, E)
    return y.movedim(0, 1).flatten(1, 2)  # (B, H, t, E)


class _AllToAll(torch.autograd.Function):
    """Row j of rank i becomes row i of rank j. As a matrix this transposes ranks and rows, so it is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        # Not dist.all_to_all_single: compiled, an in-place collective would lose the gradient in torch 2.11.
        return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), None, None, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


METHODS: dict[ContextMethod, Callable[..., Tensor]] = {
    "ring": ring_attention,
    "all-gather": all_gather_attention,
    "ulysses": ulysses_attention,
}


# ---- attention piece by piece --------------------------------------------------------------------------------------
# softmax(s) v over the keys of two pieces is the mean of both results, weighted by the Σ eˢ of each. So a piece gives
# its result and its log Σ eˢ (lse), and any number of pieces merge exactly (Dao et al. 2022, arXiv:2205.14135).


def _attend(q: Tensor, pieces: Iterable[tuple[Tensor, _Piece]]) -> tuple[Tensor, Tensor]:
    """The result and the lse of all pieces, each of the K and V beside it; merged in float32 at least."""
    out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))  # (B, H, t, E)
    lse = out.new_full(q.shape[:3], -torch.inf)  # (B, H, t)
    for kv, piece in pieces:
        _attend_piece(out, lse, q, kv, piece)
    return out.to(q.dtype), lse


def _attend_piece(out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, piece: _Piece) -> None:
    """Merges a piece into out and lse, in place."""
    queries, keys, causal = piece
    k, v = kv[:, :, :, keys]
    part, part_lse = _attention(q[:, :, queries], k, v, causal=causal)
    out, lse = out[:, :, queries], lse[:, :, queries]
    share = torch.sigmoid(part_lse - lse)  # = exp(part_lse) / (exp(lse) + exp(part_lse))
    out.lerp_(part.to(out.dtype), share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _piece_gradients(grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, piece: _Piece) -> Gradients:
    """dq, dk, dv of a piece. With the merged out and lse, those of all pieces add up to the whole gradient."""
    queries, keys, causal = piece
    grad, q, out, lse = (x[:, :, queries] for x in (grad, q, out, lse))
    k, v = kv[:, :, :, keys]
    return _attention_backward(grad, q, k, v, out, lse, causal=causal)


def _add_gradients(dq: Tensor, dkv: Tensor, parts: Gradients, piece: _Piece) -> None:
    """Adds a piece's dq, dk, dv in place, in float32 at least."""
    dq[:, :, piece.queries] += parts[0]
    dkv[0, :, :, piece.keys] += parts[1]
    dkv[1, :, :, piece.keys] += parts[2]


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention and its lse.  q (B, H, t, E), k and v (B, K, t', E), last dims dense -> (B, H, t, E), (B, H, t)"""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if _flash_serves(q, k, v, causal):
        return _flash(q, k, v, causal)
    return _plain(q, k, v, causal)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> Gradients:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    if _flash_serves(q, k, v, causal):
        return _flash_backward(grad, q, k, v, out, lse, causal)
    return _plain_backward(grad, q, k, v, out, lse, causal)


def _last_dim_dense(x: Tensor) -> Tensor:
    """The CPU kernel takes the last stride for 1 without a look, and gives wrong numbers where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_serves(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether the CUDA kernel takes these: float16 or bfloat16, head_dim <= 256, Ampere or later."""
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, True)
    return torch.backends.cuda.can_use_flash_attention(params)


def _padded(x: Tensor) -> Tensor:
    """With a last dim in multiples of 8."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x  # a pad by nothing copies


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention on CUDA, which wants head_dim in multiples of 8 and groups queries itself."""
    head_dim = q.shape[-1]
    q, k, v = (_padded(x) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=head_dim**-0.5)
    return out[..., :head_dim], lse


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Gradients:
    head_dim, n_queries, n_keys = q.shape[-1], q.shape[2], k.shape[2]
    grad, q, k, v, out = (_padded(x) for x in (grad, q, k, v, out))
    no_dropout = lse.new_empty(0)  # stands for its random state, which is not read
    parts = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, n_queries, n_keys, 0.0, causal, no_dropout, no_dropout,
        scale=head_dim**-0.5,
    )  # fmt: skip
    dq, dk, dv = (x[..., :head_dim] for x in parts)
    return dq, dk, dv


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal)  # (B, K, G, t, t')
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.unsqueeze(2).to(lse.dtype)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Gradients:
    groups = (k.shape[1], -1)
    wide_q, wide_grad, wide_out = (x.to(lse.dtype).unflatten(1, groups) for x in (q, grad, out))  # (B, K, G, t, E)
    wide_k, wide_v = (x.to(lse.dtype).unsqueeze(2) for x in (k, v))  # (B, K, 1, t', E)
    p = (_scores(q, k, causal) - lse.unflatten(1, groups).unsqueeze(-1)).exp()  # (B, K, G, t, t')
    dp = wide_grad @ wide_v.mT
    ds = p * (dp - (wide_grad * wide_out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dk, dv = (ds.mT @ wide_q).sum(2), (p.mT @ wide_grad).sum(2)
    return (ds @ wide_k).flatten(1, 2).to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q kᵀ / √E, -inf where masked, in float32 at least, grouped by key head: (B, K, G, t, t') with G = H/K."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).unflatten(1, (k.shape[1], -1)), k.to(wide).unsqueeze(2)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores
