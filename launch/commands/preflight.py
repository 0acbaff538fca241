"""Look over the hosts of an allocation: GPUs, clocks, links, the shared folder."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from launch.slurm import ask_slurm
from launch.terminal import CommandError

SECONDS = 25.0  # launch.preflight ends by itself before


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="that all hosts must see")


def run(arguments: argparse.Namespace) -> int:
    allocated = os.environ.get
    job, nodes = allocated("SLURM_JOB_ID"), allocated("SLURM_JOB_NUM_NODES")
    if not job or not nodes:
        raise CommandError("no allocation; begin one with salloc --nodes=2, or use lab submit --preflight")
    head = ask_slurm(["scontrol", "show", "hostnames", allocated("SLURM_JOB_NODELIST", "")]).split()[0]
    meeting = {"MASTER_ADDR": head, "MASTER_PORT": str(10000 + int(job) % 20000)}
    command = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    command += [sys.executable, "-P", "-m", "launch.preflight", "--out", str(arguments.out.absolute())]
    command += ["--json"] * arguments.json
    try:
        return int(subprocess.run(command, env=os.environ | meeting, timeout=SECONDS).returncode != 0)
    except FileNotFoundError:
        raise CommandError("srun: not found; this is no host from which Slurm starts tasks") from None
    except subprocess.TimeoutExpired:
        print(f"bad  srun did not end in {SECONDS:g} s", file=sys.stderr)
        return 1
