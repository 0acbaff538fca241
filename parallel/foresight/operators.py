"""What the lab's own code, which runs operator by operator, asks of host and memory: how many operators, what bytes.

Counted on the tapes of dry runs (parallel.measure.taping); tests/test_replay.py holds both beside each other.
"""

from typing import NamedTuple

import numpy as np

from parallel.foresight.workload import Number, Workload


class Operators(NamedTuple):
    """That the host gives out, views among them."""

    forward: Number  # of a block
    backward: Number
    ends: Number  # of a microbatch, embedding and output, forward and backward
    step: Number  # once


def own_operators(w: Workload) -> Operators:
    half, tp = 1 * (w.element_bytes == 2), 1 * (w.tp > 1)
    sharded, sp = w.shards_state, tp * w.sequence_parallel
    passes = [n / w.n_microbatches for n in (w.forward_gathers, w.backward_gathers, w.reduce_scatters)]
    replicas = sharded * (w.dp_replicate > 1)
    ring, gathers, exchanges = _methods_of_context(w)
    copies = exchanges * (exchanged_key_heads(w) > w.n_kv_heads)
    once = 1 * (w.n_microbatches > 1) * (w.recomputes == 0) * half * (1 - sharded)  # weights are cast once a step

    grouped = repeats_keys(w)

    computes = 53 + 8 * grouped + half * np.where(sharded == 1, 4, 13) + (18 + 14 * w.sequence_parallel) * tp
    computes = computes + ring * (14 + 2 * half + (14 + half) * (w.cp - 1)) + gathers * (58 + 4 * half)
    computes = computes + exchanges * 20 + copies * 8 + 24 * (1 - w.flash)
    again = w.again_rest * (computes - 3 - 6 * w.saves_products - w.saves_attention)
    forward = computes + 14 * passes[0] - 7 * once
    backward = 98 + 7 * grouped + half * np.where(sharded == 1, 8, 13) + 10 * tp + 6 * sp
    backward = backward + 13 * passes[1] + 12 * passes[2]
    backward = backward + ring * (23 + 3 * half + 26 * (w.cp - 1)) + gathers * (102 + 2 * half)
    backward = backward + exchanges * 24 + copies * 5 + 32 * (1 - w.flash)
    backward = backward + again + 25 * w.splits_backward - 17 * replicas
    ends = 36 + 10 * half + 25 * passes[2] + 46 * tp * w.loss_parallel + 28 * tp * (1 - w.loss_parallel) + 10 * sp
    ends = ends + 24 * (w.loss_chunks - 1)
    layers = w.n_layers / w.pp
    # The first stage, whose inputs need no gradient, is not cut; in a V the rank that has the output has it, too.
    ends = np.maximum(0, ends + w.splits_backward * (7 - w.folded * 25 * layers / 2))
    dtensors = 1 * (sharded + tp > 0)
    step = 20 + 15 * dtensors + layers * (27 + 45 * dtensors + 18 * w.buckets - 9 + 7 * once + 18 * replicas)
    return Operators(forward, backward, ends, step)


class Bytes(NamedTuple):
    """Read and written by all that is no product and no attention, of a microbatch on a rank."""

    forward: Number  # of a block
    again: Number  # of the same where recompute does it once more: what was gathered is gathered beside it
    backward: Number
    ends: Number  # of the output and the loss, and of the embedding


