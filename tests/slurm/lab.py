"""`lab` on the login node of a testbed, in a folder that all its nodes see."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed import Testbed, wait_until

RECIPE = """
[model]
preset = "none"
n_layers = 2
d_model = 32
n_heads = 2
vocab_size = 64
[data]
source = "synthetic"
[train]
steps = 3
seq_len = 16
global_batch = 4
[parallel]
dp_shard = 2
tp = 2
"""
SITE = 'name = "our cluster"\ngpus_per_node = 2\n'
ENDLESS = ("--set", "train.steps=1000000", "--set", "train.parity=false")
ALL_OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


Rows = list[dict[str, Any]]


class Lab:
    """`lab` on the login node, in a folder that all nodes see."""

    def __init__(self, slurm: Testbed, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        (folder / "small.toml").write_text(RECIPE)
        self.site('launcher = "srun"')  # without torchrun, which imports torch once more on each node

    def site(self, lines: str) -> None:
        (self.folder / "site.toml").write_text(f"{SITE}{lines}\n")

    def __call__(self, *arguments: str, check: bool = True, **settings: Any) -> Any:
        program = (sys.executable, "-P", "-m", "launch.cli", *arguments)
        return self.slurm(*program, check=check, cwd=self.folder, **settings)

    def submit(self, *arguments: str, **settings: Any) -> dict[str, Any]:
        answer = self("submit", *arguments, "--site", "site.toml", "--json", **settings)
        return json.loads(answer.stdout)

    def status(self, folder: str) -> Rows:
        return json.loads(self("status", folder, "--json", check=False).stdout)

    def until(self, folder: str, true: Callable[[list[dict[str, Any]]], bool], seconds: float = 90) -> Rows:
        rows: list[dict[str, Any]] = []

        def ask() -> bool:
            rows[:] = self.status(folder)
            return true(rows) or bool(time.sleep(0.3))  # asking takes half a core from the ranks

        wait_until(ask, seconds, lambda: f"{rows}\n{self.log(folder)}")
        return rows

    def log(self, folder: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.folder / folder).glob("logs/*.log")))


def ended(rows: Rows) -> bool:
    return all(row["state"] in ("done", "failed") for row in rows)


def training(rows: Rows) -> bool:
    assert not ended(rows), rows
    return all(row["step"] is not None for row in rows)
