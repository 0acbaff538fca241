"""What the fullest rank of a layout holds, in a closed form: to search by. The dry run has it to the byte.

Float32 weights, gradients and both moments of AdamW, as this lab trains; activations tensor by tensor, as its blocks
keep them on a CPU; the logits. Held against dry runs in tests/test_foresight.py.
"""

import numpy as np

from parallel.foresight.workload import Number, Workload

# Bytes that a block keeps, of a token and an element of the residual stream: those in the type of the computation, and
# those that norms and rotary positions keep in float32.
RESIDUAL, IN_FLOAT32 = 5.65, 12.8
LOGIT_BYTES = 12.3  # kept at the end of forward: logits, and twice log-softmax in float32


def peak_bytes(w: Workload) -> Number:
    """Of the first or the last rank of the pipeline, whichever holds more."""
    if np.ndim(w.pp) == 0 and w.pp == 1:
        return _rank_bytes(w, first=True, last=True)
    alone = np.asarray(w.pp) == 1
    first = _rank_bytes(w, first=True, last=alone | (w.folded == 1))
    return np.maximum(first, _rank_bytes(w, first=alone, last=True))[()]


def _rank_bytes(w: Workload, *, first: Number, last: Number) -> Number:
    layers = np.ceil(w.n_layers / w.pp)
    matrix = w.vocab_size * w.d_model / w.tp
    block = w.block_parameters / w.tp
    ends = first * matrix + last * matrix * (1 - w.tied * first)
    local = layers * block + ends
    shards = np.where(w.shards_state == 1, w.dp_shard * w.cp, 1)
    sharded, piped = w.shards_state == 1, np.asarray(w.pp) > 1
    tokens, e, m = w.micro_batch * w.seq_len / w.cp, w.element_bytes, w.n_microbatches

    # A microbatch in a block. Where tokens are split over tp, what a pair of products takes in is gathered and kept.
    split = np.where(w.sequence_parallel == 1, w.tp, 1)
    stream = w.d_model * e / split
    heads, keys = w.n_heads * w.head_dim / w.tp, w.n_kv_heads * w.head_dim / w.tp
    whole = tokens * w.d_model * (RESIDUAL * e + IN_FLOAT32)
    gathered = np.where(w.tp > 1, 2 * e * tokens * w.d_model, 0)
    everything = (whole - gathered) / split + gathered + tokens * e * (4 * w.d_ff / w.tp + 2 * keys)
    # Results of out and down are whole: what splits them over tp comes after.
    products = w.saves_products * (heads + 2 * keys + 2 * w.d_ff / w.tp + 2 * w.d_model) * e
    little = tokens * (stream + w.saves_attention * heads * e + products)
    keeps = np.minimum(w.in_flight, m) * first + (1 - first)
    copies = np.where(sharded | (e >= 4), 0, e * block * layers * (1 - w.recomputes))  # of weights, in 16 bits
    kept = keeps * layers * (w.recomputes * little + (1 - w.recomputes) * everything) + copies
    rows = np.where(w.loss_parallel == 1, w.vocab_size / w.tp, w.vocab_size)
    output = last * (LOGIT_BYTES * tokens * rows / w.loss_chunks + np.where(sharded | (e >= 4), 0, e * matrix))
    output = output + last * np.where(w.loss_chunks > 1, 4 * matrix, 0)

    # Weights that FSDP has gathered, and gradients that a pipeline has not scattered yet.
    stays = sharded & (w.backward_gathers == 0)
    fetched = np.where(sharded, np.where(stays, e * local, e * (2 * block + last * matrix)), 0)
    gradients = np.where(sharded & piped, 4 * local, 4 * local / shards)
    persist = (m > 1) | piped
    states = 12 * local / shards
    forward_ends = states + np.where(persist, gradients, 0) + kept + output + fetched
    again = w.recomputes * w.block_group * everything  # in backward, one group of blocks at a time
    on_their_way = np.where(sharded, np.where(piped, 0, 8 * block), 4 * np.maximum(block, first * matrix))
    backward = states + gradients + np.where(piped, kept, kept / layers) + again + fetched + on_their_way
    return np.maximum(forward_ends, backward)
