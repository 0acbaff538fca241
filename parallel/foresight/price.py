"""The closed form: what each part of a step takes, in seconds of the rank that is busiest.

Roofline terms and alpha-beta messages, as in docs/foresight.md; the constants come from published runs
(constants.toml), the rates from the cluster. Everything works on numbers and on numpy arrays alike: 100,000 layouts
are one call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.foresight.workload import Number, Workload

PARTS = (
    *("products", "attention", "other_operators", "output_and_loss", "launches"),
    *("tensor_messages", "context_messages", "data_messages", "pipeline_messages"),
    *("bubble", "optimizer"),
)
COMPUTE, COMMUNICATION = PARTS[:5], PARTS[5:9]
TILE = 128 * 128  # elements of a product that one multiprocessor makes at a time
LINK_HOP_SECONDS, NETWORK_HOP_SECONDS = 2e-6, 4e-6  # of a ring, NCCL's own table (src/graph/tuning.cc, LL128)
FIXED_SECONDS = 1e-3  # of a step: reading a batch, the norm, the host


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one rank's device, its links and its software, in FLOP/s, bytes/s and seconds."""

    matmul_flops: Number  # of the largest products, in the type of the computation
    memory_bytes_per_s: Number
    wave_elements: Number  # of a product that the whole device makes at a time: multiprocessors x TILE
    node_ranks: Number  # that share fast links
    inside_bytes_per_s: Number  # bus bandwidth of large collectives in a node
    inside_seconds: Number  # what one takes before its first byte
    across_bytes_per_s: Number  # of one rank's share of its node's network
    across_seconds: Number
    attention_gain: Number  # of its fused attention over kernels of the second generation
    launch_seconds: Number  # of the host, for each kernel
    launches: Number  # kernels in a block's forward
    operator_share: Number  # bytes that pass between products, of those of eager code
    logit_bytes: Number  # that pass through memory for each logit, forward and backward
    tensor_hidden: Number  # part of tensor parallelism's messages that travels while products run
    pipeline_hidden: Number  # the same of the pipeline's
    data_hidden: Number  # the same of weights and gradients, where they overlap


Constants = Mapping[str, Number]  # by name: constants.toml says what each is


def price(w: Workload, r: Rates, k: Constants) -> dict[str, Number]:
    """Seconds of each of PARTS in a step; they add up to the step."""
    block = _block(w, r, k)
    head = _output_and_loss(w, r, k)
    link = _Links(w, r, k)
    reduced, context = _tensor_message(w, r, k, link), _context_messages(w, block, link)
    tensor = (4 + 2 * w.again_products) * reduced  # two in forward, two in backward, two where forward is done again

    # A microbatch through the busiest rank; and through the others, for which that waits once.
    layer = block.forward + block.backward + tensor + context
    layers, has_head = layers_of_busiest(w, head_in_layers=head / layer)
    busy = layers * layer + has_head * head
    others = np.maximum(w.n_layers * layer + head - busy, 0)
    weights = (w.block_parameters * layers + w.vocab_size * w.d_model * has_head) / w.tp
    local = weights / np.where(w.shards_state == 1, _shards(w), 1)

    m = w.n_microbatches
    return {
        "products": m * layers * block.products,
        "attention": m * layers * block.attention,
        "other_operators": m * layers * block.operators,
        "output_and_loss": m * has_head * head,
        "launches": m * layers * block.waits,
        "tensor_messages": m * (layers * tensor + has_head * 2 * reduced),
        "context_messages": m * layers * context,
        "data_messages": _data_messages(w, r, k, link, weights=weights, layers=layers, block=block),
        "pipeline_messages": _pipeline_messages(w, r, link),
        "bubble": others * w.bubble,
        "optimizer": 50 * local / _memory(r) + FIXED_SECONDS,  # bytes of AdamW and clipping, in float32
    }


# ---- computation ---------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Seconds of one microbatch in one block, forward and backward, with what is computed again."""

    products: Number
    attention: Number
    operators: Number
    waits: Number  # for the host
    forward: Number  # all four of forward
    backward: Number
    attention_forward: Number
    attention_backward: Number


