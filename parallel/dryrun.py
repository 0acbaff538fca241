"""Dry run: a step of one rank of any layout, at any scale, on one CPU, without weights and without the other ranks.

The recipe is assembled and stepped by the code that trains it, on fake tensors, which have a shape, a type and a
storage that takes no memory, and on a fake process group, whose collectives return at once. Bytes, collectives and
FLOPs are counted by the trackers of a measured run.

    record = dry_run(load_recipe("recipes/large/llama3-8b-fsdp.toml"), ranks=[0])
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # teaches fake tensors the collectives
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.distributed.pipelining.schedules as schedules
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.assemble import assemble, load_no_weights
from parallel.measure.flops import flops_section
from parallel.measure.hardware import Peak
from parallel.measure.memory import memory_section
from parallel.measure.record import new_record
from parallel.mesh import build_mesh, part_of
from parallel.recipe import Recipe, RecipeError, recipe_from_tables
from parallel.step import (
    MEASURED_STEP,
    Measures,
    largest_traffic,
    make_optimizer,
    measured_step,
    pipeline_section,
    train_step,
)
from parallel.strategies.pipeline import stages_of_rank

CPU = torch.device("cpu")  # fake CUDA tensors need a CUDA build
MEMORY_NOTE = (
    "Live tensor storages of a step, with the CPU's operators. Not in these figures: the allocator's rounding (512"
    " bytes a tensor on CUDA) and fragmentation, workspaces of cuBLAS and other kernels, buffers of NCCL, the CUDA"
    " context, code. CUDA kernels may fuse, or keep, other intermediate results than those of the CPU."
)
EAGER_NOTE = " As eager code runs: what torch.compile fuses or computes again is not modelled."


def dry_run(recipe: Recipe, *, ranks: Sequence[int], say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The record of `recipe`, of kind "dry-run", for these ranks. See `distinct_ranks` for which say everything.

    `say` gets a line as each of several ranks is done. memory has a row for each of `ranks`; its maximum and minimum,
    and hardware FLOPs, which are sums over all ranks, are null where `ranks` leave a kind of rank out. traffic: of each
    kind of message, the rank that sends most.
    Raises RecipeError for a rank that the recipe does not have.
    """
    for rank in ranks:
        if not 0 <= rank < recipe.world_size:
            raise RecipeError("--rank", rank, f"the recipe has ranks 0 to {recipe.world_size - 1}")
    measured = dict(_measure_each(recipe, ranks, say))
    kinds = distinct_ranks(recipe)
    complete = kinds.keys() <= measured.keys()
    per_rank = [{"rank": rank, **measures.memory} for rank, measures in measured.items()]
    note = MEMORY_NOTE + (EAGER_NOTE if recipe.train.compile != "none" else "")
    memory = memory_section(per_rank, step=MEASURED_STEP + 1, note=note)
    if not complete:
        memory |= {"max_peak_bytes": None, "min_peak_bytes": None}
    flops = flops_section(
        recipe,
        hardware_flops_per_step=sum(n * measured[rank].flops for rank, n in kinds.items()) if complete else None,
        step_seconds=None,
        peak=Peak(None, "a dry run takes no time"),
        matmul_ceiling_flops=None,
    )
    record = new_record(recipe, kind="dry-run")
    record["environment"] |= {"device": "fake cpu", "backend": "fake"}
    traffic = largest_traffic([measures.traffic for measures in measured.values()])
    pipeline = pipeline_section((measures.actions for measures in measured.values()), n_stages=recipe.n_stages)
    return record | {"status": "ok", "memory": memory, "flops": flops, "traffic": traffic, "pipeline": pipeline}


def _measure_each(recipe: Recipe, ranks: Sequence[int], say: Callable[[str], None]) -> Iterator[tuple[int, Measures]]:
    """Each rank's, in order. In processes of their own where there are several, as many at once as there are cores."""
    if len(ranks) == 1:
        yield ranks[0], dry_run_rank(recipe, rank=ranks[0])
        return
    workers = min(len(ranks), os.cpu_count() or 1)
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(dry_run_rank, recipe, rank=rank) for rank in ranks]
        for n_done, (rank, future) in enumerate(zip(ranks, futures, strict=True), start=1):
            measures = future.result()
            say(f"rank {rank}  ({n_done}/{len(ranks)})")
            yield rank, measures
    finally:  # for whoever has seen enough, no further rank is begun
        pool.shutdown(cancel_futures=True)


