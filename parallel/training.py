"""One rank's run: prove the layout, train, record."""

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.batches import corpus_of, refuse_different_data, rows_of_replica, token_batch
from parallel.checkpoint.files import Checkpoint, last_readable, refuse_unfit, remove_checkpoint, step_folders
from parallel.checkpoint.saving import Saver, last_whole, load
from parallel.collectives import gathered
from parallel.engines import engine_of
from parallel.engines.engine import Engine, Resumable, read_step, run_step
from parallel.measure.clock import WARM_UP_STEPS, Clock
from parallel.measure.counters import Counters, fill_in
from parallel.measure.hardware import faster_float32_matmul, float32_matmul, matmul_ceiling, peak_of_rank
from parallel.measure.journal import FiniteCheck, Journal, Progress
from parallel.measure.lives import DONE, add_save, begin_training, lived
from parallel.measure.observer import Step
from parallel.measure.record import Record, write_record
from parallel.measure.timeline import Timeline
from parallel.measure.trace import Trace
from parallel.mesh import build_mesh
from parallel.process import process_group, say
from parallel.proof import prove
from parallel.recipe import Recipe, RecipeError, refuse_missing_packages

UNREAD_STEPS = {"cpu": 0, "cuda": 1}  # a GPU works on the next step while its host reads what a step has given


