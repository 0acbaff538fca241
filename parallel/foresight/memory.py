"""What the fullest rank of a layout holds, in a closed form: to search by. The dry run has it to the byte.

By default as this lab trains on a GPU: float32 weights, gradients and both moments of AdamW; activations tensor by
tensor; the logits. Held against dry runs in tests/test_foresight.py. `Keeping` says the same of other programs;
benchmarks/published.py holds it against what they have published.
"""

from dataclasses import dataclass, replace

import numpy as np

from parallel.foresight.operators import repeats_keys
from parallel.foresight.workload import Number, Workload


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What a program keeps. The defaults are this lab's on a GPU."""

    # bytes of a parameter
    weight: float = 4
    gradient: float = 4
    optimizer: float = 8  # both moments; with a float32 copy of 16-bit weights 12
    shards_weights: bool = True  # where state is sharded. False: weights and gradients are whole, as in ZeRO-1
    holds_gradients: bool = False  # from step to step; else they come with backward
    # of a token in a block: elements of the residual stream in the type of the computation (before and after a norm,
    # queries, what attention gives), and bytes of one in float32
    residual: float = 6.05
    in_float32: float = 0
    repeats_keys: bool = True  # in float32 attention keeps keys and values for each head
    gathers_again: bool = False  # backward gathers what tp has split, a second time, so that it need not be kept
    score: float = 0  # bytes of each attention score, where attention is not fused
    # bytes of a logit, at the end of forward: of this microbatch (logits, and twice log-softmax in float32), and what
    # is left then of the one before
    logit: float = 12.3
    earlier_logit: float = 0
    waiting_logit: float = 4  # of one whose backward comes after other microbatches' forwards
    base_gib: float = 0  # whatever the layout


LAB = Keeping()
# A norm keeps its input in float32, and what it makes of that.
ON_CPU = replace(LAB, residual=4, in_float32=16, repeats_keys=False)


def peak_bytes(w: Workload, k: Keeping = LAB) -> Number:
    """Of the first or the last rank of the pipeline, whichever holds more."""
    if np.ndim(w.pp) == 0 and w.pp == 1:
        return _rank_bytes(w, k, first=True, last=True)
    alone = np.asarray(w.pp) == 1
    first = _rank_bytes(w, k, first=True, last=alone | (w.folded == 1))
    return np.maximum(first, _rank_bytes(w, k, first=alone, last=True))[()]


def _rank_bytes(w: Workload, k: Keeping, *, first: Number, last: Number) -> Number:
    layers = _layers(w, first)
    matrix = w.vocab_size * w.d_model / w.tp
    block = w.block_parameters / w.tp
    ends = first * matrix + last * matrix * (1 - w.tied * first)
    local = layers * block + ends
    shards = np.where(w.shards_state == 1, w.dp_shard * w.cp, 1)
    sharded, piped = (w.shards_state == 1) & k.shards_weights, np.asarray(w.pp) > 1
    parts = np.where(sharded, shards, 1)  # of weights and gradients
    tokens, e, m = w.micro_batch * w.seq_len / w.cp, w.element_bytes, w.n_microbatches

    # A microbatch in a block. Where tokens are split over tp, what a pair of products takes in is gathered and kept.
    split = np.where(w.sequence_parallel == 1, w.tp, 1)
    stream = w.d_model * e / split
    heads = w.n_heads * w.head_dim / w.tp
    keys = np.where(k.repeats_keys & (repeats_keys(w) == 1), heads, w.n_kv_heads * w.head_dim / w.tp)
    whole = tokens * w.d_model * (k.residual * e + k.in_float32)
    gathered = np.where(w.tp > 1, 0 if k.gathers_again else 2 * e * tokens * w.d_model, 0)
    hidden = 2 * (w.n_mlp_matrices - 1) * w.d_ff / w.tp  # each product's result, and what the activation makes of it
    everything = (whole - gathered) / split + gathered + tokens * e * (hidden + 2 * keys)
    scores = (1 - w.flash) * (1 - w.again_attention) * tokens * w.seq_len * w.n_heads / w.tp
    everything = everything + k.score * scores
    # Results of out and down are whole: what splits them over tp comes after.
    products = w.saves_products * (heads + 2 * keys + 2 * w.d_ff / w.tp + 2 * w.d_model) * e
    little = tokens * (stream + w.saves_attention * heads * e + products)
    keeps = np.minimum(w.in_flight, m) * first + (1 - first) * np.where(w.keeps_all, m, 1)
    copies = np.where(sharded | (e >= k.weight), 0, e * block * layers * (1 - w.recomputes))  # of weights, in 16 bits
    kept = keeps * layers * (w.recomputes * little + (1 - w.recomputes) * everything) + copies
    rows = np.where(w.loss_parallel == 1, w.vocab_size / w.tp, w.vocab_size)
    logit = k.logit + k.earlier_logit * (m > 1) + k.waiting_logit * np.where(w.keeps_all, m - 1, 0)
    output = last * (logit * tokens * rows / w.loss_chunks + np.where(sharded | (e >= k.weight), 0, e * matrix))
    output = output + last * np.where(w.loss_chunks > 1, 4 * matrix, 0)

    # Weights that FSDP has gathered, and gradients that a pipeline has not scattered yet.
    stays = sharded & (w.backward_gathers == 0)
    fetched = np.where(sharded, np.where(stays, e * local, e * (2 * block + last * matrix)), 0)
    gradients = np.where(sharded & piped, k.gradient * local, k.gradient * local / parts)
    persist = (m > 1) | piped | k.holds_gradients
    states = k.weight * local / parts + k.optimizer * local / shards
    forward_ends = states + np.where(persist, gradients, 0) + kept + output + fetched
    again = w.recomputes * w.block_group * everything  # in backward, one group of blocks at a time
    one = k.gradient * np.maximum(block, first * matrix)
    on_their_way = np.where(sharded, np.where(piped, 0, 2 * k.gradient * block), 0 if k.holds_gradients else one)
    backward = states + gradients + np.where(piped, kept, kept / np.maximum(layers, 1)) + again + fetched + on_their_way
    return np.maximum(forward_ends, backward) + k.base_gib * 2**30


def _layers(w: Workload, first: Number) -> Number:
    """Of the first rank of the pipeline, or of the last: as many on each, or fewer where the output counts as some."""
    in_layers = w.vocab_size * w.d_model / w.block_parameters
    most = np.minimum(w.n_layers, np.ceil((w.n_layers + in_layers) / w.pp))
    by_cost = np.where(first, most, np.maximum(w.n_layers - most * (w.pp - 1), 0))
    return np.where((w.even_stages == 1) | (np.asarray(w.pp) == 1), np.ceil(w.n_layers / w.pp), by_cost)