def own_bytes(w: Workload, *, tokens: Number) -> Bytes:
    """tokens: of a microbatch on a rank."""
    e, half, tp = w.element_bytes, 1 * (w.element_bytes == 2), 1 * (w.tp > 1)
    sp, sharded = tp * w.sequence_parallel, w.shards_state
    stream, resident = tokens * w.d_model, tokens * w.d_model / np.where(sp == 1, w.tp, 1)
    turned = tokens * (w.n_heads + w.n_kv_heads) * w.head_dim / w.tp  # queries and keys, rotated in float32
    hidden = tokens * w.d_ff / w.tp
    copies = tp * (4 + 4 * w.sequence_parallel) * e * stream  # around collectives
    weights, table = w.block_parameters / w.tp, w.vocab_size * w.d_model / w.tp

    once = 1 * (w.n_microbatches > 1) * (w.recomputes == 0)
    casts = half * (1 - sharded) * 6 * np.where(once == 1, 1 / w.n_microbatches, 1)  # of weights, forward
    fresh = np.where(sharded == 1, w.reduce_scatters, 1) / w.n_microbatches  # gradients that are added to none
    added = 12 * (1 - fresh) + 8 * w.buckets * fresh  # or moved into buckets
    of_weight = (
        casts + sharded * 2 * e * w.forward_gathers / w.n_microbatches,
        sharded * (2 * e * w.backward_gathers + (e + 4) * w.reduce_scatters) / w.n_microbatches
        + (1 - sharded) * 6 * half
        + added,
    )
    repeats = 8 * repeats_keys(w)
    forward = 10 * e * resident + copies + (28 + 12 * half + repeats) * turned + 5 * e * hidden
    backward = 16 * e * resident + 9 * e * stream + copies + (36 + 12 * half + repeats) * turned + 9 * e * hidden
    context = context_bytes(w, tokens=tokens)
    forward, backward = forward + context[0], backward + context[1]
    logit = np.where(tp * w.loss_parallel == 1, 48, 24) + 12 * half
    logits = tokens * w.vocab_size / np.where(w.loss_parallel == 1, w.tp, 1)
    chunked = np.where(w.loss_chunks > 1, 10 * w.loss_chunks + 12, 0)  # the gradient of the output, chunk by chunk
    ends = logit * logits + table * (tables_of(w) * sum(of_weight) + chunked + 4)
    again = forward + weights * casts
    return Bytes(forward + weights * of_weight[0], again, backward + weights * of_weight[1], ends)


def context_bytes(w: Workload, *, tokens: Number) -> tuple[Number, Number]:
    """Read and written by a block, forward and backward, that context parallelism adds: sums and copies."""
    e, half = w.element_bytes, 1 * (w.element_bytes == 2)
    ring, gathers, exchanges = _methods_of_context(w)
    queries, keys = (tokens * heads * w.head_dim / w.tp for heads in (w.n_heads, 2 * w.n_kv_heads))
    # Pieces of attention are added up in float32. In a ring the last rank has one for all its queries from each rank;
    # where keys were gathered each half of the queries has two.
    pieces = np.where(ring == 1, w.cp, 2)
    forward = (13 + 6 * half) * pieces + 12 + 4 * half
    backward = (20 - 2 * half) * pieces + 5 + 6 * half
    of_ring = 2 * e, 37 + (15 - 1.5 * half) * w.cp  # of each element of keys and values
    of_all = (2 + 5 * w.cp) * e, 14 + 3 * half + (40 - 4 * half) * w.cp  # put in order of the sequence and back
    # Heads for tokens: each tensor is copied before a message and after it.
    each_has = tokens * 2 * exchanged_key_heads(w) * w.head_dim / w.tp
    return (
        ring * (forward * queries + of_ring[0] * keys)
        + gathers * (forward * queries + of_all[0] * keys)
        + exchanges * e * (10 * queries + 8 * each_has - 4 * keys),
        ring * (backward * queries + of_ring[1] * keys)
        + gathers * (backward * queries + of_all[1] * keys)
        + exchanges * e * 8 * (queries + each_has),
    )


def _methods_of_context(w: Workload) -> tuple[Number, Number, Number]:
    """1 for the one that is used: a ring, gathered keys, heads for tokens."""
    several = 1 * (np.asarray(w.cp) > 1)
    return w.ring * several, (1 - w.ring) * (1 - w.all_to_all) * several, w.all_to_all * several


def exchanged_key_heads(w: Workload) -> Number:
    """Where heads are exchanged for tokens: keys of fewer heads than ranks are copied, so that each rank has some."""
    return np.maximum(w.n_kv_heads, w.cp * w.tp)


def repeats_keys(w: Workload) -> Number:
    """1 where keys and values are repeated for each head: transformer.repeated_for_cuda."""
    attends_whole = (np.asarray(w.cp) == 1) | (np.asarray(w.all_to_all) == 1)
    return 1 * (np.asarray(w.element_bytes) == 4) * (w.n_kv_heads < w.n_heads) * attends_whole


def tables_of(w: Workload) -> Number:
    """Matrices over the vocabulary that one rank has, at most."""
    return 2 - 1 * np.maximum(w.pp > 1, w.tied)
