"""The process that the ranks of this machine are forked from, so that torch is imported once and not by every rank.

    launcher -> this process -> a moment's child -> rank        each forks the next
    launcher -> rank                                            once the one in between has ended

The launcher is a subreaper (prctl(2)): it becomes the parent of a rank, sees how it ends, and takes it along when it
dies itself. This process does nothing but import and fork: it has one thread, no process group and no GPU. It ends with
the launcher, or where it finds that it must not be forked; ranks are then started without it.
"""

import ctypes
import importlib
import json
import os
import socket
import sys
import time
import traceback

from launch import train
from launch.redaction import Redacted
from launch.starting import ask_to_die_with
from parallel.measure.record import git_commit


def main() -> None:
    """Serves calls from the socket that is its stdin: JSON [program, arguments, environment], and two files."""
    calls, launcher = socket.socket(fileno=0), os.getppid()
    if not _prepared():
        os._exit(1)
    calls.send(b"ready")
    while True:
        call, files, *_ = socket.recv_fds(calls, 2**16, 2)
        if not call:
            os._exit(0)
        child = os.fork()
        if child == 0:
            parent = os.getpid()
            if os.fork() == 0:
                _be_rank(*json.loads(call), files=files, calls=calls, parent=parent, launcher=launcher)
            os._exit(0)
        os.waitpid(child, 0)
        for file in files:
            os.close(file)


def _prepared() -> bool:
    """Imports what ranks need, and says whether they may be forked here: not beside a thread, nor after CUDA began."""
    try:
        if "OPENBLAS_NUM_THREADS" not in os.environ:  # else numpy starts as many threads as OMP_NUM_THREADS says
            os.environ["OPENBLAS_NUM_THREADS"] = "1"
            import numpy  # noqa: F401

            del os.environ["OPENBLAS_NUM_THREADS"]
        train.import_training()
    except Exception:  # each rank will say so in its log
        return False
    git_commit()  # of what was imported, and not of what lies there when a later rank asks
    torch = sys.modules.get("torch")
    return len(os.listdir("/proc/self/task")) == 1 and not (torch and torch.cuda.is_initialized())


def _be_rank(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    *,
    files: list[int],
    calls: socket.socket,
    parent: int,
    launcher: int,
) -> None:
    """Becomes `python -m program`, printing to the two files, and never returns."""
    code = 1
    try:
        while os.getppid() == parent:
            time.sleep(0.0005)
        ask_to_die_with(launcher, ctypes.CDLL(None).prctl)
        os.setsid()
        calls.send(str(os.getpid()).encode())
        null = os.open(os.devnull, os.O_RDONLY)
        for file, number in ((null, calls.detach()), *zip(files, (1, 2), strict=True)):
            os.dup2(file, number)
            os.close(file)
        os.environ.update(environment)
        code = importlib.import_module(program).main(arguments)
    except BaseException:
        traceback.print_exc(file=Redacted(sys.stderr))
    train.leave(code)


if __name__ == "__main__":
    main()
