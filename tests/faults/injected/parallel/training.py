"""parallel.training as it is, but that one rank meets a fault at one step, once: what fault.json beside the run says.

{"kind": one of KINDS, "rank": r, "step": n}     renamed to fault.met when it has been met
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import parallel
from parallel.checkpoint import files, storage
from parallel.measure import hardware

_spec = importlib.util.spec_from_file_location("parallel.real_training", f"{parallel.__path__[-1]}/training.py")
assert _spec is not None and _spec.loader is not None
real = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = real
_spec.loader.exec_module(real)

STRAGGLER_SECONDS = 1.5


def train(recipe: Any, *, out: Path, **options: Any) -> Any:
    hardware.CEILING_SECONDS = 0.01  # nobody looks at it here
    path = out.parent / "fault.json"
    fault = json.loads(path.read_text()) if path.exists() else None
    if fault and fault["rank"] == int(os.environ["RANK"]):
        run_step, meet = real.run_step, KINDS[fault["kind"]]

        def run_step_with_fault(engine: Any, step: Any, batch: Any) -> None:
            if step.number == fault["step"]:
                path.rename(path.with_suffix(".met"))
                meet(engine, out)
            run_step(engine, step, batch)

        real.run_step = run_step_with_fault
    return real.train(recipe, out=out, **options)


def _raise(engine: Any, run: Path) -> None:
    raise ValueError("an injected fault")


def _signal(number: signal.Signals) -> Callable[[Any, Path], None]:
    return lambda engine, run: os.kill(os.getpid(), number)


def _straggle(engine: Any, run: Path) -> None:
    subprocess.Popen(["sh", "-c", f"sleep {STRAGGLER_SECONDS}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def _exit(engine: Any, run: Path) -> None:
    os._exit(0)


def _spoil_gradient(engine: Any, run: Path) -> None:
    update = engine.update

    def update_spoilt() -> torch.Tensor:
        spoilt = next(parameter for _, parameter in engine.named_parameters() if parameter.grad is not None)
        with torch.no_grad():
            spoilt.grad.fill_(float("nan"))
        return update()

    engine.update = update_spoilt


def _allocate(engine: Any, run: Path) -> None:
    torch.empty(2**62, dtype=torch.uint8)


def _fill_disk(engine: Any, run: Path) -> None:
    """From now on the kernel has no space for this rank's part of a checkpoint."""
    write = storage._write_file
    storage._write_file = lambda path, tensors: write(Path("/dev/full"), tensors)


def _damage_checkpoint(engine: Any, run: Path) -> None:
    path = sorted(files.candidates(run)[0].glob("part-*"))[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.kill(os.getpid(), signal.SIGKILL)


def _damage_pointer(engine: Any, run: Path) -> None:
    (run / files.CHECKPOINTS / files.LATEST).write_bytes(b"\xff\x00step-")
    os.kill(os.getpid(), signal.SIGKILL)


def _cut_connections(*, of_store_alone: bool) -> Callable[[Any, Path], None]:
    def cut(engine: Any, run: Path) -> None:
        for entry in os.listdir("/proc/self/fd"):
            try:
                connection = socket.socket(fileno=os.dup(int(entry)))
                ends = (connection.getsockname(), connection.getpeername())
            except (OSError, ValueError):  # no socket, or one that listens
                continue
            with connection:
                ports = {end[1] for end in ends if len(end) > 1 and isinstance(end[1], int)}
                if ports and (not of_store_alone or int(os.environ["MASTER_PORT"]) in ports):
                    connection.shutdown(socket.SHUT_RDWR)

    return cut


KINDS: dict[str, Callable[[Any, Path], None]] = {
    "exception": _raise,
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGUSR1": _signal(signal.SIGUSR1),
    "straggler": _straggle,
    "hang": _signal(signal.SIGSTOP),
    "exit 0": _exit,
    "NaN": _spoil_gradient,
    "out of memory": _allocate,
    "full disk": _fill_disk,
    "damaged checkpoint": _damage_checkpoint,
    "damaged pointer": _damage_pointer,
    "lost store": _cut_connections(of_store_alone=True),
    "lost peers": _cut_connections(of_store_alone=False),
}
