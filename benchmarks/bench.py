"""The lab against loops written by hand (bare.py): the same model, data, optimizer and clipping, run in turn.

    python benchmarks/bench.py --rounds 5                  # `make bench`
    python benchmarks/bench.py --rounds 5 fsdp2 pp2

CPU seconds per step are summed over ranks, and are what to look at where ranks share cores. A ratio is of one round,
ours over theirs; below 1 is less. Memory is the largest resident set of any rank, imports included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from launch.starting import free_port

ROOT = Path(__file__).parents[1]
RECIPE = """
[model]
preset = "none"
n_layers = 6
d_model = 384
n_heads = 6
d_ff = 1024
vocab_size = 2048
[data]
source = "synthetic"
[train]
parity = false
device = "cpu"
"""
# name -> (bare.py's strategy, ranks, --set of the lab)
CASES = {
    "single": ("single", 1, []),
    "ddp2": ("ddp", 2, ["parallel.dp_replicate=2"]),
    "ddp4": ("ddp", 4, ["parallel.dp_replicate=4"]),
    "fsdp2": ("fsdp", 2, ["parallel.dp_shard=2"]),
    "fsdp4": ("fsdp", 4, ["parallel.dp_shard=4"]),
    "tp2": ("tp", 2, ["parallel.tp=2", "tensor.sequence_parallel=false"]),
    "pp2": ("pp", 2, ["parallel.pp=2", "train.micro_batch=2"]),
}


class Figures(NamedTuple):
    cpu_seconds: float  # per step, all ranks together
    wall_seconds: float
    rss_mib: float  # of the rank that took most


def run_ranks(command: list[str], n_ranks: int, folder: Path) -> tuple[list[str], float]:
    """What each rank printed, and the largest resident set in MiB."""
    processes, rss = [], []
    with free_port() as port:
        for rank in range(n_ranks):
            environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **os.environ, "RANK": str(rank)}
            environment |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with open(folder / f"out-{rank}", "wb") as out:
                processes.append(subprocess.Popen(command, env=environment, stdout=out))
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{' '.join(command)} ended with status {status}")
            rss.append(usage.ru_maxrss / 1024)
    return [(folder / f"out-{rank}").read_text() for rank in range(n_ranks)], max(rss)


def bare(strategy: str, n_ranks: int, options: list[str]) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "benchmarks" / "bare.py"), strategy, *options]
        printed, rss = run_ranks(command, n_ranks, Path(folder))
    ranks = [json.loads(text) for text in printed]
    return Figures(sum(r["cpu_seconds"] for r in ranks), max(r["wall_seconds"] for r in ranks), rss)


def lab(n_ranks: int, options: list[str], settings: list[str]) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bench.toml").write_text(RECIPE)
        command = [sys.executable, "-P", "-m", "launch.train", f"{folder}/bench.toml", f"--out={folder}"]
        command += [*options, *(f"--set={setting}" for setting in settings)]
        _, rss = run_ranks(command, n_ranks, Path(folder))
        speed = json.loads((Path(folder) / "bench" / "record.json").read_text())["throughput"]
    return Figures(speed["cpu_seconds_per_step"], speed["step_seconds"]["median"], rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=13, help="of which the first 3 are not timed")
    parser.add_argument("--matmul", choices=("highest", "medium"), default="highest", help="float32 products of both")
    arguments = parser.parse_args()
    matmul, steps = f"--matmul={arguments.matmul}", arguments.steps
    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        raise SystemExit(f"unknown case {unknown[0]}; known: {', '.join(CASES)}")
    print(f"{'':8}{'CPU s/step':>16}{'ratio':>22}{'wall s/step':>18}{'RSS MiB':>16}")
    print(f"{'':8}{'bare':>8}{'lab':>8}{'median [min, max]':>22}{'bare':>9}{'lab':>9}{'bare':>8}{'lab':>8}")
    for case in arguments.cases or CASES:
        strategy, n_ranks, settings = CASES[case]
        theirs, ours = [], []
        for _ in range(arguments.rounds):
            theirs.append(bare(strategy, n_ranks, [matmul, f"--steps={steps}"]))
            ours.append(lab(n_ranks, [matmul], [*settings, f"train.steps={steps}"]))
        ratios = [our.cpu_seconds / their.cpu_seconds for our, their in zip(ours, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        (bare_cpu, bare_wall, bare_rss), (lab_cpu, lab_wall, lab_rss) = (
            [statistics.median(column) for column in zip(*figures, strict=True)] for figures in (theirs, ours)
        )
        print(
            f"{case:8}{bare_cpu:8.3f}{lab_cpu:8.3f}{spread:>22}{bare_wall:9.3f}{lab_wall:9.3f}{bare_rss:8.0f}{lab_rss:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