def _block(w: Workload, r: Rates, k: Constants) -> _Block:
    tokens, memory = _tokens(w), _memory(r)
    qkv, ff = (w.n_heads + 2 * w.n_kv_heads) * w.head_dim / w.tp, w.d_ff / w.tp
    shapes = (
        (qkv, w.d_model),
        (w.d_model, w.n_heads * w.head_dim / w.tp),
        (ff * (w.n_mlp_matrices - 1), w.d_model),
        (w.d_model, ff),
    )
    casts = w.fp8 * 3 * tokens * (w.d_model * 3 + qkv + 2 * ff) / memory  # to 8 bits, as is and transposed
    products = (
        casts + sum(_product(w, r, k, tokens, n, inner) for n, inner in shapes),
        casts + sum(_gradients(w, r, k, tokens, n, inner) for n, inner in shapes),
    )
    attention = _attention(w, r, k)

    # Between products: norms, residuals, rotary positions, the gate; by bytes through memory.
    gated, resident = w.n_mlp_matrices - 2, tokens / np.where(w.sequence_parallel == 1, w.tp, 1) * w.d_model
    fused = np.where(w.compiled == 1, np.minimum(r.operator_share, 1.0), r.operator_share * k["operators"])
    share = fused * w.element_bytes / 2 / memory
    operators = (
        share * (22 * resident + tokens * ((4 + 4 * gated) * ff + 6 * qkv)),
        share * (38 * resident + tokens * ((6 + 8 * gated) * ff + 8 * qkv)),
    )

    again = (w.again_products * products[0], w.again_attention * attention[0], w.again_rest * operators[0])
    forward = products[0] + attention[0] + operators[0]
    backward = products[1] + attention[1] + operators[1] + sum(again)

    # A block takes as long as its device or its host needs, and a little more where both need about the same.
    launches = np.where(w.compiled == 1, np.minimum(r.launches, 14), r.launches) + 8 * (1 - w.flash)
    launches = launches + 12 * (w.tp > 1) + 8 * (w.cp - 1) * (1 - w.all_to_all)  # a ring's kernels, piece by piece
    host = launches * r.launch_seconds * k["launch"]
    host_backward = host * (1.6 + np.maximum(w.again_rest, w.again_products))
    waits = (forward**4 + host**4) ** 0.25 - forward, (backward**4 + host_backward**4) ** 0.25 - backward
    return _Block(
        products=products[0] + products[1] + again[0],
        attention=attention[0] + attention[1] + again[1],
        operators=operators[0] + operators[1] + again[2],
        waits=waits[0] + waits[1],
        forward=forward + waits[0],
        backward=backward + waits[1],
        attention_forward=attention[0],
        attention_backward=attention[1],
    )


def _product(w: Workload, r: Rates, k: Constants, m: Number, n: Number, inner: Number) -> Number:
    """(m, inner) x (inner, n): by FLOPs, or by bytes through memory.

    The last wave of tiles is not full, and small products have little else (arXiv:2401.14489 measures it).
    """
    by_flops = (
        2 * m * n * inner / (r.matmul_flops * k["products"]) * (1 + np.sqrt(r.wave_elements * k["wave"] / (m * n)))
    )
    return np.maximum(by_flops, w.element_bytes * (m * n + m * inner + n * inner) / _memory(r))


def _gradients(w: Workload, r: Rates, k: Constants, m: Number, n: Number, inner: Number) -> Number:
    """Of the input and of the weight of that product."""
    return _product(w, r, k, m, inner, n) + _product(w, r, k, n, inner, m)


def _attention(w: Workload, r: Rates, k: Constants) -> tuple[Number, Number]:
    """Forward and backward: two products of queries x keys, half of them behind the mask, five in backward.

    Fused: less of the rate where a sequence is short or a head narrow. Else products in full, and scores in memory.
    """
    heads = w.micro_batch * w.n_heads / w.tp
    scores = heads * w.seq_len**2 / w.cp
    flops = 2 * scores * w.head_dim
    rate = r.matmul_flops * r.attention_gain * k["attention"]
    piece = w.seq_len / np.where(w.all_to_all == 1, 1, w.cp)  # a ring takes the keys of one rank after the other
    rate = rate * piece / (piece + 512) * np.minimum(1, w.head_dim / 128) ** 0.15
    fill = 1 + np.sqrt(r.wave_elements * k["wave"] / (heads * w.seq_len * w.head_dim))
    plain = 2 * flops / (r.matmul_flops * k["products"]) * fill
    forward, backward = (n_bytes * scores * k["scores"] / _memory(r) for n_bytes in (13, 19))  # softmax, mask, dropout
    return (
        w.flash * flops / rate + (1 - w.flash) * (plain + forward),
        w.flash * 2.5 * flops / (0.8 * rate) + (1 - w.flash) * (2 * plain + backward),
    )


