"""The model: a pre-norm decoder, written for one device. It knows nothing of ranks.

    tokens (B, T) -> embedding -> n_layers x [norm, attention, +, norm, SwiGLU, +] -> norm -> output -> logits (B, T, V)

B sequences, T tokens, D = d_model, H query heads, K key/value heads, E = head_dim, F = d_ff, V = vocab_size.
Shapes stand in comments at the line's end. The strategies split this model after the fact.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.recipe import Model

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (B, T, V) and targets (B, T): a sum over tokens


class Linear(nn.Module):
    """y = x Wᵀ, without bias. W is cast to x's type, so float32 weights can serve a bfloat16 computation."""

    copy: Tensor | None = None  # of W, in the type of the computation: see cast_once
    bias = None  # an engine that splits linear layers looks for one

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def own_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        weight = self.own_weight()
        return product(x, weight.to(x.dtype) if self.copy is None else _Cast.apply(weight, self.copy))


class _Cast(torch.autograd.Function):
    """weight.to(copy.dtype), which is there already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


@contextlib.contextmanager
def cast_once(models: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within, which must be between two updates, each Linear casts its W once, and not at each use."""
    linears = [module for model in models for module in model.modules() if isinstance(module, Linear)]
    for linear in linears:
        linear.copy = linear.own_weight().detach().to(dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.copy = None


class Embedding(nn.Module):
    """Row `token` of W, in the type of the computation."""

    def __init__(self, vocab_size: int, d_model: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return lookup(tokens, self.weight).to(self.compute_dtype)  # (B, T, D)


def lookup(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` (V, D) for tokens (B, T).  -> (B, T, D)"""
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return _Lookup.apply(tokens, weight)
    return F.embedding(tokens, weight)


class _Lookup(torch.autograd.Function):
    """F.embedding that adds the gradients of a row in float32, as CUDA does: in bfloat16 many lose digits."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.n_rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        rows = torch.ops.aten.embedding_dense_backward(grad.float(), tokens, ctx.n_rows, -1, False)
        return None, rows.to(ctx.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · w (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama.

    `positions` are those of the tokens this model is given: 0 .. seq_len - 1, unless a strategy splits the sequence.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Model, seq_len: int) -> None:
        super().__init__()
        self.theta, self.head_dim = shape.rope_theta, shape.head_dim
        self.positions = torch.arange(seq_len, device="cpu")
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(seq_len, shape.head_dim), persistent=False)

    def reset_buffers(self) -> None:
        """Computes the tables in float64 and stores them in the buffers' own type."""
        frequencies = self.theta ** (-torch.arange(0, self.head_dim, 2, device="cpu").double() / self.head_dim)
        angles = torch.outer(self.positions.double(), frequencies)  # (T, E/2)
        self.cos = angles.cos().repeat(1, 2).to(self.cos)
        self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(self.sin)

    def keep(self, parts: Sequence[slice]) -> None:
        """Keeps these parts of the positions and of the tables, in this order."""
        self.positions, self.cos, self.sin = (
            torch.cat([table[part] for part in parts]) for table in (self.positions, self.cos, self.sin)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.cos.dtype)  # rotate in float32 at least, whatever the computation's type  # (B, T, H, E)
        cos, sin = (table[: x.shape[1], None] for table in (self.cos, self.sin))
        return torch.addcmul(x * cos, x.roll(self.head_dim // 2, dims=-1), sin)  # each element with its partner


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √E + causal mask) v.  q (B, H, T, E), k and v (B, K, T, E), H a multiple of K -> (B, H, T, E)"""
    if q.is_cuda:
        k, v = repeated_for_cuda(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def repeated_for_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For each head its own, in float32: up to torch 2.11 only plain products, which keep all scores, take grouped ones
    there (pytorch#191085).
    """
    n_groups = q.shape[1] // k.shape[1] if q.dtype == torch.float32 else 1
    return (k, v) if n_groups == 1 else (k.repeat_interleave(n_groups, dim=1), v.repeat_interleave(n_groups, dim=1))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q = Linear(shape.d_model, shape.n_heads * shape.head_dim)
        self.k = Linear(shape.d_model, shape.n_kv_heads * shape.head_dim)
        self.v = Linear(shape.d_model, shape.n_kv_heads * shape.head_dim)
        self.out = Linear(shape.n_heads * shape.head_dim, shape.d_model)
        self.attend = causal_attention  # context parallelism puts its own here

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q, self.k, self.v))  # (B, T, H|K, E)
        q, k = rotary(q).to(v.dtype), rotary(k).to(v.dtype)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, E)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class SwiGLU(nn.Module):
    """(silu(x Gᵀ) ⊙ x Uᵀ) Dᵀ (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.gate = Linear(shape.d_model, shape.d_ff)
        self.up = Linear(shape.d_model, shape.d_ff)
        self.down = Linear(shape.d_ff, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, D)


def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


class Block(nn.Module):
    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.run = run  # recompute puts its own here
        self.attention_norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.mlp = SwiGLU(shape)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        return self.run(self.layers, x, rotary)

    def layers(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))  # (B, T, D)


def walk(blocks: Iterable[nn.Module], x: Tensor, rotary: Rotary) -> Tensor:
    for block in blocks:
        x = block(x, rotary)
    return x


class Transformer(nn.Module):
    """The whole model. `forward` gives logits (B, T, V) in the computation's type; with targets (B, T), their loss.

    A model may lack its embedding, some blocks, or its norm and output: a pipeline stage is the same class with fewer
    parts, and takes or gives the residual stream (B, T, D) in place of tokens or logits.
    """

    embedding: Embedding | None
    norm: RMSNorm | None
    output: Linear | None

    def __init__(self, shape: Model, *, seq_len: int, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = shape
        self.walk = walk  # recompute puts its own here
        self.loss = linear_cross_entropy  # and `assemble` here
        self.rotary = Rotary(shape, seq_len)
        self.embedding = Embedding(shape.vocab_size, shape.d_model, compute_dtype)
        self.blocks = nn.ModuleDict({str(layer): Block(shape) for layer in range(shape.n_layers)})
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.output = Linear(shape.d_model, shape.vocab_size)
        self.tie()

    @property
    def tied(self) -> bool:
        """Whether the output projection is the embedding's matrix, and both are here."""
        return self.shape.tied_embeddings and self.embedding is not None and self.output is not None

    def tie(self) -> None:
        """Makes the two one parameter again, after either was replaced."""
        if self.tied and self.embedding is not None and self.output is not None:
            self.output.weight = self.embedding.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)  # (B, T) -> (B, T, D)
        x = self.walk(self.blocks.values(), x, self.rotary)
        if self.norm is None or self.output is None:
            return x
        if targets is None:
            return self.output(self.norm(x))  # (B, T, V)
        # Within the module, for around it strategies fetch its weight and its input.
        return self.output(self.norm(x), functools.partial(self.loss, targets=targets))


def weight_name(name: str, shape: Model) -> str:
    """The name under which the initial value of parameter `name` is known: a tied output starts as the embedding."""
    return "embedding.weight" if shape.tied_embeddings and name == "output.weight" else name


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum (not mean) over tokens of -log softmax(logits)[target], in float32 or better.

    A sum, because sums of microbatches and of ranks add up to the loss of the global batch whatever their sizes.
    logits (B, T, V), targets (B, T) -> scalar
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, loss: Loss = cross_entropy) -> Tensor:
    """`loss` of the logits x Wᵀ.  x (B, T, D), weight (V, D), targets (B, T) -> scalar"""
    return loss(F.linear(x, weight), targets)


def initial_weight(name: str, shape: torch.Size, *, seed: int, n_layers: int, device: torch.device | str) -> Tensor:
    """The whole initial value, in float32, of the parameter called `name`.

    It depends on the seed and the name alone, so that every layout starts from the same numbers. Norms start at 1;
    matrices are normal with deviation 0.02, those that write to the residual stream with 0.02/√(2·n_layers)
    (GPT-2, Radford et al. 2019).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7]))
    writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
    deviation = 0.02 / math.sqrt(2 * n_layers) if writes_residual else 0.02
    return torch.empty(shape, device=device).normal_(0.0, deviation, generator=generator)
