"""FLOPs that a model needs, whatever runs it; counted without torch. docs/measures.md derives the formula."""

from typing import NamedTuple

from parallel.recipe import Model


class ModelFlops(NamedTuple):
    """Of forward and backward, per token."""

    full: int  # attention counted as if every token saw all s
    causal: int  # attention counted by half


def model_flops_per_token(model: Model, *, seq_len: int) -> ModelFlops:
    """What training on one token of a sequence of `seq_len` takes, in any layout (PaLM, arXiv:2204.02311, app. B)."""
    # Tied or not, the output projection is a product.
    weights = model.n_layers * model.block_matrices + model.vocab_size * model.d_model
    pairs = model.n_layers * model.d_model * seq_len
    return ModelFlops(full=6 * weights + 12 * pairs, causal=6 * weights + 6 * pairs)
