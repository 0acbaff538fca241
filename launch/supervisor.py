"""Runs a recipe on this machine: one process per rank, watched until the last has ended.

A rank that dies takes its peers with it after a few seconds; a run that passes its time limit is asked where each rank
is and then ended; whatever ends the supervisor ends the ranks. Every run leaves a record.json that says what came of
it. This module does not import torch: the ranks do.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
import parallel
from launch.folder import prepare_run, recipe_toml
from parallel.measure.record import new_record, read_record, read_steps, write_record
from parallel.recipe import Recipe, RecipeError

GRACE_SECONDS = 5.0  # for the peers of a rank that died: they may have something to say
TERMINATE_SECONDS = 3.0  # between SIGTERM and SIGKILL
STACK_SECONDS = 3.0  # for the answer to "where are you?"
POLL_SECONDS = 0.05
TAIL_LINES = 6
FATAL = "Fatal Python error: "  # then come the stacks of a rank that a signal such as SIGSEGV has ended
MAX_LOCAL_RANKS = 128  # some 200 MB and a second of CPU time each before the first step
PACKAGE_PARENT = re.compile(r"/(?:[^/\s\"']+/)*?(?=(?:site-packages|dist-packages|parallel|launch)/)")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interrupted(Exception):
    """A signal asked the run to end; its text is the signal's name."""


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

    def end_in_words(self) -> str:
        code = self.process.returncode
        if code >= 0:
            return f"rank {self.rank} ended with exit code {code}"
        name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
        hint = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
        _, stacks = self._last_words()
        return f"rank {self.rank} was killed by {name}{hint}" + (f" {place(stacks)}" if stacks else "")

    def tail(self) -> str:
        """The last lines of the log, but for the stacks of a fatal error."""
        said, _ = self._last_words()
        lines = [line for line in said.splitlines() if line.strip(" ^~")]  # a traceback underlines with those
        if not lines:
            return f"logs/{self.log.name} is empty"
        last = (PACKAGE_PARENT.sub("", line)[:200] for line in lines[-TAIL_LINES:])
        return "\n".join([f"logs/{self.log.name} ends with:", *last])

    def _last_words(self) -> tuple[str, str]:
        """What the log ends with: what the rank said, and the stacks of a fatal error if it had one."""
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 65536))
            said, _, stacks = file.read().decode(errors="replace").partition(FATAL)
            return said, stacks
        return "", ""


def refuse_too_many(recipe: Recipe) -> None:
    """RecipeError where one machine should not be asked to start so many processes."""
    if recipe.world_size > MAX_LOCAL_RANKS:
        raise RecipeError(
            "parallel",
            recipe.world_size,
            f"is the world size; at most {MAX_LOCAL_RANKS} ranks start on one machine, more by torchrun on several",
        )


def supervise(
    recipe: Recipe, *, out: Path, echo: Callable[[str], None] | None = None, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs `recipe` in out/<name>/ and returns its record, whatever came of it; `echo` gets what rank 0 prints.

    options: of `rank_options`.

    Raises RecipeError where the folder cannot be used, and Interrupted, with the record written, where SIGINT, SIGTERM
    or SIGHUP came. When it returns or raises no process of the run is left.
    """
    folder = out / recipe.name
    prepare_run(folder)
    (folder / "recipe.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    ranks: list[Rank] = []
    failure: tuple[str, str] | None = None
    with _signals() as received:
        try:
            with _free_port() as port:
                for rank in range(recipe.world_size):
                    ranks.append(_start(rank, recipe.world_size, port, folder, options))
                failure = _watch(ranks, recipe.train.time_limit_seconds, received, echo)
        except BaseException as error:
            whose = "the launcher" if len(ranks) == recipe.world_size else f"the start of rank {len(ranks)}"
            failure = ("failed", f"{whose} failed: {type(error).__name__}: {error}")
            raise
        finally:
            _stop(ranks)
            record = _settle(recipe, folder, failure)
        if received:
            raise Interrupted(received[0].name)
    return record


# ---- starting ------------------------------------------------------------------------------------------------------


def _start(rank: int, world_size: int, port: int, folder: Path, options: Sequence[str]) -> Rank:
    """Rank 0 prints to a pipe, which the supervisor copies to its log; all else goes to the rank's log directly."""
    root = str(Path(launch.__path__[0]).parent)
    environment = {"OMP_NUM_THREADS": "1", **os.environ} | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root))),
    }
    # -P: a folder called `parallel` where the user happens to be is not ours.
    command = [sys.executable, "-P", "-m", "launch.train", str(folder / "recipe.toml"), "--out", str(folder.parent)]
    command += options
    log = folder / "logs" / f"rank-{rank}.log"
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )
    return Rank(rank, process, log)


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does before it runs: asks to be killed when its parent dies, even by SIGKILL."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it was asked
            os._exit(1)

    return ask


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A TCP port for rank 0 to listen on.

    It stays bound here, without listening, so that nobody else is given it; where both ends set SO_REUSEADDR, as
    torch's store does, Linux lets rank 0 listen on it all the same.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """The signals that asked for the end, in a list instead of an exception that could come at any instruction."""
    received: list[signal.Signals] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, lambda n, _: received.append(signal.Signals(n))) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- watching ------------------------------------------------------------------------------------------------------


