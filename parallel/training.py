"""One rank's run: prove the layout, train, record."""

import collections
import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.assemble import DTYPES, Assembled, assemble
from parallel.collectives import gathered
from parallel.corpus import Corpus, open_corpus
from parallel.measure.clock import WARM_UP_STEPS, Clock, spread
from parallel.measure.flops import flops_section
from parallel.measure.hardware import Peak, matmul_ceiling, peak_of_rank
from parallel.measure.memory import memory_section
from parallel.measure.parity import TOLERANCE, compare_with_reference, parity_recipe, reference_gradients
from parallel.measure.record import new_record, write_record
from parallel.measure.timeline import Timeline, mean_parts, parts_of_trace, traced_step
from parallel.mesh import build_mesh
from parallel.process import choose_device, process_group
from parallel.recipe import Recipe, RecipeError
from parallel.step import (
    MEASURED_STEP,
    Measures,
    largest_traffic,
    make_optimizer,
    measured_step,
    observed,
    pipeline_section,
    train_step,
)


def train(
    recipe: Recipe, *, out: Path, peak_flops: float | None = None, profile: bool = False
) -> dict[str, Any] | None:
    """Runs `recipe` as one rank of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Rank 0 prints a line per step, appends it to out/steps.jsonl, and writes out/record.json, which it also returns.
    peak_flops: of one rank's device, FLOP/s, where its datasheet peak is not known or not what is wanted.
    profile: each rank writes a trace of step 4, or of the last one before, to out/trace-rank-<r>.json.gz.
    Raises RecipeError for what only the host can tell: no such device, no such data.
    """
    device = choose_device(recipe)
    with process_group(device, timeout_seconds=recipe.train.time_limit_seconds):
        return _train(recipe, out=out, device=device, given_peak_flops=peak_flops, profile=profile)


def _train(
    recipe: Recipe, *, out: Path, device: torch.device, given_peak_flops: float | None = None, profile: bool = False
) -> dict[str, Any] | None:
    corpus = _open(recipe)
    _refuse_different_data(recipe, corpus)
    mesh = build_mesh(recipe, device.type)
    record = new_record(recipe)
    record["environment"] |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": dist.get_backend(),
        "data": corpus.description,
    }
    _say(f"{recipe.name}: {dist.get_world_size()} ranks on {device.type} with {dist.get_backend()}")
    _say(f"data: {corpus.description}")
    if recipe.train.parity:
        record["parity"] = prove(recipe, mesh=mesh, device=device)

    ceiling = _ceiling(recipe, device)
    model = assemble(recipe, mesh=mesh, device=device)
    trace = out / f"trace-rank-{dist.get_rank()}.json.gz" if profile else None
    done = _steps(model, corpus, device=device, out=out, trace=trace)
    timed = [step for step in range(recipe.train.steps) if step not in done.left_out]
    times = done.timeline.sections(mesh, steps=timed)
    if trace is not None and device.type == "cuda":
        times["step_parts"] = mean_parts(gathered(parts_of_trace(trace)))
    record["steps"] = done.rows
    record["throughput"] = _throughput(recipe, done, timed) | {
        "step_parts": times.pop("step_parts"),
        "steps_timed": len(timed),
        "steps_left_out": dict(collections.Counter(done.left_out.values())),
    }
    if device.type == "cpu":  # whatever else runs on the machine can only slow a product down
        ceiling = max(ceiling, _ceiling(recipe, device))
    peak = peak_of_rank(
        device,
        recipe.train.dtype,
        matmul_ceiling_flops=ceiling,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", recipe.world_size)),
        given_flops=given_peak_flops,
    )
    record |= _counted(recipe, done.measures, record["throughput"]["step_seconds"]["median"], peak, ceiling)
    record["pipeline"] |= times
    record["status"] = "ok"
    if dist.get_rank() != 0:
        return None
    write_record(out / "record.json", record)
    return record


