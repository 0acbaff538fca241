"""Dry run: a step of one rank of any layout, at any scale, on one CPU, without weights and without the other ranks.

The recipe is assembled and stepped by the code that trains it, on fake tensors, which have a shape, a type and a
storage that takes no memory, and on a fake process group, whose collectives return at once. Bytes, collectives and
FLOPs are counted by the trackers of a measured run.
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.cuda_kernels import cuda_kernels
from parallel.engines.engine import run_step
from parallel.engines.native import NativeEngine
from parallel.kinds import distinct_ranks
from parallel.measure.accelerators import Peak
from parallel.measure.counters import Counters, Measures, fill_in
from parallel.measure.observer import Step
from parallel.measure.record import Record
from parallel.measure.taping import Taping
from parallel.mesh import build_mesh
from parallel.recipe import Recipe, RecipeError
from parallel.torch_private import fake_group
from parallel.weights import load_no_weights

CPU = torch.device("cpu")  # fake CUDA tensors need a CUDA build
COUNTED_STEP = 2  # the first makes the optimizer's state
MEMORY_NOTE = (
    "Live tensor storages of a step, with {kernels}. Not in these figures: the allocator's rounding (512 bytes a tensor"
    " on CUDA) and fragmentation, workspaces of cuBLAS and other kernels, buffers of NCCL, the CUDA context, code."
)
KERNELS = {"cpu": "a CPU's operators (train.device)", "cuda": "norms as on CUDA, and a CPU's other operators"}
EAGER_NOTE = " As eager code runs: what torch.compile fuses or computes again is not modelled."


def dry_run(recipe: Recipe, *, ranks: Sequence[int], say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The record of `recipe`, of kind "dry-run", from these ranks; those of `distinct_ranks` say everything.

    `say` gets a line as each of several ranks is done. Raises RecipeError for a rank that the recipe does not have.
    """
    return record_of(recipe, dict(measure_each(recipe, ranks, say)))


def record_of(recipe: Recipe, counted: Mapping[int, Measures]) -> dict[str, Any]:
    """The same from what `measure_each` gave, by rank."""
    record = Record.of(recipe, kind="dry-run")
    device = stands_for(recipe)
    record.environment.device, record.environment.backend = f"fake {device}", "fake"
    note = MEMORY_NOTE.format(kernels=KERNELS[device]) + (EAGER_NOTE if recipe.train.compile != "none" else "")
    peak = Peak(None, "a dry run takes no time")
    kinds = distinct_ranks(recipe)
    fill_in(record, recipe, counted, kinds=kinds, step=COUNTED_STEP, peak=peak, ceiling=None, note=note)
    record.status = "ok"
    return record.as_json()


def stands_for(recipe: Recipe) -> str:
    """The kind of device, "cpu" or "cuda", whose kernels a dry run counts: the recipe's, or this machine's for auto."""
    asked = recipe.train.device
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def measure_each(
    recipe: Recipe, ranks: Sequence[int], say: Callable[[str], None], *, taped: bool = False
) -> Iterator[tuple[int, Measures]]:
    """Each rank's, in order. In processes of their own where there are several, as many at once as there are cores.

    taped: see dry_run_rank. Raises RecipeError for a rank that the recipe does not have, and for an engine that cannot
    do without real tensors and ranks.
    """
    for rank in ranks:
        if not 0 <= rank < recipe.world_size:
            raise RecipeError("--rank", rank, f"the recipe has ranks 0 to {recipe.world_size - 1}")
    if recipe.engine.name != "native":
        raise RecipeError("engine.name", recipe.engine.name, "cannot be dry-run; only native can: set it to that")
    if len(ranks) == 1:
        yield ranks[0], dry_run_rank(recipe, rank=ranks[0], taped=taped)
        return
    pool = concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(dry_run_rank, recipe, rank=rank, taped=taped) for rank in ranks]
        for n_done, (rank, future) in enumerate(zip(ranks, futures, strict=True), start=1):
            measures = future.result()
            say(f"rank {rank}  ({n_done}/{len(ranks)})")
            yield rank, measures
    finally:  # for whoever has seen enough, no further rank is begun
        pool.shutdown(cancel_futures=True)


# ---- one rank ------------------------------------------------------------------------------------------------------


def dry_run_rank(recipe: Recipe, *, rank: int, taped: bool = False) -> Measures:
    """What `rank` of the recipe does in its second step. taped: with its tape, by which it can be priced."""
    # Fake tensors cannot be compiled: the eager model stands for the compiled one. A CPU has no cuDNN: flash keeps what
    # it keeps.
    attention = "flash" if recipe.train.attention == "cudnn" else recipe.train.attention
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile="none", attention=attention))
    # Real tensors (positions of the tokens, in context parallelism) are taken for fakes where an operator meets them.
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def load(*arguments: Any) -> None:
        with fake:  # the mesh computes with real tensors, so that the rest of `assemble` must be outside
            load_no_weights(*arguments)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        # For the first, one microbatch is enough; a pipeline takes all of them or none.
        all_of_them = number == COUNTED_STEP or recipe.parallel.pp > 1
        n_sequences = recipe.replica_batch if all_of_them else recipe.micro_batch
        tokens = torch.empty(n_sequences, recipe.train.seq_len, dtype=torch.int64)
        return tokens, torch.empty_like(tokens)

    with fake_group(rank=rank, world_size=recipe.world_size):
        engine = NativeEngine(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU, load=load)
        parameters = [parameter for _, parameter in engine.named_parameters()]
        counters = Counters(recipe, parameters, engine.optimizer, mesh=engine.mesh, device=CPU, nth=COUNTED_STEP)
        engine.observers.append(counters)
        taping = Taping(engine.mesh, nth=COUNTED_STEP)
        if taped:
            engine.observers.append(taping)
        with fake, cuda_kernels() if stands_for(recipe) == "cuda" else contextlib.nullcontext():
            for number in range(1, COUNTED_STEP + 1):
                run_step(engine, Step(number), batch)
        assert counters.measures is not None
        return counters.measures._replace(tape=tuple(taping.tape))
