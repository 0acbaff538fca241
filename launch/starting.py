"""The processes of a run on this machine: how they start, one a rank, and how they are ended."""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import launch
from launch.folder import rank_log

TERMINATE_SECONDS = 3.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ON_LINUX = sys.platform == "linux"


@dataclass
class Rank:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> int | None:
        """The exit code (negative: a signal's number), or None. What an ended rank has started ends here, too."""
        if self.process.returncode is None and self.process.poll() is not None:
            self.send(signal.SIGKILL)
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)  # start_new_session made each rank the leader of a group


def start(rank: int, world_size: int, port: int, folder: Path, options: Sequence[str]) -> Rank:
    """Starts launch.train on folder/recipe.toml. Rank 0 prints to a pipe; all else goes to the log of the rank."""
    root = str(Path(launch.__path__[0]).parent)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    # -P: a folder called `parallel` where the user happens to be is not ours.
    command = [sys.executable, "-P", "-m", "launch.train", str(folder / "recipe.toml"), "--out", str(folder.parent)]
    ask = functools.partial(_ask_to_die_with, os.getpid(), ctypes.CDLL(None).prctl) if ON_LINUX else None
    log = rank_log(folder, rank)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [*command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else file,
            stderr=file,
            start_new_session=True,
            preexec_fn=ask,
        )
    return Rank(rank, process, log)


def _ask_to_die_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    """In a child, before it runs: asks to be killed when its parent dies, even by SIGKILL."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked
        os._exit(1)


def stop(ranks: list[Rank]) -> None:
    """Ends what still runs: first so that it can clean up, then so that it cannot refuse."""
    for number, seconds in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, 30.0)):
        running = [rank for rank in ranks if rank.ended() is None]
        for rank in running:
            rank.send(number)
        deadline = time.monotonic() + seconds
        while any(rank.ended() is None for rank in running) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    for rank in ranks:
        if rank.process.stdout:
            rank.process.stdout.close()


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A TCP port for rank 0 to listen on, bound here, without listening, so that nobody else is given it.

    Where both ends set SO_REUSEADDR, as torch's store does, Linux lets rank 0 listen on it all the same.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if not ON_LINUX:
            held.close()
        yield port