def _watch(
    ranks: list[Rank], limit_seconds: float, received: list[signal.Signals], echo: Callable[[str], None] | None
) -> tuple[str, str] | None:
    """Waits until all ranks have ended well, and returns None; or until it is known why not: (status, reason)."""
    start = time.monotonic()
    output = _Output(ranks[0], echo)
    first: Rank | None = None  # of those that failed
    deadline = start + limit_seconds
    while True:
        output.copy(POLL_SECONDS)
        running = [rank for rank in ranks if rank.ended() is None]
        failed = [rank for rank in ranks if rank.ended()]
        if failed and first is None:
            # Of ranks that failed within one poll, one that a signal killed has had no time to follow another.
            first = min(failed, key=lambda rank: (rank.process.returncode > 0, rank.rank))
            deadline = time.monotonic() + GRACE_SECONDS
        if received:
            return "failed", f"interrupted by {received[0].name}"
        if not running or time.monotonic() > deadline:
            break
    if first is None and running:
        where = _ask_where(running)
        return "timeout", f"not done in {limit_seconds:g} s (train.time_limit_seconds): {where}"
    output.copy(0)
    return _why(first, ranks) if first else None


class _Output:
    """Copies what rank 0 prints to its log and, line by line, to `echo`."""

    def __init__(self, rank: Rank, echo: Callable[[str], None] | None) -> None:
        assert rank.process.stdout is not None
        self.pipe = rank.process.stdout.fileno()
        os.set_blocking(self.pipe, False)
        self.log, self.echo = rank.log, echo
        self.open, self.line = True, b""

    def copy(self, wait_seconds: float) -> None:
        """Copies what there is, after waiting for it at most so long."""
        if not self.open:
            time.sleep(wait_seconds)
        while self.open and select.select([self.pipe], [], [], wait_seconds)[0]:
            text = os.read(self.pipe, 65536)
            self.open = bool(text)
            wait_seconds = 0
            with open(self.log, "ab") as file:
                file.write(text)
            *lines, self.line = (self.line + text).split(b"\n")
            if self.echo:
                for line in lines:
                    self.echo(line.decode(errors="replace"))


def _why(first: Rank, ranks: list[Rank]) -> tuple[str, str]:
    """Why a run failed. A rank that was killed cannot say; one that raised has written it to record.json."""
    folder = first.log.parent.parent
    written = read_record(folder / "record.json") if (folder / "record.json").exists() else None
    if first.process.returncode > 0 and written and written["kind"] and written["status"] != "ok":
        reason = written["reason"] or ""
        if written["status"] == "refused":
            return "refused", reason
        teller = re.match(r"rank (\d+): ", reason)
        first = ranks[int(teller[1])] if teller and int(teller[1]) < len(ranks) else first
        return written["status"], f"{reason}\n{first.tail()}"
    return "failed", f"{first.end_in_words()}\n{first.tail()}"


# ---- where a rank hangs --------------------------------------------------------------------------------------------

FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)
THREAD = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):$", re.MULTILINE)


def _ask_where(running: list[Rank]) -> str:
    """Has each rank write its stack to its log, and says in a line where each is: those at one place together."""
    before = {rank.rank: rank.log.stat().st_size for rank in running}
    for rank in running:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(signal.SIGUSR1)
    stacks: dict[int, str] = {}
    deadline = time.monotonic() + STACK_SECONDS
    settled = False
    while not settled and time.monotonic() < deadline:  # until each has answered and no answer grows
        time.sleep(4 * POLL_SECONDS)
        now = {rank.rank: _text_after(rank.log, before[rank.rank]) for rank in running}
        settled = now == stacks and all(FRAME.search(text) for text in now.values())
        stacks = now
    places: dict[str, list[int]] = {}
    for rank in running:
        places.setdefault(place(stacks[rank.rank]), []).append(rank.rank)
    return "; ".join(f"rank{'s' * (len(at) > 1)} {', '.join(map(str, at))} {where}" for where, at in places.items())


def _text_after(path: Path, n_bytes: int) -> str:
    with open(path, "rb") as file:
        file.seek(n_bytes)
        return file.read().decode(errors="replace")


def place(stacks: str) -> str:
    """Where the main thread is, from faulthandler's text: the innermost function of torch or of this project, and the
    line of this project that it was called from."""
    main_thread = THREAD.split(stacks)[-1]  # the first thread of a process comes last
    frames = [(match["function"], _shown_path(match["file"]), match["line"]) for match in FRAME.finditer(main_thread)]
    if not THREAD.search(stacks) or not frames:
        return "gave no stack"
    innermost = next((frame for frame in frames if frame[1][0]), frames[0])
    ours = next((frame for frame in frames if frame[1][0] == "ours"), innermost)
    return f"in {innermost[0]} ({ours[1][1]}:{ours[2]})"


def _shown_path(file: str) -> tuple[str, str]:
    """(whose, path): "ours" or "torch" with the path from the package on; else "" and the file's name."""
    for package in (*parallel.__path__, *launch.__path__):
        if file.startswith(package + os.sep):
            return "ours", str(Path(file).relative_to(Path(package).parent))
    if match := re.search(r"-packages/(torch/.*)$", file):
        return "torch", match[1]
    return "", Path(file).name


# ---- ending --------------------------------------------------------------------------------------------------------


def _stop(ranks: list[Rank]) -> None:
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


def _settle(recipe: Recipe, folder: Path, failure: tuple[str, str] | None) -> dict[str, Any]:
    """The record of the run: the ranks' own where all went well, else with the failure and the steps that were done."""
    path = folder / "record.json"
    if failure is None:
        if path.exists():
            return read_record(path)
        failure = ("failed", "every rank ended well, but none wrote record.json")
    record = new_record(recipe) | {"steps": read_steps(folder / "steps.jsonl")}
    if path.exists() and (written := read_record(path))["recipe"] == record["recipe"]:
        record = written
    record |= {"status": failure[0], "reason": failure[1]}
    write_record(path, record)
    return record
