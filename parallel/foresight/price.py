"""The closed form: what each part of a step takes, in seconds of the rank that is busiest.

Roofline terms and alpha-beta messages, as in docs/foresight.md; the constants come from published runs
(constants.toml), the rates from the cluster. Everything works on numbers and on numpy arrays alike: 100,000 layouts
are one call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.foresight.operators import (
    Operators,
    context_bytes,
    exchanged_key_heads,
    own_bytes,
    own_operators,
    tables_of,
)
from parallel.foresight.workload import Number, Workload

PARTS = (
    *("products", "attention", "other_operators", "output_and_loss", "launches"),
    *("tensor_messages", "context_messages", "data_messages", "pipeline_messages"),
    *("bubble", "optimizer"),
)
COMPUTE, COMMUNICATION = PARTS[:5], PARTS[5:9]
TILE = 128 * 128  # elements of a product that one multiprocessor makes at a time
LINK_HOP_SECONDS = 2e-6  # of a ring within a node, NCCL's own table (src/graph/tuning.cc, LL128)
RING_HIDDEN = 0.95  # of a ring's messages, while attention computes
FUSED = 0.7  # of the bytes between products, where residual and norm are one kernel, activation and gate another
STREAMS = 0.8  # of a memory's bandwidth, that reading and writing in order reaches
BACKWARD_LAUNCHES = 1.6  # of a block's backward, in those of its forward, in programs that are not the lab's own
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
    inside_ranks: Number = 0  # among how many, where that grows with them, as on CPUs; 0: where it does not
    across_bytes_per_s: Number  # of one rank's share of its node's network
    across_seconds: Number
    across_hop_seconds: Number = 4e-6  # of each step of a ring that spans nodes, and of each level of a tree
    attention_gain: Number  # of its fused attention over kernels of the second generation
    attention_tokens: Number = 512  # of a sequence at which that reaches half its rate
    launch_seconds: Number  # of the host, for each kernel
    launches: Number  # kernels in a block's forward
    tensor_launches: Number = 12  # more of them with tp
    late_seconds: Number = 0  # of a block's host, each way and for each rank of tp, where a pipeline goes over nodes
    operator_share: Number  # bytes that pass between products, of those of eager code
    logit_bytes: Number  # that pass through memory for each logit, forward and backward
    tensor_hidden: Number  # part of tensor parallelism's messages that travels while products run
    pipeline_hidden: Number  # the same of the pipeline's
    pipeline_split: Number = 0  # 1: each rank of tp sends its part of it to the next stage, where all gather it
    data_hidden: Number  # the same of weights and gradients, where they overlap
    buckets_per_byte: Number = 0  # of gradients, where data ranks keep all of them; 0: all at once
    # Of other messages than all-reduces: seconds a byte, and of an empty one, beside those of an all-reduce.
    gather_bytes: Number = 1.0
    gather_start: Number = 1.0
    scatter_bytes: Number = 1.0
    scatter_start: Number = 1.0
    exchange_bytes: Number = 1.0  # all-to-all
    exchange_start: Number = 1.0
    send_bytes: Number = 2.0  # from rank to rank, one way
    send_seconds: Number = 20e-6
    # A CPU launches what it computes itself: nothing hides behind anything, and what a strategy does in Python counts.
    synchronous: Number = 0
    gather_launches: Number = 0  # of FSDP, for each message of weights or gradients
    stage_launches: Number = 0  # of a pipeline, for each microbatch that a stage takes forward or backward


Constants = Mapping[str, Number]  # by name: constants.toml says what each is


def price(w: Workload, r: Rates, k: Constants, *, mean: bool = False) -> dict[str, Number]:
    """Seconds of each of PARTS in a step; they add up to the step.

    mean: of the mean over ranks, in place of the busiest one: what all of them do, over how many they are.
    """
    link = Links(r, k)
    attention, own = _attention(w, r, k), own_operators(w)
    messages = _block_messages(w, r, k, link, attention)
    block, head = _block(w, r, k, messages, attention, own), _output_and_loss(w, r, k)
    host = w.own * r.launch_seconds * k["launch"]  # of each operator; with another program all are those of blocks
    # The host that is ahead when the output is computed is so in backward, too.
    layers = w.n_layers / w.pp
    backward = layers * (block.backward - block.backward_waits + messages.tensor_backward + messages.context_backward)
    after_head = _waits(r, head + backward, host * (own.ends + layers * own.backward))
    head_waits = np.where(w.own == 1, after_head - layers * block.backward_waits, 0)

    # A microbatch through the busiest rank; and through the others, for which that waits once.
    layer = block.forward + block.backward + sum(messages)
    end = head + head_waits
    layers, has_head = layers_of_busiest(w, head_in_layers=end / layer)
    if mean:
        layers, has_head = w.n_layers / w.pp, 1 / w.pp
    busy = layers * layer + has_head * end
    others = np.maximum(w.n_layers * layer + end - busy, 0)
    tables = has_head * np.where(w.own == 1, tables_of(w), 1)
    weights = (w.block_parameters * layers + w.vocab_size * w.d_model * tables) / w.tp
    # Bytes of AdamW and clipping, in float32.
    optimizer = 50 * weights / np.where(w.shards_state == 1, _shards(w), 1) / memory_rate(r)

    # What a CPU alone notices: the work of strategies, and two small messages of a loss and of a step.
    work_of_host = r.synchronous * _strategy_launches(w, r, k, groups=layers + 2 * has_head)
    loss = r.synchronous * 2 * link.all_reduce(0.0, ranks=w.tp, stride=1)
    step = r.synchronous * 2 * link.all_reduce(0.0, ranks=w.world_size, stride=1)

    m = w.n_microbatches
    return {
        "products": m * layers * block.products,
        "attention": m * layers * block.attention,
        "other_operators": m * layers * block.operators,
        "output_and_loss": m * has_head * head,
        "launches": m * (layers * block.waits + has_head * head_waits)
        + _waits(r, optimizer, host * own.step)
        + work_of_host,
        "tensor_messages": m
        * (layers * (messages.tensor_forward + messages.tensor_backward) + has_head * (messages.tensor_forward + loss)),
        "context_messages": m * layers * (messages.context_forward + messages.context_backward),
        "data_messages": _data_messages(w, r, k, link, weights=weights, layers=layers, has_head=has_head, block=block),
        "pipeline_messages": _pipeline_messages(w, r, link, mean=mean),
        "bubble": others * w.bubble,
        "optimizer": optimizer + FIXED_SECONDS + step,
    }


# ---- computation ---------------------------------------------------------------------------------------------------


class _Messages(NamedTuple):
    """Seconds of one microbatch in one block that its messages add to it."""

    tensor_forward: Number
    tensor_backward: Number
    context_forward: Number
    context_backward: Number


class _Block(NamedTuple):
    """Seconds of one microbatch in one block, forward and backward, with what is computed again."""

    products: Number
    attention: Number
    operators: Number
    waits: Number  # for the host
    backward_waits: Number
    forward: Number  # all four of forward
    backward: Number


def _block(
    w: Workload, r: Rates, k: Constants, messages: _Messages, attention: tuple[Number, Number], counted: Operators
) -> _Block:
    tokens, memory = _tokens(w), memory_rate(r)
    qkv, ff = (w.n_heads + 2 * w.n_kv_heads) * w.head_dim / w.tp, w.d_ff / w.tp
    shapes = (
        (qkv, w.d_model),
        (w.d_model, w.n_heads * w.head_dim / w.tp),
        (ff * (w.n_mlp_matrices - 1), w.d_model),
        (w.d_model, ff),
    )
    casts = w.fp8 * 3 * tokens * (w.d_model * 3 + qkv + 2 * ff) / memory  # to 8 bits, as is and transposed
    products = (
        casts + sum(_forward(w, r, k, tokens, n, inner) for n, inner in shapes),
        casts + sum(_gradients(w, r, k, tokens, n, inner) for n, inner in shapes),
    )

    # Between products: norms, residuals, rotary positions, the gate; by bytes through memory.
    gated, resident = w.n_mlp_matrices - 2, tokens / np.where(w.sequence_parallel == 1, w.tp, 1) * w.d_model
    share, own = operator_share(r, k, compiled=w.compiled) / memory, own_bytes(w, tokens=tokens)
    half = w.element_bytes / 2
    forward = half * (22 * resident + tokens * ((4 + 4 * gated) * ff + 6 * qkv))
    backward = half * (38 * resident + tokens * ((6 + 8 * gated) * ff + 8 * qkv))
    operators = [
        share * np.where(w.own == 1, mine, theirs)
        for mine, theirs in ((own.forward, forward), (own.backward, backward), (own.again, forward))
    ]

    again = (w.again_products * products[0], w.again_attention * attention[0], w.again_rest * operators[2])
    forward = products[0] + attention[0] + operators[0]
    backward = products[1] + attention[1] + operators[1] + sum(again)

    launches = np.where(w.compiled == 1, np.minimum(r.launches, 14), r.launches) + 8 * (1 - w.flash)
    launches = launches + r.tensor_launches * (w.tp > 1)
    launches = launches + 8 * (w.cp - 1) * (1 - w.all_to_all)  # a ring's kernels, piece by piece
    back = launches * (BACKWARD_LAUNCHES + np.maximum(w.again_rest, w.again_products))
    host = r.launch_seconds * k["launch"]
    # Ranks of tp wait for the latest of them.
    late = r.late_seconds * w.tp * ((w.pp > 1) & (w.world_size > r.node_ranks))
    # While a message travels the host goes on.
    beside = messages.tensor_forward + messages.context_forward, messages.tensor_backward + messages.context_backward
    waits = (
        _waits(r, forward + beside[0], host * np.where(w.own == 1, counted.forward, launches) + late),
        _waits(r, backward + beside[1], host * np.where(w.own == 1, counted.backward, back) + late),
    )
    return _Block(
        products=products[0] + products[1] + again[0],
        attention=attention[0] + attention[1] + again[1],
        operators=operators[0] + operators[1] + again[2],
        waits=waits[0] + waits[1],
        backward_waits=waits[1],
        forward=forward + waits[0],
        backward=backward + waits[1],
    )


def _waits(r: Rates, device: Number, host: Number) -> Number:
    """By how much longer: as long as device or host needs, and a little more where both need about the same."""
    return np.where(r.synchronous == 1, host, (device**4 + host**4) ** 0.25 - device)


def _strategy_launches(w: Workload, r: Rates, k: Constants, *, groups: Number) -> Number:
    """Of a step: what FSDP and a pipeline take of the host around each message and each action.

    groups: of parameters that FSDP sends together.
    """
    fetched = (w.forward_gathers + w.backward_gathers + w.reduce_scatters) * groups * r.gather_launches
    acted = np.where(w.pp > 1, 2 * w.n_microbatches * w.stages_per_rank * r.stage_launches, 0)
    return (fetched + acted) * r.launch_seconds * k["launch"]


def operator_share(r: Rates, k: Constants, *, compiled: Number) -> Number:
    """Bytes between products that pass through memory, of those that operators read and write."""
    return np.where(compiled == 1, np.minimum(r.operator_share, FUSED), r.operator_share) * k["operators"]


def product(
    r: Rates, k: Constants, m: Number, n: Number, inner: Number, *, element_bytes: Number, matrices: Number = 1
) -> Number:
    """(m, inner) x (inner, n), and so many at once: by FLOPs, or by bytes through memory.

    The last wave of tiles is not full, and small products have little else (arXiv:2401.14489 measures it).
    """
    fill = 1 + np.sqrt(r.wave_elements * k["wave"] / (matrices * m * n))
    by_flops = 2 * matrices * m * n * inner / (r.matmul_flops * k["products"]) * fill
    return np.maximum(by_flops, matrices * element_bytes * (m * n + m * inner + n * inner) / memory_rate(r))


def _forward(w: Workload, r: Rates, k: Constants, m: Number, n: Number, inner: Number) -> Number:
    return product(r, k, m, n, inner, element_bytes=w.element_bytes)


def _gradients(w: Workload, r: Rates, k: Constants, m: Number, n: Number, inner: Number) -> Number:
    """Of the input and of the weight of that product."""
    return _forward(w, r, k, m, inner, n) + _forward(w, r, k, n, inner, m)


def fused_attention(
    r: Rates, k: Constants, pairs: Number, *, head_dim: Number, piece: Number, backward: bool = False
) -> Number:
    """Of so many pairs of a query and a key that it sees: two products forward, five in backward.

    Less of the rate where what it is given at a time, `piece` tokens, is short, or a head is narrow.
    """
    rate = r.matmul_flops * r.attention_gain * k["attention"]
    rate = rate * piece / (piece + r.attention_tokens) * np.minimum(1, head_dim / 128) ** 0.15
    forward = 4 * pairs * head_dim / rate
    return 2.5 * forward / 0.8 if backward else forward


def _attention(w: Workload, r: Rates, k: Constants) -> tuple[Number, Number]:
    """Forward and backward. Fused: of half the pairs, for the rest is masked. Else products in full, and scores."""
    heads = w.micro_batch * w.n_heads / w.tp
    scores = heads * w.seq_len**2 / w.cp
    piece = w.seq_len / np.where(w.ring * (1 - w.all_to_all) == 1, w.cp, 1)  # it takes the keys of one rank at a time
    fused = [
        fused_attention(r, k, scores / 2, head_dim=w.head_dim, piece=piece, backward=back) for back in (False, True)
    ]
    fill = 1 + np.sqrt(r.wave_elements * k["wave"] / (heads * w.seq_len * w.head_dim))
    plain = 4 * scores * w.head_dim / (r.matmul_flops * k["products"]) * fill
    # Softmax, mask and dropout.
    forward, backward = (n_bytes * scores * k["scores"] / memory_rate(r) for n_bytes in (13, 19))
    return (
        w.flash * fused[0] + (1 - w.flash) * (plain + forward),
        w.flash * fused[1] + (1 - w.flash) * (2 * plain + backward),
    )


def _output_and_loss(w: Workload, r: Rates, k: Constants) -> Number:
    tokens, rows = _tokens(w), w.vocab_size / w.tp
    logits = tokens * np.where(w.loss_parallel == 1, rows, w.vocab_size)
    products = _forward(w, r, k, tokens, rows, w.d_model) + _gradients(w, r, k, tokens, rows, w.d_model)
    own = operator_share(r, k, compiled=0) * own_bytes(w, tokens=tokens).ends
    return products + np.where(w.own == 1, own, r.logit_bytes * logits) / memory_rate(r)


def _tokens(w: Workload) -> Number:
    """Of a microbatch on one rank."""
    return w.micro_batch * w.seq_len / w.cp


def memory_rate(r: Rates) -> Number:
    return STREAMS * r.memory_bytes_per_s


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


def _block_messages(w: Workload, r: Rates, k: Constants, link: "Links", attention: tuple[Number, Number]) -> _Messages:
    """Of tp: two all-reduces in forward and two in backward; with sequence parallelism, a reduce-scatter and an
    all-gather for each, of as many bytes, and all-reduces of the gradients of norms.

    Of cp: a ring's messages travel while attention computes. Gradients of keys and values are added up in float32; in a
    ring keys and values go round once more beside them.

    On a CPU nothing hides; tokens, which are no outermost dim, are copied around messages; and keys and their
    gradients, which go round a ring at once, wake a neighbour once.
    """
    n_bytes, sp = w.element_bytes * _tokens(w) * w.d_model, w.sequence_parallel
    among = {"ranks": w.tp, "stride": 1}
    copies = r.synchronous * (w.tp > 1) * 4 * n_bytes / memory_rate(r) * operator_share(r, k, compiled=0)
    whole, halves = link.all_reduce(n_bytes, **among), link.gather(n_bytes, **among) + link.scatter(n_bytes, **among)
    seconds = k["tensor_messages"] * (1 - r.tensor_hidden)
    both = 2 * seconds * np.where(sp == 1, halves + copies, whole)
    norms = np.maximum(w.own, r.synchronous) * 2 * seconds * sp * link.all_reduce(w.element_bytes * w.d_model, **among)

    per_head = w.element_bytes * _tokens(w) * 2 * w.head_dim / w.tp
    keys, among = per_head * w.n_kv_heads, {"ranks": w.cp, "stride": w.tp}
    key_heads = np.where(np.maximum(w.own, r.synchronous) == 1, exchanged_key_heads(w), w.n_kv_heads)
    exchanged = link.all_to_all(per_head * (w.n_heads + key_heads) / 2, **among, calls=2)
    gathered, passed = link.gather(keys * w.cp, **among), link.pass_on(keys, **among)
    scattered = link.scatter(keys * w.cp * 4 / w.element_bytes, **among)
    hidden = RING_HIDDEN * (1 - r.synchronous)
    sums = keys * 4 / w.element_bytes
    passed_back = np.where(r.synchronous == 1, link.pass_on(keys + sums, **among), passed + link.pass_on(sums, **among))
    merged = [
        r.synchronous * operator_share(r, k, compiled=0) * n / memory_rate(r)
        for n in context_bytes(w, tokens=_tokens(w))
    ]

    def context(gathered: Number, passed: Number, attention: Number) -> Number:
        around = np.maximum(w.cp - 1, 0) * passed
        around = np.maximum(around - hidden * attention, (1 - hidden) * around)
        return np.where(w.all_to_all == 1, exchanged, np.where(w.ring == 1, around, gathered))

    forward = context(gathered, passed, attention[0]) + merged[0]
    return _Messages(
        tensor_forward=both,
        tensor_backward=both * (1 + w.again_products) + norms,
        context_forward=forward,
        context_backward=context(scattered, passed_back, attention[1]) + merged[1] + forward * w.again_attention,
    )


def _pipeline_messages(w: Workload, r: Rates, link: "Links", *, mean: bool) -> Number:
    """Of a step: in and out of each stage of a rank, for each microbatch; and once through all ranks and back.

    mean: each message once, though both of its ends know of it.
    """
    hops = 2 * w.stages_per_rank * w.n_microbatches + 2 * (w.pp - 1)
    if mean:
        hops = 2 * w.n_microbatches * (w.stages_per_rank - 1 / w.pp)
    return np.where(w.pp > 1, hops * hop_seconds(w, r, link), 0)


def hop_seconds(w: Workload, r: Rates, link: "Links") -> Number:
    """Of a microbatch from one stage of the pipeline to the next, as far as it does not travel unseen."""
    stream, split = w.element_bytes * _tokens(w) * w.d_model, np.maximum(w.sequence_parallel, r.pipeline_split)
    sent = link.send(stream / np.where(split == 1, w.tp, 1), stride=w.dp_replicate * w.dp_shard * w.cp * w.tp)
    # Narayanan et al. 2021 (arXiv:2104.04473), 4.1.
    gathered = np.where(split > w.sequence_parallel, link.gather(stream, ranks=w.tp, stride=1), 0)
    return (sent + gathered) * (1 - r.pipeline_hidden)


def _shards(w: Workload) -> Number:
    return w.dp_shard * np.where(w.splits_over_cp == 1, w.cp, 1)


def _data_messages(
    w: Workload,
    r: Rates,
    k: Constants,
    link: "Links",
    *,
    weights: Number,
    layers: Number,
    has_head: Number,
    block: _Block,
) -> Number:
    """Of a step, exposed: what does not fit into the pass beside which it travels, and a part of what would."""
    shards, calls = _shards(w), np.maximum(layers + r.synchronous * 2 * has_head, 1)
    # With several stages a rank, other microbatches come between the last one's turns on them.
    turns = np.where(w.stages_per_rank > 1, np.minimum(w.pp, w.n_microbatches), 1)
    forward, backward = turns * layers * block.forward, turns * layers * block.backward
    hidden = r.data_hidden * k["overlap"] * w.overlaps_data * (1 - r.synchronous)

    def exposed(seconds: Number, window: Number) -> Number:
        return np.maximum(seconds - hidden * window, (1 - hidden) * seconds)

    gather = link.gather(weights * w.weight_bytes, ranks=shards, stride=w.tp, calls=calls)
    scatter = link.scatter(weights * w.gradient_bytes, ranks=shards, stride=w.tp, calls=calls)
    both = w.backward_gathers > 0  # share the window of backward
    data = w.forward_gathers * exposed(gather, forward) + w.backward_gathers * exposed(gather, backward / 2)
    # In a pipeline the lab's program reduces a stage's gradients when it is done with it, and waits.
    waits = w.own * (w.pp > 1) == 1
    data = data + w.reduce_scatters * np.where(waits, scatter, exposed(scatter, backward / (1 + both)))
    sharded = w.shards_state == 1
    gradients = weights * w.gradient_bytes
    # A bucket has one matrix at least, of seven of a block.
    buckets = np.minimum(gradients / np.maximum(w.bucket_bytes, 1), 7 * calls)
    reduce = link.all_reduce(
        gradients / np.where(sharded, shards, 1),
        ranks=np.where(sharded, w.dp_replicate, w.dp_replicate * w.dp_shard * w.cp),
        stride=np.where(sharded, w.dp_shard * w.cp, 1) * w.tp,
        calls=np.where(
            sharded,
            calls / np.where(r.synchronous == 1, 1, 4),
            np.maximum(1, np.where(w.bucket_bytes > 0, buckets, gradients * r.buckets_per_byte)),
        ),
    )
    return data + w.all_reduces * exposed(reduce, backward)


class Links:
    """Seconds of messages among `ranks`, `stride` apart. In a node by its links, else by what its network lets pass."""

    def __init__(self, r: Rates, k: Constants) -> None:
        self._inside, self._across = r.inside_bytes_per_s * k["inside"], r.across_bytes_per_s * k["across"]
        self._node, self._r = r.node_ranks, r

    def _group(self, ranks: Number, stride: Number) -> tuple[Number, Number, Number]:
        near = np.clip(self._node / stride, 1, ranks)
        nodes = np.maximum(ranks / near, 1)
        outside = np.minimum(self._inside, self._across * near / (1 + 0.05 * np.log2(np.maximum(nodes / 2, 1))))
        return near, nodes, np.where(nodes > 1, outside, self._inside)

    def _start(self, ranks: Number, nodes: Number) -> Number:
        r = self._r
        more = np.where(r.inside_ranks > 0, ranks / np.maximum(r.inside_ranks, 1), 1)
        return np.where(nodes > 1, r.across_seconds, r.inside_seconds * more)

    def gather(self, n_bytes: Number, *, ranks: Number, stride: Number, calls: Number = 1) -> Number:
        """An all-gather to n_bytes, in so many calls."""
        return self._once_round(
            self._r.gather_bytes * n_bytes, self._r.gather_start, ranks=ranks, stride=stride, calls=calls
        )

    def scatter(self, n_bytes: Number, *, ranks: Number, stride: Number, calls: Number = 1) -> Number:
        """A reduce-scatter from n_bytes, in so many calls."""
        return self._once_round(
            self._r.scatter_bytes * n_bytes, self._r.scatter_start, ranks=ranks, stride=stride, calls=calls
        )

    def _once_round(self, n_bytes: Number, starts: Number, *, ranks: Number, stride: Number, calls: Number) -> Number:
        _, nodes, rate = self._group(ranks, stride)
        start = starts * self._start(ranks, nodes)
        # At each step all ranks pass something on: it takes as long as the slowest of their links.
        hops = np.where(nodes > 1, self._r.across_hop_seconds, LINK_HOP_SECONDS) * (ranks - 1)
        return np.where(ranks > 1, n_bytes * (ranks - 1) / ranks / rate + calls * (start + hops), 0)

    def all_reduce(self, n_bytes: Number, *, ranks: Number, stride: Number, calls: Number = 1) -> Number:
        near, nodes, rate = self._group(ranks, stride)
        start = self._start(ranks, nodes)
        # Far away by trees, whose depth is a logarithm.
        deep = np.log2(np.maximum(nodes, 1))
        hops = 2 * LINK_HOP_SECONDS * (near - 1) + 2 * self._r.across_hop_seconds * deep
        return np.where(ranks > 1, 2 * n_bytes * (ranks - 1) / ranks / rate + calls * (start + hops), 0)

    def all_to_all(self, n_bytes: Number, *, ranks: Number, stride: Number, calls: Number = 1) -> Number:
        """Of n_bytes a rank, so many times: to each its part; to those of other nodes by this rank's own card alone."""
        near, nodes, _ = self._group(ranks, stride)
        start = self._start(ranks, nodes)
        inside, across = n_bytes * (near - 1) / ranks / self._inside, n_bytes * (ranks - near) / ranks / self._across
        each = self._r.exchange_start * start + self._r.exchange_bytes * np.maximum(inside, across)
        return np.where(ranks > 1, calls * each, 0)

    def pass_on(self, n_bytes: Number, *, ranks: Number, stride: Number) -> Number:
        """From each to the next, in a ring: where nodes meet, one rank alone talks to the next."""
        _, nodes, rate = self._group(ranks, stride)
        rate = np.where(nodes > 1, np.minimum(rate, self._across), rate)
        start = self._start(ranks, nodes)
        seconds = n_bytes / rate + start + LINK_HOP_SECONDS
        seconds = np.where(self._r.synchronous == 1, self.send(n_bytes, stride=stride), seconds)
        return np.where(ranks > 1, seconds, 0)

    def send(self, n_bytes: Number, *, stride: Number) -> Number:
        far = stride >= self._node
        return self._r.send_seconds + n_bytes / np.where(far, self._across, self._inside / self._r.send_bytes)