def _output_and_loss(w: Workload, r: Rates, k: Constants) -> Number:
    tokens, rows = _tokens(w), w.vocab_size / w.tp
    logits = tokens * np.where(w.loss_parallel == 1, rows, w.vocab_size)
    products = _product(w, r, k, tokens, rows, w.d_model) + _gradients(w, r, k, tokens, rows, w.d_model)
    return products + r.logit_bytes * logits / _memory(r)


def _tokens(w: Workload) -> Number:
    """Of a microbatch on one rank."""
    return w.micro_batch * w.seq_len / w.cp


def _memory(r: Rates) -> Number:
    return 0.8 * r.memory_bytes_per_s  # what streams reach of it


def layers_of_busiest(w: Workload, *, head_in_layers: Number) -> tuple[Number, Number]:
    """Layers of the rank that takes longest, and 1 where it has the output, too. head_in_layers: what that costs."""
    stages = w.pp * w.stages_per_rank
    least = np.floor(w.n_layers / stages)
    over = w.n_layers - least * stages  # stages with one more, just before the last: parallel.strategies.pipeline
    most = least * w.stages_per_rank + np.ceil(over / w.pp)
    last = least * w.stages_per_rank + np.floor(over / w.pp)
    ends_it = last + head_in_layers >= most
    by_cost = np.maximum((w.n_layers + head_in_layers) / w.pp - head_in_layers, 0)
    layers = np.where(w.even_stages == 1, np.where(ends_it, last, most), by_cost)
    return layers, np.where(w.even_stages == 1, ends_it, 1.0)


# ---- messages ------------------------------------------------------------------------------------------------------


def _tensor_message(w: Workload, r: Rates, k: Constants, link: "_Links") -> Number:
    """An all-reduce of a microbatch; with sequence parallelism a reduce-scatter and an all-gather, of as many bytes."""
    seconds = link.all_reduce(w.element_bytes * _tokens(w) * w.d_model, ranks=w.tp, stride=1)
    return seconds * k["tensor_messages"] * (1 - r.tensor_hidden)


def _context_messages(w: Workload, block: _Block, link: "_Links") -> Number:
    """Of a block and microbatch. A ring's travel while attention computes, but for a twentieth.

    Gradients of keys and values are added up in float32; in a ring keys and values go round once more beside them.
    """
    per_head = w.element_bytes * _tokens(w) * 2 * w.head_dim / w.tp
    gathered = link.gather(per_head * w.n_kv_heads * w.cp, ranks=w.cp, stride=w.tp, alone=w.ring)
    exchanged = link.all_to_all(per_head * (w.n_heads + w.n_kv_heads), ranks=w.cp, stride=w.tp)
    forward: Number = np.where(w.all_to_all == 1, exchanged, gathered)
    backward: Number = np.where(w.all_to_all == 1, exchanged, gathered * (w.ring + 4 / w.element_bytes))
    hides = 0.9 * w.ring * (1 - w.all_to_all)
    forward = np.maximum(forward - hides * block.attention_forward, 0.05 * forward) * (1 + w.again_attention)
    return forward + np.maximum(backward - hides * block.attention_backward, 0.05 * backward)


def _pipeline_messages(w: Workload, r: Rates, link: "_Links") -> Number:
    """Of a step: in and out of each stage of a rank, for each microbatch; and once through all ranks and back."""
    stream = w.element_bytes * _tokens(w) * w.d_model / np.where(w.sequence_parallel == 1, w.tp, 1)
    hop = link.send(stream, stride=w.dp_replicate * w.dp_shard * w.cp * w.tp)
    hops = 2 * w.stages_per_rank * w.n_microbatches + 2 * (w.pp - 1)
    return np.where(w.pp > 1, hops * hop * (1 - r.pipeline_hidden), 0)


def _shards(w: Workload) -> Number:
    return w.dp_shard * np.where(w.splits_over_cp == 1, w.cp, 1)