# ---- one rank ------------------------------------------------------------------------------------------------------


def dry_run_rank(recipe: Recipe, *, rank: int) -> Measures:
    """What `rank` of the recipe does in its second step: the first creates the optimizer's state."""
    # Fake tensors cannot be compiled: the eager model stands for the compiled one. A CPU has no cuDNN: flash keeps what
    # it keeps.
    attention = "flash" if recipe.train.attention == "cudnn" else recipe.train.attention
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile="none", attention=attention))
    # Real tensors (positions of the tokens, in context parallelism) are taken for fakes where an operator meets them.
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def load(*arguments: Any) -> None:
        with fake:  # the mesh computes with real tensors, so that the rest of `assemble` must be outside
            load_no_weights(*arguments)

    with _fake_group(rank=rank, world_size=recipe.world_size), _lazy_chunks(), _static_stages(), _messages_hold():
        model = assemble(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU, load=load)
        with fake:
            optimizer = make_optimizer(model)
            tokens = torch.empty(recipe.replica_batch, recipe.train.seq_len, dtype=torch.int64)
            targets = torch.empty_like(tokens)
            # For the first, one microbatch is enough; a pipeline takes all of them or none.
            first = slice(None if recipe.parallel.pp > 1 else recipe.micro_batch)
            train_step(model, optimizer, tokens[first], targets[first])
            *_, measures = measured_step(model, optimizer, tokens, targets)
            return measures


# ---- what torch needs to believe it --------------------------------------------------------------------------------