class _Steps(NamedTuple):
    """What came of the steps of a run, on this rank."""

    rows: list[dict[str, Any]]  # of the record
    cpu_seconds: list[float]
    measures: Measures | None
    timeline: Timeline
    left_out: dict[int, str]  # of the timing: why, by index, for all ranks


def _steps(model: Assembled, corpus: Corpus, *, device: torch.device, out: Path, trace: Path | None) -> _Steps:
    """Trains; one step is traced to the file `trace`, if there is one: the first that is no warm-up, or the last."""
    recipe, optimizer = model.recipe, make_optimizer(model)
    rows = rows_of_replica(recipe, model.mesh)
    n_warm_up = min(WARM_UP_STEPS, recipe.train.steps)
    traced = min(WARM_UP_STEPS, recipe.train.steps - 1) if trace else None
    left_out = dict.fromkeys(range(n_warm_up), "warm-up") | ({} if traced is None else {traced: "profile"})
    done = _Steps([], [], None, Timeline(recipe, device), left_out)
    clock = Clock(device)
    with done.timeline as timeline, observed(model, timeline.around):
        for step in range(recipe.train.steps):
            batch = token_batch(corpus, recipe, step, rows, device)
            n_graphs = _n_compiled_graphs(recipe)
            timeline.begin()
            name = f"step {step + 1}"
            with traced_step(trace, device, name=name) if trace and step == traced else contextlib.nullcontext():
                if step == MEASURED_STEP:
                    loss, norm, measures = measured_step(model, optimizer, *batch)
                    done = done._replace(measures=measures)
                else:
                    loss, norm = train_step(model, optimizer, *batch)
            if step == traced:
                dist.barrier()  # the next step shall not wait for whoever still writes
                _say(f"{name}: traces in {out}/trace-rank-*.json.gz, for ui.perfetto.dev")
            seconds, cpu = clock.lap()
            timeline.end(step=step, seconds=seconds)
            if _n_compiled_graphs(recipe) > n_graphs:
                left_out.setdefault(step, "compile")
            done.cpu_seconds.append(cpu)
            done.rows.append({"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "seconds": seconds})
            _report_step(recipe, done.rows[-1], out)
    for of_rank in gathered(left_out):  # when one rank compiles, all wait
        left_out |= of_rank
    return done


def prove(recipe: Recipe, *, mesh: DeviceMesh, device: torch.device) -> dict[str, Any] | None:
    """The `parity` section of the record, on rank 0: step 1 of this layout against one process, in float64."""
    proof, reference_is = parity_recipe(recipe)
    _say(f"parity: float64 gradients of step 1 against {reference_is}")
    corpus = _open(proof)
    reference = None
    if dist.get_rank() == 0:
        reference = reference_gradients(proof, *token_batch(corpus, proof, 0, range(proof.train.global_batch), device))
    model = assemble(proof, mesh=mesh, device=device)
    model.zero_gradients()
    loss = model.forward_backward(*token_batch(corpus, proof, 0, rows_of_replica(proof, mesh), device)).item()
    differences = compare_with_reference(model.named_parameters(), loss, reference, device=device)
    if differences is None:
        return None
    passed = differences["max_rel_grad_diff"] <= TOLERANCE
    verdict = "passed" if passed else "FAILED"
    _say(f"parity: {verdict}, largest relative gradient difference {differences['max_rel_grad_diff']:.1e}")
    return {"reference": reference_is, "dtype": "float64", **differences, "passed": passed}


def _open(recipe: Recipe) -> Corpus:
    return open_corpus(
        recipe.data, seq_len=recipe.train.seq_len, vocab_size=recipe.model.vocab_size, seed=recipe.train.seed
    )


def _refuse_different_data(recipe: Recipe, corpus: Corpus) -> None:
    """Hosts may hold different files, or different Pythons, under one name."""
    seen = gathered(corpus.description)
    for rank, description in enumerate(seen):
        if description != seen[0]:
            raise RecipeError(
                "data.source",
                recipe.data.source,
                f"rank {rank} reads other data ({description}) than rank 0 ({seen[0]}); give all hosts the same",
            )


def rows_of_replica(recipe: Recipe, mesh: DeviceMesh) -> range:
    """The rows of the global batch that this rank's replica trains on; its ranks (pp, cp, tp) all read the same."""
    replica = mesh.get_local_rank("dp_replicate") * recipe.parallel.dp_shard + mesh.get_local_rank("dp_shard")
    return range(replica * recipe.replica_batch, (replica + 1) * recipe.replica_batch)


def token_batch(corpus: Corpus, recipe: Recipe, step: int, rows: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets of some rows of a step's global batch: int64 (len(rows), seq_len) on `device`."""
    sequences = corpus.sequences(step=step, global_batch=recipe.train.global_batch, rows=rows)
    tokens = torch.from_numpy(sequences).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _throughput(recipe: Recipe, done: _Steps, timed: list[int]) -> dict[str, Any]:
    cpu_seconds = sum(gathered(sum(done.cpu_seconds[step] for step in timed)))
    seconds = spread([done.rows[step]["seconds"] for step in timed])
    tokens = recipe.train.global_batch * recipe.train.seq_len
    per_second = tokens / seconds["median"] if seconds["median"] else None
    return {
        "tokens_per_s": per_second,
        "tokens_per_s_per_rank": per_second / recipe.world_size if per_second else None,
        "step_seconds": seconds,
        "cpu_seconds_per_step": cpu_seconds / len(timed) if timed else None,
    }


def _n_compiled_graphs(recipe: Recipe) -> int:
    if recipe.train.compile == "none":
        return 0
    from torch._dynamo.utils import counters  # takes a second to import

    return counters["stats"]["unique_graphs"]


def _counted(
    recipe: Recipe, measures: Measures | None, step_seconds: float | None, peak: Peak, ceiling: float
) -> dict[str, Any]:
    """The sections flops, memory, traffic and pipeline, from what each rank counted in the measured step."""
    counted = gathered(measures)
    section = functools.partial(
        flops_section,
        recipe,
        hardware_flops_per_step=sum(rank.flops for rank in counted) if measures else None,
        step_seconds=step_seconds,
        matmul_ceiling_flops=ceiling,
    )
    try:
        sections: dict[str, Any] = {"flops": section(peak=peak)}
    except ValueError as error:  # more ran than the peak allows: then no share of it is worth a number
        _say(f"flops: {error}")
        sections = {"flops": section(peak=Peak(None, str(error)))}
    if measures:
        per_rank = [{"rank": rank, **theirs.memory} for rank, theirs in enumerate(counted)]
        note = None if recipe.train.compile == "none" else "compiled code makes tensors where no tracker sees them"
        sections["memory"] = memory_section(per_rank, step=MEASURED_STEP + 1, note=note)
        sections["pipeline"] = pipeline_section((theirs.actions for theirs in counted), n_stages=recipe.n_stages)
        sections["traffic"] = largest_traffic([rank.traffic for rank in counted])
    return sections


def _ceiling(recipe: Recipe, device: torch.device) -> float:
    """FLOP/s of the fastest matrix product, measured by rank 0 while the others wait."""
    measured = [matmul_ceiling(device, DTYPES[recipe.train.dtype]) if dist.get_rank() == 0 else 0.0]
    dist.broadcast_object_list(measured, src=0, device=device)
    return measured[0]


def _report_step(recipe: Recipe, step: dict[str, Any], out: Path) -> None:
    if dist.get_rank() == 0:
        with (out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(step) + "\n")
        width = len(str(recipe.train.steps))
        _say(
            f"step {step['step']:{width}}/{recipe.train.steps}  loss {step['loss']:.4f}"
            f"  grad_norm {step['grad_norm']:.4f}  {step['seconds']:.3f} s"
        )


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, file=sys.stdout, flush=True)
