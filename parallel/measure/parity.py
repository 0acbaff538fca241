"""Parity: does a layout compute the gradients that one process would?

Both sides compute in float64 whatever the recipe trains in, so that rounding cannot hide a wrong scale, a missing sum
or a dropped token. Losses alone prove nothing: AdamW divides a gradient by its own size.
"""

import hashlib
import math
import mmap
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.collectives import gathered
from parallel.measure.model_flops import model_flops_per_token
from parallel.mesh import local_part, slice_like, split_dim
from parallel.recipe import Recipe
from parallel.transformer import Transformer, cross_entropy
from parallel.weights import load_initial_weights

TOLERANCE = 1e-10  # what float64 gives is near 1e-15
MAX_REFERENCE_FLOPS = 2e12  # one step of one process in float64: some 20 s on one core
MAX_SCORES_BYTES = 4 * 2**30
KEPT_BYTES = 2**26  # of a reference of 8 million parameters
KEY_BYTES = hashlib.sha256().digest_size

# Memory of all ranks that are forked from one process, as those of a run and of a comparison's rows are. It takes none
# before something is written there, and ends with them.
_kept = mmap.mmap(-1, KEPT_BYTES)


@dataclass
class Reference:
    """What one process computes: the mean loss of the global batch and its gradient, by parameter name."""

    loss: float
    gradients: dict[str, Tensor]


