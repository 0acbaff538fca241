"""What a dry run of thousands of ranks costs on this machine: wall seconds, CPU seconds and peak resident memory.

    python benchmarks/dryrun.py

Each figure is of rank 0 in a fresh process, with the import of torch. Published layouts: Llama 3, arXiv:2407.21783.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

LARGE = Path(__file__).parents[1] / "recipes" / "large"
# name, recipe, world size, --set
CASES = (
    ("8B, fsdp16384", "llama3-8b-fsdp.toml", 16384, ["train.global_batch=8", "recompute.mode=none"]),
    (
        "70B, pp8·fsdp256·tp8",
        "llama3-70b.toml",
        16384,
        ["train.global_batch=128"],  # 16 microbatches
    ),
    (
        "405B, fsdp2048·tp8, full recompute",
        "llama3-405b.toml",
        16384,
        ["parallel.pp=1", "sharding.reshard_after_forward=true", "train.global_batch=128"],
    ),
)


def main() -> None:
    print(f"{'':<36}{'wall s':>8}{'CPU s':>8}{'RSS GiB':>9}   peak of rank 0, GiB")
    for name, recipe, world_size, overrides in CASES:
        command = [sys.executable, "-m", "launch.cli", "dry-run", str(LARGE / recipe), f"--world-size={world_size}"]
        command += [f"--set={override}" for override in overrides]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            sys.exit(f"{name}: {' '.join(command)} failed")
        peak = next(line.split()[2] for line in text.splitlines() if line.startswith("rank 0"))
        cpu = used.ru_utime + used.ru_stime
        print(
            f"{name:<36}{seconds:>8.1f}{cpu:>8.1f}{used.ru_maxrss / 2**20:>9.2f}   {float(peak) / 1024:.2f}", flush=True
        )


if __name__ == "__main__":
    main()