def train(
    recipe: Recipe,
    *,
    out: Path,
    peak_flops: float | None = None,
    profile: bool = False,
    matmul: str | None = None,
    resume_from: Path | None = None,
    asked: Sequence[int] = (),
    told: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> dict[str, Any] | None:
    """Runs `recipe` as one rank of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Rank 0 prints a line per step, appends it to out/steps.jsonl, and writes out/record.json, which it also returns.
    peak_flops: of one rank's device, FLOP/s, where its datasheet peak is not known or not what is wanted.
    profile: each rank writes a trace of the fourth step, or of the last one before, to out/trace-rank-<r>.json.gz.
    matmul: torch's precision of float32 products on a CPU; None: the faster one that is exact to 1e-6.
    resume_from: the folder of a run, whose last whole checkpoint this one goes on from; `out`: the same run goes on.
    asked: signals that ask for the end, as they come; a run with checkpoints saves itself then, and raises Stopped.
    told: is called on rank 0 with each line of steps.jsonl.
    Raises RecipeError for what only the host can tell: no such device, no such data; and Diverged.
    """
    with process_group(recipe) as (device, unused):
        if device.type != "cpu" or recipe.train.dtype != "float32":
            matmul = "highest"
        elif matmul is None:
            before = last_readable(out) if resume_from == out else None  # the same run stays exactly the same
            found = before.float32_matmul if before else _faster_float32_matmul(recipe) if dist.get_rank() == 0 else ""
            matmul = gathered(found)[0]
        with float32_matmul(matmul):
            return train_in_group(
                recipe,
                out=out,
                device=device,
                peak_flops=peak_flops,
                profile=profile,
                resume_from=resume_from,
                asked=asked,
                told=told,
                note=unused,
            )


def train_in_group(
    recipe: Recipe,
    *,
    out: Path,
    device: torch.device,
    peak_flops: float | None = None,
    profile: bool = False,
    first_step: int = 1,
    resume_from: Path | None = None,
    asked: Sequence[int] = (),
    told: Callable[[Mapping[str, Any]], None] = lambda row: None,
    note: str | None = None,
) -> dict[str, Any] | None:
    """The same, where the process group is there. Tokens are those of steps first_step, first_step + 1, ...

    note: what a reader must know of the device.
    """
    refuse_missing_packages(recipe)
    corpus = corpus_of(recipe)
    refuse_different_data(recipe, corpus)
    mesh = build_mesh(recipe, device.type)
    rows = rows_of_replica(recipe, mesh)
    record = Record.of(recipe)
    record.environment.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if device.type == "cuda":
        record.environment.device_memory_bytes = torch.cuda.get_device_properties(device).total_memory
    record.environment.backend = dist.get_backend()
    record.environment.data = corpus.description
    record.environment.note = note
    if device.type == "cpu" and recipe.train.dtype == "float32":
        record.environment.float32_matmul = torch.get_float32_matmul_precision()
    names = gathered(socket.gethostname())
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    hosts = record.environment.hosts = [numbers[name] for name in names]
    if note:
        say(f"warning: {note}")
    say(f"{recipe.name}: {dist.get_world_size()} ranks on {device.type} with {dist.get_backend()}")
    say(f"data: {corpus.description}")
    checkpoint = None
    if resume_from is not None:
        checkpoint = _checkpoint_of(recipe, resume_from, same_run=resume_from == out, data=corpus.description)
    parity_seconds = 0.0
    if recipe.train.parity:
        start = time.perf_counter()
        record.parity = prove(recipe, corpus=corpus, mesh=mesh, device=device)
        parity_seconds = time.perf_counter() - start
    ceiling = _ceiling(recipe, device)
    local_ranks = hosts.count(hosts[dist.get_rank()])
    peak_of = partial(peak_of_rank, device, recipe.train.dtype, local_ranks=local_ranks, given_flops=peak_flops)

    engine = engine_of(recipe, mesh=mesh, device=device)
    record.environment.engine = engine.name
    parameters = [parameter for _, parameter in engine.named_parameters()]
    if checkpoint is not None:
        assert isinstance(engine, Resumable)
        engine.load_state(partial(load, checkpoint))
        first_step = checkpoint.step + 1
        say(f"resumed from step {checkpoint.step} of {checkpoint.recipe['name']}")
    if dist.get_rank() == 0:
        _begin_life(recipe, out, checkpoint, same_run=resume_from == out, parity_seconds=parity_seconds)
    clock = Clock(recipe, device)
    counters = Counters(
        recipe,
        parameters,
        engine.optimizer,
        mesh=mesh,
        device=device,
        hosts=hosts,
        nth=engine.settled_step,
        holds=engine.holds,
    )
    traced = min(first_step + WARM_UP_STEPS, recipe.train.steps)
    engine.observers += [
        FiniteCheck(skips=recipe.train.non_finite == "skip"),
        Progress(recipe, peak=peak_of(matmul_ceiling_flops=ceiling).flops, counters=counters),
        Journal(out / "steps.jsonl", first_step=first_step, told=told),
        *([Trace(out, device, mesh=mesh, number=traced, clock=clock)] if profile else []),
        Timeline(recipe, device, mesh=mesh, clock=clock, waits_in_python=engine.waits_in_python),
        clock,
        counters,
    ]
    saver = None
    if recipe.checkpoint.every:
        assert isinstance(engine, Resumable)
        matmul = record.environment.float32_matmul
        about = {"recipe": recipe.resolved(), "data": corpus.description, "float32_matmul": matmul}
        saver = Saver(recipe, engine.state, run=out, about=about, clock=clock, device=device, asked=asked)
        if dist.get_rank() == 0:
            saver.saved = partial(add_save, out)
        saver.refuse_to_begin()
    _run_steps(
        engine,
        range(first_step, recipe.train.steps + 1),
        lambda number: token_batch(corpus, recipe, number - 1, rows, device),
        unread=UNREAD_STEPS[device.type],
        saver=saver,
    )
    for observer in engine.observers:
        observer.report(record)
    if saver is not None:
        saver.report(record)

    if device.type == "cpu":  # whatever else runs on the machine can only slow a product down
        ceiling = max(ceiling, _ceiling(recipe, device))
    peak = peak_of(matmul_ceiling_flops=ceiling)
    counted = {rank: measures for rank, measures in enumerate(gathered(counters.measures)) if measures is not None}
    each = dict.fromkeys(range(recipe.world_size), 1)
    hidden = None if recipe.train.compile == "none" else "compiled code makes tensors where no tracker sees them"
    fill_in(record, recipe, counted, kinds=each, step=counters.number, peak=peak, ceiling=ceiling, note=hidden)
    if record.flops.peak_flops != peak.flops:
        say(f"flops: {record.flops.peak_source}")
    record.status = "ok"
    if dist.get_rank() != 0:
        return None
    record.checkpoint.lives, record.goodput = lived(out, DONE)
    write_record(out / "record.json", record.as_json())
    return record.as_json()


def _run_steps(
    engine: Engine,
    numbers: range,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    unread: int,
    saver: Saver | None,
) -> None:
    """unread: steps whose results are still to be read when the next one is run."""
    running: deque[Step] = deque()

    def read(leaving: int = 0) -> None:
        while len(running) > leaving:
            read_step(engine, running.popleft())

    with saver or contextlib.nullcontext():
        for number in numbers:
            running.append(Step(number))
            run_step(engine, running[-1], batch)
            read(leaving=unread)
            if saver is not None:
                saver.after(number, read)
        read()


def _checkpoint_of(recipe: Recipe, run: Path, *, same_run: bool, data: str) -> Checkpoint | None:
    """The one that this run goes on from; None where the same run has none yet. Raises RecipeError. Collective."""
    checkpoint = last_whole(run)
    if checkpoint is None:
        if not same_run:
            raise RecipeError("--resume-from", str(run), "holds no checkpoint; give the folder of a run that has one")
        say("there is no checkpoint yet: from the first step on")
        return None
    ended = not same_run or (run / "record.json").exists()  # who started this has removed that of a life that failed
    refuse_unfit(recipe, checkpoint, resume=same_run, ended=ended)
    if same_run and checkpoint.data not in (None, data):
        remedy = f"now gives other tokens ({data}) than before ({checkpoint.data}); --resume needs the same"
        raise RecipeError("data.source", recipe.data.source, remedy)
    return checkpoint


def _begin_life(
    recipe: Recipe, out: Path, checkpoint: Checkpoint | None, *, same_run: bool, parity_seconds: float
) -> None:
    first_step, resumed_from = 1, None
    if checkpoint is not None:
        first_step = checkpoint.step + 1
        resumed_from = {"name": checkpoint.recipe["name"], "step": checkpoint.step}
    if same_run:
        for folder in step_folders(out):  # of steps that are trained again
            if checkpoint is None or int(folder.name[5:]) > checkpoint.step:
                remove_checkpoint(folder)
    layout = vars(recipe.parallel)
    begin_training(
        out,
        first_step=first_step,
        layout=layout,
        resumed_from=resumed_from,
        same_run=same_run,
        parity_seconds=parity_seconds,
    )


def _faster_float32_matmul(recipe: Recipe) -> str:
    """For the attention of one of the recipe's ranks."""
    model, parallel = recipe.model, recipe.parallel
    heads, seq_len = max(1, model.n_heads // parallel.tp), recipe.train.seq_len // parallel.cp
    return faster_float32_matmul(heads=heads, seq_len=seq_len, head_dim=model.head_dim)


def _ceiling(recipe: Recipe, device: torch.device) -> float:
    """FLOP/s of the fastest matrix product, measured by rank 0 while the others wait."""
    dtype = getattr(torch, recipe.train.dtype)
    return gathered(matmul_ceiling(device, dtype) if dist.get_rank() == 0 else 0.0)[0]