@contextlib.contextmanager
def _fake_group(*, rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor's caches remember meshes, and the next dry run's would get this one's dead groups.
        debug._clear_sharding_prop_cache()


class _Chunks:
    """torch.chunk as a list that makes only the chunks it is asked for; those past the end are empty."""

    def __init__(self, tensor: Tensor, n_chunks: int, dim: int) -> None:
        self.tensor, self.n_chunks, self.dim = tensor, n_chunks, dim

    def __getitem__(self, i: int) -> Tensor:
        part = part_of(self.tensor.shape[self.dim], self.n_chunks, i)
        return self.tensor.narrow(self.dim, part.start, len(part)) if part else self.tensor.new_empty(0)


def _lazy_chunks() -> contextlib.AbstractContextManager[Any]:
    """FSDP cuts each parameter in as many tensors as there are ranks, and takes one: minutes at 16,384 ranks."""
    return mock.patch.object(fsdp_param, "_chunk_with_empty", _Chunks)


@contextlib.contextmanager
def _static_stages() -> Iterator[None]:
    """From torch 2.12 on stages vote on whether they know their shapes (ours do), and read the result from a tensor."""
    if not hasattr(schedules._PipelineSchedule, "_warmup_p2p"):
        yield
        return
    from torch.distributed.pipelining._utils import InferenceMode

    def elect(_schedule: Any, stages: list[Any], *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    with mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", elect):
        yield


class _Held:
    """Stands among the works of a batch of messages, and keeps their tensors alive as long as real works do."""

    def __init__(self, messages: Sequence[dist.P2POp]) -> None:
        self.tensors = [message.tensor for message in messages]

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _messages_hold() -> Iterator[None]:
    """A real message keeps its tensor until its work is forgotten; the fake group's are done, and keep nothing."""

    def holding(send: Any) -> Any:
        def sent(messages: list[dist.P2POp], *arguments: Any, **options: Any) -> list[Any]:
            return [*send(messages, *arguments, **options), _Held(messages)]

        return sent

    with (
        mock.patch.object(dist, "batch_isend_irecv", holding(dist.batch_isend_irecv)),
        mock.patch.object(schedules, "_batch_p2p", holding(schedules._batch_p2p)),
    ):
        yield


# ---- does it fit ---------------------------------------------------------------------------------------------------

REMEDIES = {
    "parameters": "more of dp_shard, tp or pp",
    "gradients": "more of dp_shard, tp or pp",
    "optimizer": "more of dp_shard, tp or pp",
    "activations": "a smaller train.micro_batch, recompute.mode, or more of tp or cp",
    "other": "sharding.reshard_after_forward, a smaller sharding.prefetch, or more of tp or pp",
}


def refuse_too_large(recipe: Recipe, *, memory_bytes: int, given: str, say: Callable[[str], None]) -> dict[str, int]:
    """The memory of the rank that needs most: {rank, peak_bytes, parameters_bytes, ...}, from a dry run of each kind.

    given: what the user wrote for memory_bytes. Raises RecipeError for the first rank for which it is not enough.
    """
    fullest: dict[str, int] = {"peak_bytes": 0}
    for rank, measures in _measure_each(recipe, list(distinct_ranks(recipe)), say):
        memory = measures.memory
        if memory["peak_bytes"] > memory_bytes:
            parts = sorted(REMEDIES, key=lambda part: -memory[f"{part}_bytes"])
            split = ", ".join(f"{part} {memory[f'{part}_bytes'] / 2**30:.3g}" for part in parts)
            raise RecipeError(
                "--memory",
                given,
                f"rank {rank} of {recipe.name} needs {memory['peak_bytes'] / 2**30:.4g} GiB ({split}), and an"
                f" allocator takes some more; for {parts[0]} take {REMEDIES[parts[0]]}",
            )
        if memory["peak_bytes"] > fullest["peak_bytes"]:
            fullest = {"rank": rank, **memory}
    return fullest


# ---- which ranks ---------------------------------------------------------------------------------------------------


def scaled(recipe: Recipe, world_size: int) -> Recipe:
    """`recipe` on `world_size` ranks: dp_shard (dp_replicate where that is 1) changes, and global_batch with it.

    Every rank keeps its microbatches. Raises RecipeError where the other dimensions do not divide `world_size`.
    """
    dim = "dp_shard" if recipe.parallel.dp_shard > 1 else "dp_replicate"
    before = getattr(recipe.parallel, dim)
    others = recipe.world_size // before
    if world_size < 1 or world_size % others:
        raise RecipeError("--world-size", world_size, f"only {dim} is scaled; give a multiple of the rest, {others}")
    after = world_size // others
    tables = recipe.resolved()
    tables["parallel"][dim] = after
    tables["train"]["global_batch"] = recipe.train.global_batch // before * after
    return recipe_from_tables(tables)


def distinct_ranks(recipe: Recipe) -> dict[int, int]:
    """The first rank of each kind, and how many are of that kind. Ranks of a kind have equal figures.

    A kind is a rank of the pipeline; the sizes of this rank's parts where rows do not divide; and, for context
    parallelism by ring or all-gather, the first, the last or another place in the sequence. There, all ranks compute
    the same number of FLOPs, and the first and the last have the extremes of memory.
    """
    model, parallel = recipe.model, recipe.parallel
    split_by_tp = {model.d_ff, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim}
    rows = {model.d_model} | {n // parallel.tp for n in split_by_tp}  # of this rank's matrices, before FSDP
    n_shards = parallel.dp_shard * parallel.cp
    counts: dict[tuple[Any, ...], list[int]] = {}
    for pp in range(parallel.pp):
        stages = stages_of_rank(
            pp=parallel.pp,
            pp_rank=pp,
            stages_per_rank=recipe.stages_per_rank,
            schedule=recipe.pipeline.schedule,
        )
        has_vocabulary = 0 in stages or recipe.n_stages - 1 in stages
        for shard, cp, tp in itertools.product(range(parallel.dp_shard), range(parallel.cp), range(parallel.tp)):
            vocabulary = {len(part_of(model.vocab_size, parallel.tp, tp))} if has_vocabulary else set()
            parts = [part_of(n, n_shards, shard * parallel.cp + cp) for n in sorted(rows | vocabulary)]
            shapes = tuple(map(len, parts)) if parallel.dp_shard > 1 else ()
            place = (cp > 0) + (cp == parallel.cp - 1 > 0) if recipe.context.method != "ulysses" else 0
            rank = ((pp * parallel.dp_replicate * parallel.dp_shard + shard) * parallel.cp + cp) * parallel.tp + tp
            first_and_count = counts.setdefault((pp, place, *vocabulary, shapes), [rank, 0])
            first_and_count[1] += parallel.dp_replicate
    return {first: count for first, count in counts.values()}