def parity_recipe(recipe: Recipe, *, on_cuda: bool = False) -> tuple[Recipe, str]:
    """The recipe to prove `recipe` with, and what its reference is, in words.

    In float64, or the most exact type that its engine has, and with the attention kernel for it, else as it is. A model
    too large for one process keeps its layout, its heads and its microbatches, and shrinks in width, depth, sequence
    and vocabulary.
    """
    # CUDA has no other kernel for float64 than math, and inductor of torch 2.11 gives that of the CPU a float32 tensor.
    # Ring and all-gather bring their own.
    model, parallel = recipe.model, recipe.parallel
    plain = recipe.train.compile == "inductor" and not (parallel.cp > 1 and recipe.context.zigzag)
    train = replace(recipe.train, dtype=recipe.engine.exact_dtype, attention="math" if plain else "auto")
    flops = model_flops_per_token(model, seq_len=train.seq_len).full * train.global_batch * train.seq_len
    plain_products = on_cuda or train.attention == "math"  # which keep all scores of a sequence
    scores_bytes = 8 * model.n_layers * model.n_heads * train.seq_len**2 if plain_products else 0
    if flops <= MAX_REFERENCE_FLOPS and scores_bytes <= MAX_SCORES_BYTES:
        return replace(recipe, train=train), "one process, same model and batch"
    layers = min(model.n_layers, recipe.n_stages + (model.n_layers % recipe.n_stages > 0))
    width, vocabulary = 8 * model.n_heads, min(model.vocab_size, 64 * parallel.tp + model.vocab_size % parallel.tp)
    model = replace(model, preset="none", n_layers=layers, d_model=width, d_ff=16 * parallel.tp, vocab_size=vocabulary)
    positions = 2 * parallel.cp * parallel.tp
    seq_len = positions * max(1, math.ceil(16 / positions))
    batch = recipe.replicas * min(recipe.n_microbatches, max(2 * parallel.pp, 2))
    loss_chunks = min(train.loss_chunks, seq_len // parallel.cp)
    train = replace(train, seq_len=seq_len, global_batch=batch, micro_batch=1, loss_chunks=loss_chunks)
    shape = f"{layers} layers, d_model {width}, seq_len {seq_len}"
    words = f"one process, same layout on a smaller model ({shape}): the whole is too large for one process"
    return replace(recipe, model=model, train=train, data=replace(recipe.data, source="synthetic")), words


def reference_gradients(recipe: Recipe, tokens: Tensor, targets: Tensor) -> Reference:
    """One process, one device, the whole global batch (int64, (global_batch, seq_len)), sequence by sequence."""
    with torch.device("meta"):
        model = Transformer(recipe.model, seq_len=recipe.train.seq_len, compute_dtype=torch.float64).to(torch.float64)
    load_initial_weights(model, recipe, tokens.device)
    total = 0.0
    for row in range(len(tokens)):
        loss = cross_entropy(model(tokens[row : row + 1]), targets[row : row + 1]) / tokens.numel()
        loss.backward()
        total += loss.item()
    return Reference(total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def kept_reference(recipe: Recipe, tokens: Tensor, targets: Tensor) -> Reference:
    """reference_gradients, on a CPU computed once for all rows of a comparison that have the same.

    They depend on what makes the key alone, and on this code, which was imported before the ranks were forked.
    """
    if tokens.device.type != "cpu":
        return reference_gradients(recipe, tokens, targets)
    given = repr((recipe.model, recipe.train.seq_len, recipe.train.seed, tuple(tokens.shape))).encode()
    key = hashlib.sha256(given + tokens.numpy().tobytes() + targets.numpy().tobytes()).digest()
    if _kept[:KEY_BYTES] == key:
        with memoryview(_kept) as memory:
            kept: Reference = pickle.loads(memory[KEY_BYTES:])  # noqa: S301  what a rank like this one wrote
        return kept
    reference = reference_gradients(recipe, tokens, targets)
    pickled = pickle.dumps(reference)
    if KEY_BYTES + len(pickled) <= KEPT_BYTES:
        _kept[:KEY_BYTES] = bytes(KEY_BYTES)  # until all is written, for this rank may be killed
        _kept[KEY_BYTES : KEY_BYTES + len(pickled)] = pickled
        _kept[:KEY_BYTES] = key
    return reference


def compare_with_reference(
    gradient: Callable[[str], list[Tensor]], loss: float, reference: Reference | None, *, device: torch.device
) -> dict[str, Any] | None:
    """Compares every rank's gradients with rank 0's `reference` (None elsewhere).

    gradient: this rank's gradients, of the mean loss, of the parameter of that name in the whole model: none, one, or
        one of each copy; a DTensor, or whole.
    Returns on rank 0 {max_rel_grad_diff, max_abs_loss_diff}; None elsewhere. The difference is infinite where a
    parameter, or a part of one, has no gradient on any rank.
    """
    shapes = gathered({name: tuple(g.shape) for name, g in reference.gradients.items()} if reference else None)[0]
    parts: dict[str, list[tuple[Any, int, float]]] = {}  # name -> (which part, its elements, ‖difference‖²)
    for name, shape in shapes.items():
        # One parameter at a time: no rank but the first ever holds the whole reference.
        whole = reference.gradients[name] if reference else torch.empty(shape, dtype=torch.float64, device=device)
        dist.broadcast(whole, src=0)
        parts[name] = []
        for mine in gradient(name):
            difference = local_part(mine) - slice_like(whole, mine)
            parts[name].append((_which_part(mine), difference.numel(), difference.square().sum().item()))
    of_ranks = gathered((loss, parts))
    if reference is None:
        return None
    relative_differences = [
        _relative_difference(gradient, [part for _, theirs in of_ranks for part in theirs[name]])
        for name, gradient in reference.gradients.items()
    ]
    loss_difference = max(abs(theirs - reference.loss) for theirs, _ in of_ranks)
    return {"max_rel_grad_diff": max(relative_differences), "max_abs_loss_diff": loss_difference}


def _which_part(gradient: Tensor) -> tuple[tuple[str, int], ...]:
    """The same on ranks that hold copies of the same part."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    dims = enumerate(mesh.mesh_dim_names or ())
    return tuple((name, mesh.get_local_rank(i)) for i, name in dims if split_dim(gradient, i) is not None)


def _relative_difference(gradient: Tensor, parts: list[tuple[Any, int, float]]) -> float:
    """‖g - g_ref‖₂ / ‖g_ref‖₂ of one parameter; of copies, the worst counts."""
    worst = {which: (elements, square) for which, elements, square in sorted(parts, key=lambda part: part[2])}
    whole = sum(elements for elements, _ in worst.values()) == gradient.numel()
    if not whole or any(math.isnan(square) for *_, square in parts):
        return math.inf
    size = gradient.norm().item()
    difference = math.sqrt(sum(square for _, square in worst.values()))
    return difference / size if size else (0.0 if difference == 0 else math.inf)
