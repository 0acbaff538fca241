"""What a step computes, keeps and sends, in numbers from which its time follows: of one layout, or of many at once.

Every field is a number, or a numpy array with one for each of many layouts; a formula that is right for a number is
right for an array. `of_recipe` reads them from a recipe. Runs of other systems are described by the same fields.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.recipe import (
    MESH_DIMS,
    SINGLE_STAGE_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    Recipe,
    Recompute,
)

Number = Any  # a float, or an array of them


@dataclass(frozen=True, kw_only=True)
class Workload:
    # the model
    n_layers: Number
    d_model: Number
    n_heads: Number
    n_kv_heads: Number
    head_dim: Number
    d_ff: Number
    n_mlp_matrices: Number = 3  # gate, up and down; 2 without a gate
    vocab_size: Number
    tied: Number = 0  # 1: one matrix is embedding and output
    seq_len: Number
    # the layout
    pp: Number = 1
    dp_replicate: Number = 1
    dp_shard: Number = 1
    cp: Number = 1
    tp: Number = 1
    stages_per_rank: Number = 1
    micro_batch: Number
    n_microbatches: Number
    sequence_parallel: Number = 1
    even_stages: Number = 1  # 1: as many layers on each stage as can be; 0: less where the output is, by its cost
    # the pipeline's idle time, in (pp - 1) microbatches through one rank: 1 for 1f1b, 1/v interleaved, less if split
    bubble: Number = 1.0
    # messages of weights and gradients, in passes over a rank's weights in a step
    shards_state: Number = 0  # 1: optimizer state and gradients over the data ranks; 0: whole on each rank
    forward_gathers: Number = 0
    backward_gathers: Number = 0
    reduce_scatters: Number = 0
    all_reduces: Number = 0  # over all data ranks; over replicas where gradients are scattered first
    weight_bytes: Number = 2  # of an element that travels
    gradient_bytes: Number = 4
    overlaps_data: Number = 1  # 1: those messages travel while the rank computes
    splits_over_cp: Number = 1  # 1: shards are also over context ranks
    ring: Number = 1  # 1: keys and values travel while attention computes; 0: before it
    all_to_all: Number = 0  # 1: heads for tokens (Ulysses)
    # what is computed again in backward, in forwards of a block
    again_products: Number = 0
    again_attention: Number = 0
    again_rest: Number = 0
    # what is kept for backward
    in_flight: Number = 1  # microbatches of which the first rank of a pipeline keeps the activations
    keeps_all: Number = 0  # 1: every rank of the pipeline keeps those of all
    recomputes: Number = 0  # share of the blocks that keep their input alone, and what follows
    saves_products: Number = 0
    saves_attention: Number = 0
    folded: Number = 0  # 1: the first rank of the pipeline has its last stage, too
    block_group: Number = 1  # blocks that are computed again at once
    # numbers
    element_bytes: Number = 2  # of activations
    fp8: Number = 0  # 1: products in 8 bits, with casts around them
    flash: Number = 1  # 0: scores are written to memory; between: it is not known which
    compiled: Number = 0  # 1: what lies between products is fused
    loss_chunks: Number = 1
    loss_parallel: Number = 1
    # the program
    own: Number = 0  # 1: the lab's own, operator by operator; 0: as most are, by what their software says
    buckets: Number = 0  # 1: gradients are added up in buckets
    bucket_bytes: Number = 0  # of those that are summed over ranks at once; 0: as the software has it
    splits_backward: Number = 0  # share of the microbatches: into that of the input and that of the weights

    @property
    def tokens(self) -> Number:
        """Of a step, over all ranks."""
        return self.seq_len * self.micro_batch * self.n_microbatches * self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> Number:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def block_parameters(self) -> Number:
        attention = 2 * (self.n_heads + self.n_kv_heads) * self.head_dim * self.d_model
        return attention + self.n_mlp_matrices * self.d_model * self.d_ff

    @property
    def model_flops_per_token(self) -> Number:
        """As parallel.measure.model_flops counts them, for blocks without a gate too: attention in full."""
        weights = self.n_layers * self.block_parameters + self.vocab_size * self.d_model
        return 6 * weights + 12 * self.n_layers * self.n_heads * self.head_dim * self.seq_len


def of_recipe(recipe: Recipe) -> Workload:
    """One layout: every field a plain number."""
    model, train = recipe.model, recipe.train
    element_bytes = {"float32": 4, "bfloat16": 2, "float64": 8}[train.dtype]
    work = Workload(
        **{key: getattr(model, key) for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")},
        vocab_size=model.vocab_size,
        tied=int(model.tied_embeddings),
        seq_len=train.seq_len,
        micro_batch=1,
        n_microbatches=1,
        weight_bytes=element_bytes,
        gradient_bytes=max(4, element_bytes),
        element_bytes=element_bytes,
        flash=int(train.attention != "math"),
        own=int(train.compile == "none"),
        compiled=int(train.compile == "inductor"),
        loss_chunks=train.loss_chunks,
        loss_parallel=int(recipe.tensor.loss_parallel),
        sequence_parallel=int(recipe.tensor.sequence_parallel),
        bucket_bytes=recipe.ddp.bucket_mib * 2**20,
    )
    recompute, schedule = recipe.recompute, recipe.pipeline.schedule
    return laid_out(
        work,
        parallel={dim: getattr(recipe.parallel, dim) for dim in MESH_DIMS},
        micro_batch=recipe.replica_batch / recipe.n_microbatches,  # the last may be short
        n_microbatches=recipe.n_microbatches,
        stages_per_rank=recipe.stages_per_rank,
        schedule=schedule,
        keeps_weights=int(not recipe.sharding.reshard_after_forward),
        overlaps_ddp=int(recipe.ddp.overlap),
        method=recipe.context.method,
        recompute=recompute,
    )


def laid_out(
    work: Workload,
    *,
    parallel: Mapping[str, Number],
    micro_batch: Number,
    n_microbatches: Number,
    stages_per_rank: Number,
    schedule: str,
    keeps_weights: Number,
    overlaps_ddp: Number,
    method: str,
    recompute: Recompute,
) -> Workload:
    """`work` in a layout, or in many that have the schedule, the method and the recompute in common.

    parallel: ranks by mesh dimension. keeps_weights: 1: FSDP keeps what it gathered until backward.
    """
    pp, m = parallel["pp"], n_microbatches
    sharded, piped, several = 1 * (parallel["dp_shard"] > 1), 1 * (pp > 1), 1 * (parallel["dp_replicate"] > 1)
    data = 1 * (parallel["dp_replicate"] * parallel["dp_shard"] * parallel["cp"] > 1)
    once = piped * keeps_weights  # FSDP gathers in each microbatch; in a pipeline that keeps its weights, once
    products, attention, rest = recomputed(recompute, work, layers=work.n_layers / (pp * stages_per_rank))
    return dataclasses.replace(
        work,
        **parallel,
        micro_batch=micro_batch,
        n_microbatches=m,
        stages_per_rank=stages_per_rank,
        bubble=bubble(schedule, pp=pp, stages_per_rank=stages_per_rank, m=m),
        shards_state=sharded,
        forward_gathers=sharded * (once + (1 - once) * m),
        backward_gathers=sharded * (1 - keeps_weights) * m,
        reduce_scatters=sharded * (piped + (1 - piped) * m),  # a pipeline reduces at its end
        all_reduces=data * (1 - sharded + sharded * several),
        overlaps_data=sharded + (1 - sharded) * overlaps_ddp,
        ring=int(method == "ring"),
        all_to_all=int(method == "ulysses"),
        again_products=products,
        again_attention=attention,
        again_rest=rest,
        in_flight=in_flight(schedule, pp=pp, stages_per_rank=stages_per_rank, m=m),
        keeps_all=piped * (schedule in ("gpipe", "looped-bfs")),
        recomputes=rest,
        saves_products=int(recompute.mode == "selective" and "matmul" in recompute.save),
        saves_attention=int(recompute.mode == "selective" and "attention" in recompute.save),
        block_group=np.sqrt(work.n_layers / (pp * stages_per_rank)) if recompute.mode == "sqrt" else 1,
        folded=piped * (schedule in V_SCHEDULES),
        buckets=data * (1 - sharded),
        splits_backward=piped * _split_share(schedule, pp=pp, m=m),
    )


def recomputed(recompute: Recompute, work: Workload, *, layers: Number) -> tuple[Number, Number, Number]:
    """Of a block's forward, what backward computes again: of products, attention, the rest. docs/measures.md.

    layers: of a stage.
    """
    last = work.d_model * work.d_ff / work.block_parameters  # mlp.down, whose result nobody needs
    if recompute.mode == "none":
        return 0.0, 0.0, 0.0
    if recompute.mode == "selective":
        saved = recompute.save
        return (0.0 if "matmul" in saved else 1 - last), float("attention" not in saved), 1.0
    if recompute.mode == "sqrt":
        return 1.0, 1.0, 1.0
    per_stage = np.ceil(layers)
    share = np.ceil(per_stage / recompute.every) / per_stage  # blocks 0, n, 2n, ... of each stage
    return share * (1 - last), share, share


def bubble(schedule: str, *, pp: Number, stages_per_rank: Number, m: Number) -> Number:
    """Idle time of a rank, in (pp - 1) times a microbatch's forward and backward on that rank.

    1f1b and GPipe fill and drain through pp - 1 ranks, v stages a rank through 1/v of each (arXiv:2104.04473). With
    backward cut in two, thirds of it remain: arXiv:2401.10241, table 2, and the orders of torch, simulated in tests.
    With fewer microbatches than ranks some of that is lost: the only one of a step goes through all ranks in turn.
    """
    if schedule in SINGLE_STAGE_SCHEDULES:
        return 1.0
    split = schedule in SPLIT_BACKWARD_SCHEDULES
    alone, many = (2 / 3 if split else 1.0), 1.0 / ((3 if split else 1) * stages_per_rank)
    each = 1 / 3 if schedule in V_SCHEDULES else alone - many  # what pp - 1 microbatches more save
    return np.maximum(many, alone - each * (m - 1) / np.maximum(pp - 1, 1))


def _split_share(schedule: str, *, pp: Number, m: Number) -> Number:
    """Of the microbatches, those whose backward is cut in two: dualpipev cuts those with which it fills its bubbles."""
    if schedule == "dualpipev":
        return np.minimum(1, pp / (1.5 * m))
    return int(schedule in SPLIT_BACKWARD_SCHEDULES)


def in_flight(schedule: str, *, pp: Number, stages_per_rank: Number, m: Number) -> Number:
    """Microbatches, each through all layers of the rank, whose activations the first rank holds. docs/strategies.md."""
    of: dict[str, Number] = {
        "1f1b": pp,
        "interleaved-1f1b": pp + (pp - 1) / stages_per_rank,
        "interleaved-zero-bubble": pp + 0.5,
        "zbv": pp,
        "dualpipev": pp + 0.5,
    }
    most: Number = of.get(schedule, m)
    return np.where(np.asarray(pp) > 1, np.minimum(most, m), 1.0)[()]


def stacked(workloads: Sequence[Workload]) -> Workload:
    """Many as one, of arrays."""
    fields = [field.name for field in dataclasses.fields(Workload)]
    return Workload(**{name: np.array([getattr(w, name) for w in workloads], dtype=float) for name in fields})