def _data_messages(
    w: Workload, r: Rates, k: Constants, link: "_Links", *, weights: Number, layers: Number, block: _Block
) -> Number:
    """Of a step, exposed: what does not fit into the pass beside which it travels, and a part of what would."""
    shards, calls = _shards(w), np.maximum(layers, 1)
    # With several stages a rank, other microbatches come between the last one's turns on them.
    turns = np.where(w.stages_per_rank > 1, np.minimum(w.pp, w.n_microbatches), 1)
    forward, backward = turns * layers * block.forward, turns * layers * block.backward
    hidden = r.data_hidden * k["overlap"] * w.overlaps_data

    def exposed(seconds: Number, window: Number) -> Number:
        return np.maximum(seconds - hidden * window, (1 - hidden) * seconds)

    gather = link.gather(weights * w.weight_bytes, ranks=shards, stride=w.tp, calls=calls)
    scatter = link.gather(weights * w.gradient_bytes, ranks=shards, stride=w.tp, calls=calls)
    both = w.backward_gathers > 0  # share the window of backward
    data = w.forward_gathers * exposed(gather, forward) + w.backward_gathers * exposed(gather, backward / 2)
    data = data + w.reduce_scatters * exposed(scatter, backward / (1 + both))
    sharded = w.shards_state == 1
    reduce = link.all_reduce(
        weights * w.gradient_bytes / np.where(sharded, shards, 1),
        ranks=np.where(sharded, w.dp_replicate, w.dp_replicate * w.dp_shard * w.cp),
        stride=np.where(sharded, w.dp_shard * w.cp, 1) * w.tp,
        calls=calls / 4,  # buckets hold a few blocks
    )
    return data + w.all_reduces * exposed(reduce, backward)


class _Links:
    """Seconds of messages among `ranks`, `stride` apart. In a node by its links, else by what its network lets pass."""

    def __init__(self, w: Workload, r: Rates, k: Constants) -> None:
        self._inside, self._inside_seconds = r.inside_bytes_per_s * k["inside"], r.inside_seconds
        self._across, self._across_seconds = r.across_bytes_per_s * k["across"], r.across_seconds
        self._node = r.node_ranks

    def _group(self, ranks: Number, stride: Number) -> tuple[Number, Number, Number]:
        near = np.clip(self._node / stride, 1, ranks)
        nodes = np.maximum(ranks / near, 1)
        outside = np.minimum(self._inside, self._across * near / (1 + 0.05 * np.log2(np.maximum(nodes / 2, 1))))
        return near, nodes, np.where(nodes > 1, outside, self._inside)

    def gather(self, n_bytes: Number, *, ranks: Number, stride: Number, calls: Number = 1, alone: Number = 0) -> Number:
        """An all-gather to n_bytes, or a reduce-scatter from them; in so many calls.

        alone: 1: from neighbour to neighbour, so that only one rank of a node talks to the next.
        """
        near, nodes, rate = self._group(ranks, stride)
        rate = np.where(nodes > 1, np.where(alone == 1, np.minimum(rate, self._across), rate), rate)
        start = np.where(nodes > 1, self._across_seconds, self._inside_seconds)
        hops = LINK_HOP_SECONDS * (near - 1) + NETWORK_HOP_SECONDS * (nodes - 1)
        return np.where(ranks > 1, n_bytes * (ranks - 1) / ranks / rate + calls * (start + hops), 0)

    def all_reduce(self, n_bytes: Number, *, ranks: Number, stride: Number, calls: Number = 1) -> Number:
        near, nodes, rate = self._group(ranks, stride)
        start = np.where(nodes > 1, self._across_seconds, self._inside_seconds)
        # Far away by trees, whose depth is a logarithm.
        hops = 2 * LINK_HOP_SECONDS * (near - 1) + 2 * NETWORK_HOP_SECONDS * np.log2(np.maximum(nodes, 1))
        return np.where(ranks > 1, 2 * n_bytes * (ranks - 1) / ranks / rate + calls * (start + hops), 0)

    def all_to_all(self, n_bytes: Number, *, ranks: Number, stride: Number) -> Number:
        """Of n_bytes a rank: to each its part, and to those of other nodes through this rank's own card alone."""
        near, nodes, _ = self._group(ranks, stride)
        start = np.where(nodes > 1, self._across_seconds, self._inside_seconds)
        inside, across = n_bytes * (near - 1) / ranks / self._inside, n_bytes * (ranks - near) / ranks / self._across
        return np.where(ranks > 1, 2 * start + np.maximum(inside, across), 0)  # there, and back

    def send(self, n_bytes: Number, *, stride: Number) -> Number:
        far = stride >= self._node
        return 20e-6 + n_bytes / np.where(far, self._across, self._inside / 2)
