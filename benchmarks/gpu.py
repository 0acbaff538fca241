"""First contact with a GPU: everything that only one can tell, in one command, without network, in nine minutes.

    make gpu                                         # the same as:
    PYTHONPATH=. python benchmarks/gpu.py            # where the packages are, and no virtual environment can be made
    PYTHONPATH=. python benchmarks/gpu.py --tiny     # small shapes, on whatever is there: a rehearsal on a CPU

In this order: 1. parity with every kernel, way to recompute, and compile, in float64 and in the type that trains; 2.
one rank of large layouts, on real tensors and a fake group: the memory that a dry run predicts, the tracker sees, and
the allocator takes; 3. several ranks on the one device, through gloo: parity with CUDA streams involved; 4. the
ladder of recipes/compare/one-gpu.toml.

Results are written under results/<device>/ as they come. What is there from the same commit is not run again.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from launch.starting import free_port
from launch.table import table
from parallel.batches import corpus_of
from parallel.dryrun import dry_run_rank
from parallel.engines.engine import read_step, run_step
from parallel.engines.native import NativeEngine
from parallel.measure.clock import Clock
from parallel.measure.counters import Counters
from parallel.measure.observer import Step
from parallel.measure.record import environment, finite, read_records
from parallel.mesh import build_mesh
from parallel.proof import prove
from parallel.recipe import Recipe, load_recipe
from parallel.torch_private import fake_group, one_thread_per_gloo_group

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")

# Part 2: name -> (rank, --set over recipes/one-gpu.toml, whose model has 4 layers)
WHOLE = ["model.n_layers=32", "train.micro_batch=1"]
LARGE: dict[str, tuple[int, list[str]]] = {
    "single": (0, []),
    "tp8-sp": (0, [*WHOLE, "parallel.tp=8", "train.global_batch=1"]),
    "pp4-last": (3, ["model.n_layers=16", "train.micro_batch=1", "train.global_batch=8", "parallel.pp=4"]),
    "fsdp64": (0, [*WHOLE, "parallel.dp_shard=64", "train.global_batch=64", "recompute.mode=full"]),
    "hsdp4x16": (
        0,
        [*WHOLE, "parallel.dp_replicate=4", "parallel.dp_shard=16", "train.global_batch=64", "recompute.mode=full"],
    ),
    "tp8": (0, [*WHOLE, "parallel.tp=8", "train.global_batch=1", "tensor.sequence_parallel=false"]),
    "pp4-first": (0, ["model.n_layers=16", "train.micro_batch=1", "train.global_batch=8", "parallel.pp=4"]),
    "recompute-full": (0, ["recompute.mode=full"]),
    "recompute-selective": (0, ["recompute.mode=selective"]),
    "cp8-ring": (0, ["parallel.cp=8", "train.seq_len=16384", "train.global_batch=2"]),
    "cp8-ulysses": (
        0,
        ["parallel.cp=8", "train.seq_len=16384", "train.global_batch=2", "context.method=ulysses"],
    ),
    "attention-math": (0, ["train.attention=math", "train.seq_len=2048"]),
}
TINY = [
    "model.preset=tiny",
    "model.n_layers=8",
    "model.n_kv_heads=8",
    "train.seq_len=128",
]  # the last setting of a key counts

# Parts 1 and 3: name -> (ranks, --set over benchmarks/first-contact.toml)
KERNELS: dict[str, tuple[int, list[str]]] = {
    "eager": (1, []),
    "attention-cudnn": (1, ["train.attention=cudnn"]),
    "recompute-selective": (1, ["recompute.mode=selective"]),
    "float32": (1, ["train.dtype=float32"]),
    "attention-flash": (1, ["train.attention=flash"]),
    "attention-math": (1, ["train.attention=math"]),
    "tied": (1, ["model.tied_embeddings=true"]),
    "recompute-full": (1, ["recompute.mode=full"]),
    "recompute-every-2": (1, ["recompute.mode=every(2)"]),
    "recompute-sqrt": (1, ["recompute.mode=sqrt"]),
    "compile": (1, ["train.compile=inductor"]),
    "float32-heads-not-grouped": (1, ["train.dtype=float32", "model.n_kv_heads=8"]),
}
SHARED: dict[str, tuple[int, list[str]]] = {
    "ddp2": (2, ["parallel.dp_replicate=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "cp2-ring": (2, ["parallel.cp=2"]),
    "fsdp2": (2, ["parallel.dp_shard=2"]),
    "tp2": (2, ["parallel.tp=2", "tensor.sequence_parallel=false"]),
    "tp2-sp": (2, ["parallel.tp=2"]),
    "cp2-all-gather": (2, ["parallel.cp=2", "context.method=all-gather"]),
    "cp2-ulysses": (2, ["parallel.cp=2", "context.method=ulysses"]),
}
SMALL = ["model.n_layers=2", "model.d_model=64", "model.d_ff=96", "model.vocab_size=256", "train.seq_len=64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a GPU or a CPU")
    parser.add_argument("--sample", action="store_true", help="the first two of each kind of case")
    parser.add_argument("--out", type=Path, help="default: results/<device>, of a rehearsal runs/rehearsal")
    parser.add_argument("--only", type=int, choices=(1, 2, 3, 4), help="one part")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(finite(case(arguments.case, tiny=arguments.tiny))))
        return
    if not CUDA and not arguments.tiny:
        raise SystemExit("no GPU here; --tiny rehearses on the CPU")
    name = torch.cuda.get_device_name(DEVICE) if CUDA else "cpu"
    kept = ROOT / "results" / re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    out = (arguments.out or (ROOT / "runs" / "rehearsal" if arguments.tiny else kept)).absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{name}, torch {torch.__version__}, results in {out}", flush=True)
    began = time.monotonic()
    tiny = ["--tiny"] if arguments.tiny else []
    first = 2 if arguments.sample else None
    all_of = {
        kind: dict(list(cases.items())[:first])
        for kind, cases in (("kernels", KERNELS), ("large", LARGE), ("shared", SHARED))
    }
    parts = {
        1: lambda: cases("kernels", all_of["kernels"], out, 120, tiny),
        2: lambda: cases("large", all_of["large"], out, 150, tiny),
        3: lambda: cases("shared", all_of["shared"], out, 90, tiny),
        4: lambda: compare(
            "recipes/compare/one-gpu.toml",
            out,
            150,
            [*TINY, "train.device=auto", "train.compile=none", "train.steps=4"] if tiny else [],
            "--profile",
        ),
    }
    for number, part in parts.items():
        if arguments.only in (None, number):
            print(f"\n==== part {number}  ({time.monotonic() - began:.0f} s)", flush=True)
            part()
    print(f"\ndone in {time.monotonic() - began:.0f} s", flush=True)


def compare(comparison: str, out: Path, limit_seconds: float, settings: list[str], *options: str) -> None:
    """lab compare, which goes on with what is left, and says what could not be done."""
    command = [sys.executable, "-m", "launch.cli", "compare", comparison, "--out", str(out), "--resume", *options]
    command += [f"--set={setting}" for setting in settings]
    process = subprocess.Popen(command, cwd=ROOT, env=surroundings())
    try:
        process.wait(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        print(f"ended after {limit_seconds:.0f} s; the same command goes on", flush=True)
        print(table(read_records(out / Path(comparison).stem)), flush=True)


def cases(kind: str, all_: dict[str, tuple[int, list[str]]], out: Path, limit_seconds: float, tiny: list[str]) -> None:
    """Each in a process of its own, its result in out/<kind>/<name>.json."""
    folder = out / kind
    folder.mkdir(exist_ok=True)
    commit, deadline = environment().git_commit, time.monotonic() + limit_seconds
    for name in all_:
        file = folder / f"{name}.json"
        if file.exists() and (done := json.loads(file.read_text()))["git_commit"] == commit and not done["error"]:
            result = done
        else:
            result = in_process(f"{kind}/{name}", deadline - time.monotonic(), tiny)
            known = {"case": name, "git_commit": commit, "torch": torch.__version__, "error": None}
            result = known | {"device": torch.cuda.get_device_name(DEVICE) if CUDA else "cpu"} | result
            file.write_text(json.dumps(result, indent=1) + "\n")
        print(SHOW[kind](result), flush=True)


def in_process(name: str, limit_seconds: float, tiny: list[str]) -> dict[str, Any]:
    if limit_seconds < 5:
        return {"error": "no time was left"}
    command = [sys.executable, str(Path(__file__)), "--case", name, *tiny]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=surroundings(), capture_output=True, text=True, timeout=min(limit_seconds, 60)
        )
    except subprocess.TimeoutExpired:
        return {"error": "took too long"}
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        return {"error": lines[-1][:500]}
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def surroundings() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}


def case(name: str, *, tiny: bool) -> dict[str, Any]:
    kind, _, name = name.partition("/")
    return large(name, tiny=tiny) if kind == "large" else proofs(*(KERNELS | SHARED)[name], tiny=tiny)


# ---- 2: one rank of a large layout --------------------------------------------------------------------------------


def large(name: str, *, tiny: bool) -> dict[str, Any]:
    rank, settings = LARGE[name]
    recipe = load_recipe(ROOT / "recipes" / "one-gpu.toml", [*settings, "train.device=auto", *TINY * tiny])
    predicted = dry_run_rank(recipe, rank=rank).memory
    with fake_group(rank=rank, world_size=recipe.world_size):
        mesh = build_mesh(recipe, DEVICE.type)
        engine = NativeEngine(recipe, mesh=mesh, device=DEVICE)
        parameters = [parameter for _, parameter in engine.named_parameters()]
        counters, clock = (
            Counters(recipe, parameters, engine.optimizer, mesh=mesh, device=DEVICE),
            Clock(recipe, DEVICE),
        )
        engine.observers += [clock, counters]
        shape = (recipe.replica_batch, recipe.train.seq_len)
        tokens = torch.randint(recipe.model.vocab_size, shape, device=DEVICE)
        seconds = []
        for number in range(1, 6):
            run_step(engine, step := Step(number), lambda _: (tokens, tokens))
            read_step(engine, step)
            seconds.append(step.seconds)
        assert counters.measures is not None
        return {"predicted": predicted, "tracked": counters.measures.memory, "step_seconds": min(seconds[2:])}


def show_large(result: dict[str, Any]) -> str:
    if result["error"]:
        return f"{result['case']:26} {result['error']}"
    gib = [result["predicted"]["peak_bytes"], result["tracked"]["peak_bytes"]]
    allocator = result["tracked"]["allocator_peak_bytes"]
    ratio = f"allocator {allocator / 2**30:8.3f} ({allocator / gib[0] - 1:+.1%})" if allocator else "no allocator"
    predicted, tracked = (n_bytes / 2**30 for n_bytes in gib)
    seconds = f"{result['step_seconds']:.3f} s a step, messages free"
    return f"{result['case']:26} GiB: predicted {predicted:8.3f}  tracked {tracked:8.3f}  {ratio}  {seconds}"


# ---- 1 and 3: is it right, on one rank, and on several that share the device through gloo? ---------------------------


def proofs(n_ranks: int, settings: list[str], *, tiny: bool) -> dict[str, Any]:
    if "RANK" in os.environ:
        proofs_of_rank(load_recipe(ROOT / "benchmarks" / "first-contact.toml", [*settings, *SMALL * tiny]))
    with free_port() as port:
        known = os.environ | {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            subprocess.Popen([sys.executable, *sys.argv], env=known | {"RANK": str(rank)}, stdout=subprocess.PIPE)
            for rank in range(n_ranks)
        ]
        printed = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit(next(rank.returncode for rank in ranks if rank.returncode))  # it has said why
    return dict(json.loads(printed[0].splitlines()[-1]))


def proofs_of_rank(recipe: Recipe) -> NoReturn:
    with one_thread_per_gloo_group():
        dist.init_process_group("gloo")
        mesh = build_mesh(recipe, DEVICE.type)
        parity = prove(recipe, corpus=corpus_of(recipe), mesh=mesh, device=DEVICE)
    if dist.get_rank() == 0:
        print(json.dumps(finite(dataclasses.asdict(parity))), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads can abort at the interpreter's own end (pytorch issue 190489)


def show_proofs(result: dict[str, Any]) -> str:
    if result["error"]:
        return f"{result['case']:26} {result['error']}"
    said = []
    for dtype, passed, difference in (
        ("float64", result["passed"], result["max_rel_grad_diff"]),
        (result["trained_dtype"], result["trained_passed"], result["trained_max_rel_grad_diff"]),
    ):
        if dtype:  # on a CPU, float32 has the kernels of float64
            said.append(f"{dtype} {'passed' if passed else 'FAILED'} {difference:.1e}")
    return f"{result['case']:26} {'  '.join(said)}"


SHOW = {"kernels": show_proofs, "large": show_large, "shared": show_proofs}


if __name__ == "__main__":
    main()
