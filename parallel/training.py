"""One rank's run: prove the layout, train, record."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.assemble import assemble
from parallel.corpus import Corpus, open_corpus
from parallel.measure.clock import WARM_UP_STEPS, Clock, spread, steady
from parallel.measure.parity import TOLERANCE, compare_with_reference, parity_recipe, reference_gradients
from parallel.measure.record import new_record, write_record
from parallel.mesh import build_mesh
from parallel.process import choose_device, process_group
from parallel.recipe import Recipe, RecipeError


def train(recipe: Recipe, *, out: Path) -> dict[str, Any] | None:
    """Runs `recipe` as one rank of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Rank 0 prints a line per step, appends it to out/steps.jsonl, and writes out/record.json, which it also returns.
    Raises RecipeError for what only the host can tell: no such device, no such data.
    """
    device = choose_device(recipe)
    with process_group(device, timeout_seconds=recipe.train.time_limit_seconds):
        return _train(recipe, out=out, device=device)


def _train(recipe: Recipe, *, out: Path, device: torch.device) -> dict[str, Any] | None:
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

    model = assemble(recipe, mesh=mesh, device=device)
    optimizer = torch.optim.AdamW(
        [parameter for _, parameter in model.named_parameters()],
        lr=recipe.train.learning_rate,
        weight_decay=recipe.train.weight_decay,
        fused=recipe.train.adamw == "fused",
        foreach=recipe.train.adamw == "foreach",
    )
    rows = rows_of_replica(recipe, mesh)
    steps: list[dict[str, Any]] = []
    cpu_seconds: list[float] = []
    clock = Clock(device)
    for step in range(recipe.train.steps):
        model.zero_gradients()
        loss = model.forward_backward(*token_batch(corpus, recipe, step, rows, device))
        norm = model.gradient_norm()
        if recipe.train.grad_clip:
            model.clip_gradients(norm=norm, largest=recipe.train.grad_clip)
        optimizer.step()
        seconds, cpu = clock.lap()
        cpu_seconds.append(cpu)
        steps.append({"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "seconds": seconds})
        _report_step(recipe, steps[-1], out)

    record["steps"] = steps
    record["throughput"] = _throughput(recipe, steps, cpu_seconds)
    record["status"] = "ok"
    if dist.get_rank() != 0:
        return None
    write_record(out / "record.json", record)
    return record


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
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, corpus.description)
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


def _throughput(recipe: Recipe, steps: list[dict[str, Any]], cpu_seconds: list[float]) -> dict[str, Any]:
    all_cpu_seconds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_cpu_seconds, sum(steady(cpu_seconds)))
    seconds = spread(steady([step["seconds"] for step in steps]))
    n_steady = max(0, len(steps) - WARM_UP_STEPS)
    tokens = recipe.train.global_batch * recipe.train.seq_len
    per_second = tokens / seconds["median"] if seconds["median"] else None
    return {
        "tokens_per_s": per_second,
        "tokens_per_s_per_rank": per_second / recipe.world_size if per_second else None,
        "step_seconds": seconds,
        "cpu_seconds_per_step": sum(all_cpu_seconds) / n_steady if n_steady else None,
    }


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
