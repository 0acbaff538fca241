"""The processes of a run on this machine: how they start, one a rank, and how they are ended."""

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import launch
from launch.folder import rank_log

TERMINATE_SECONDS = 3.0  # between SIGTERM and SIGKILL
FORK_SECONDS = 60.0  # milliseconds, where the machine is not out of its mind
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
ON_LINUX = sys.platform == "linux"


class Forked:
    """A child of this process that it has not started itself: as much of a Popen as is used here."""

    returncode: int | Any = None  # as a Popen's

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


@dataclass
class Rank:
    rank: int
    process: subprocess.Popen[bytes] | Forked
    log: Path
    output: int | None  # rank 0 prints into this pipe

    def ended(self) -> int | None:
        """The exit code (negative: a signal's number), or None. What an ended rank has started ends here, too."""
        if self.process.returncode is None and self.process.poll() is not None:
            self.send(signal.SIGKILL)
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)  # each rank is the leader of a session, and so of a group


class Starter:
    """Starts ranks, each as a child of this process that leads a session of its own and ends with this process.

    On Linux they are forked from one process, which `prepare` starts and which ends with this context: see
    launch/forking.py. Elsewhere, and where that process must not be forked, each is new and imports everything itself.
    """

    def __init__(self) -> None:
        self._forks = ON_LINUX
        self._forker: subprocess.Popen[bytes] | None = None
        self._calls: socket.socket | None = None
        root = str(Path(launch.__path__[0]).parent)
        self._environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._forker is not None and self._calls is not None:
            self._forker.kill()  # first, or it would say that nobody waits for it
            self._forker.wait()
            self._calls.close()
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)

    def prepare(self, given_up: Callable[[], bool]) -> bool:
        """Has everything imported that ranks need, where they are forked, and returns True; or False, where the caller
        had `given_up` before that was done. To be called before each run, for that process may have been killed.
        """
        if not self._forks or (self._forker is not None and self._forker.poll() is None):
            return True
        self.__exit__()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._calls, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._calls.settimeout(FORK_SECONDS)
        with theirs:
            stdin, stdout = theirs.fileno(), subprocess.DEVNULL
            self._forker = self._popen(["launch.forking"], {}, stdin=stdin, stdout=stdout, stderr=None)
        while not select.select([self._calls], [], [], POLL_SECONDS)[0]:
            if given_up():
                return False
        self._forks = bool(self._calls.recv(16))  # nothing, where it has ended
        return True

    def start(
        self, rank: int, world_size: int, port: int, folder: Path, options: Sequence[str], *, restarts: int = 0
    ) -> Rank:
        """Starts launch.train on folder/recipe.toml, as `start_program` does."""
        arguments = [str(folder / "recipe.toml"), "--out", str(folder.parent), *options]
        return self.start_program("launch.train", arguments, rank, world_size, port, folder, restarts=restarts)

    def start_program(
        self,
        program: str,
        arguments: Sequence[str],
        rank: int,
        world_size: int,
        port: int,
        folder: Path,
        *,
        restarts: int = 0,
    ) -> Rank:
        """Starts a module of the lab, by its `main`. Rank 0 prints to a pipe; all else goes to the log of the rank."""
        environment = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment["TORCHELASTIC_RESTART_COUNT"] = str(restarts)  # launch.train goes on where it is above 0
        log, output = rank_log(folder, rank), None
        with open(log, "ab") as file, contextlib.ExitStack() as stack:
            stdout = file.fileno()
            if rank == 0:
                output, stdout = os.pipe()
                stack.callback(os.close, stdout)
            process: subprocess.Popen[bytes] | Forked
            if self._forks:
                process = self._fork([program, list(arguments), environment], [stdout, file.fileno()])
            else:
                command, stdin, stderr = [program, *arguments], subprocess.DEVNULL, file.fileno()
                process = self._popen(command, environment, stdin=stdin, stdout=stdout, stderr=stderr)
        return Rank(rank, process, log, output)

    def _fork(self, call: list[Any], files: list[int]) -> Forked:
        assert self._calls is not None and self._forker is not None, "prepare comes first"
        try:
            socket.send_fds(self._calls, [json.dumps(call).encode()], files)
            pid = self._calls.recv(16)
        except OSError:
            pid = b""
        if not pid:
            self._forker.kill()  # a late answer would be taken for that to the next call
            self._forker.wait()
            raise ChildProcessError("the process that ranks are forked from does not answer")
        return Forked(int(pid))

    def _popen(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, stdin: int, stdout: int, stderr: int | None
    ) -> subprocess.Popen[bytes]:
        ask = functools.partial(ask_to_die_with, os.getpid(), ctypes.CDLL(None).prctl) if ON_LINUX else None
        command = [sys.executable, "-P", "-m", *arguments]  # -P: a `parallel` where the user happens to be is not ours
        return subprocess.Popen(
            command,
            env={**self._environment, **environment},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=ask,
        )


def ask_to_die_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    """In a child, before it runs anything else: asks to be killed when its parent dies, even by SIGKILL."""
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
        if rank.output is not None:
            os.close(rank.output)
            rank.output = None


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
