"""Runs a recipe on this machine: one process per rank, watched until the last has ended.

A rank that dies takes its peers with it after a few seconds; a run that passes its time limit is asked where each rank
is and then ended; whatever ends the supervisor ends the ranks. Every run leaves a record.json that says what came of
it. This module does not import torch: the ranks do.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.folder import hold, prepare_run, rank_log, recipe_toml, refuse_under_way
from launch.starting import POLL_SECONDS, Rank, Starter, free_port, stop
from launch.verdict import FRAME, LIFE, PEER_LOST, STOPPED, may_restart, place, settle, text_of, why
from parallel.checkpoint.files import last_readable
from parallel.measure.lives import read_lives
from parallel.measure.record import read_record
from parallel.recipe import Recipe, RecipeError

GRACE_SECONDS = 5.0  # for the peers of a rank that died: they may have something to say
EARLY_SECONDS = 30.0  # for the peers of a rank that ended as if all were done: rank 0 writes the record
STACK_SECONDS = 3.0  # for the answer to "where are you?"
SAVING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # those that launch.train heeds
LIMIT = "train.time_limit_seconds"
MAX_LOCAL_RANKS = 128  # where they are not forked, some 200 MB and two seconds of CPU time each before the first step


class Interrupted(Exception):
    """A signal asked the run to end; its text is the signal's name."""


class Stopped(Interrupted):
    """The same, and the run has saved itself before; its text says how to go on."""


def refuse_too_many(recipe: Recipe) -> None:
    """RecipeError where one machine should not be asked to start so many processes."""
    if recipe.world_size > MAX_LOCAL_RANKS:
        most = f"at most {MAX_LOCAL_RANKS} ranks start on one machine, more by torchrun on several"
        raise RecipeError("parallel", recipe.world_size, f"is the world size; {most}")


def supervise(
    recipe: Recipe,
    *,
    out: Path,
    starter: Starter,
    echo: Callable[[str], None] | None = None,
    options: Sequence[str] = (),
    resume: bool = False,
    max_restarts: int = 0,
) -> dict[str, Any]:
    """Runs `recipe` in out/<name>/ and returns its record, whatever came of it; `echo` gets what rank 0 prints.

    options: of launch.train. resume: the folder's run goes on, by an option among them. max_restarts: how often, where
    a rank died, all start again from the last whole checkpoint. Raises RecipeError where the folder cannot be used, and
    Interrupted, with the record written, where SIGINT, SIGTERM or SIGHUP came. A run with checkpoints is handed SIGTERM
    and SIGUSR1 on: Stopped. When it returns or raises no process of the run is left.
    """
    folder, say = out / recipe.name, echo or (lambda line: None)
    refuse_under_way(folder)
    ended = prepare_run(folder, resume=resume)
    held = hold(folder)
    try:
        (folder / "recipe.toml").write_text(recipe_toml(recipe), encoding="utf-8")
        with _signals(SAVING_SIGNALS if recipe.checkpoint.every else ()) as received:
            for restarts in range(max_restarts + 1):
                life = len(read_lives(folder) or []) + 1
                if ended:
                    say(f"life {life - 1} of {recipe.name} has ended: {ended}")
                if restarts:
                    checkpoint = last_readable(folder)
                    where = f"the checkpoint of step {checkpoint.step}" if checkpoint else "where it first started"
                    say(f"restart {restarts} of at most {max_restarts}, from {where}")
                if life > 1:
                    _begin_life(folder, life, recipe.world_size)
                record = _live(recipe, folder, starter, received, options, restarts, echo)
                if received or not may_restart(record) or restarts == max_restarts:
                    return record
                ended = prepare_run(folder, resume=True)
        raise AssertionError("at least one life")
    finally:
        os.close(held)


def run_program(
    program: str,
    arguments: Sequence[str],
    *,
    n_ranks: int,
    folder: Path,
    limit_seconds: float,
    starter: Starter,
    echo: Callable[[str], None],
) -> tuple[str, str] | None:
    """Runs another module of the lab than launch.train, on ranks of this machine that log to folder/logs.

    None where all ended well, else (status, reason). `echo` gets what rank 0 prints. Raises Interrupted. No process is
    left when it returns or raises.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    failure: tuple[str, str] | None = None
    deadline = time.monotonic() + limit_seconds
    with _signals(()) as received:
        try:
            if not starter.prepare(lambda: bool(received) or time.monotonic() > deadline):
                failure = _late(limit_seconds, "its imports were not done", limit="in all")
            else:
                with free_port() as port:
                    for rank in range(n_ranks):
                        ranks.append(starter.start_program(program, arguments, rank, n_ranks, port, folder))
                    failure = _watch(ranks, limit_seconds, deadline, received, (), echo, limit="in all")
        finally:
            stop(ranks)
        if received:
            raise Interrupted(received[0].name)
    return failure


def _begin_life(folder: Path, life: int, world_size: int) -> None:
    for rank in range(world_size):
        with open(rank_log(folder, rank), "a", encoding="utf-8") as log:
            log.write(f"\n{LIFE}{life}, {datetime.now(UTC).isoformat(timespec='seconds')}\n")


def _live(
    recipe: Recipe,
    folder: Path,
    starter: Starter,
    received: list[signal.Signals],
    options: Sequence[str],
    restarts: int,
    echo: Callable[[str], None] | None,
) -> dict[str, Any]:
    """One life of the run, from the start of its ranks to its record."""
    ranks: list[Rank] = []
    failure: tuple[str, str] | None = None
    saving_signals = SAVING_SIGNALS if recipe.checkpoint.every else ()
    options = [*options, "--started", repr(time.time())]
    try:
        limit_seconds = recipe.train.time_limit_seconds
        deadline = time.monotonic() + limit_seconds
        if starter.prepare(lambda: bool(received) or time.monotonic() > deadline):
            with free_port() as port:
                for rank in range(recipe.world_size):
                    ranks.append(starter.start(rank, recipe.world_size, port, folder, options, restarts=restarts))
                failure = _watch(ranks, limit_seconds, deadline, received, saving_signals, echo)
        else:
            failure = _interrupted(received) or _late(limit_seconds, "its imports were not done")
    except BaseException as error:
        whose = "the launcher" if len(ranks) == recipe.world_size else f"the start of rank {len(ranks)}"
        failure = ("failed", f"{whose} failed: {type(error).__name__}: {error}")
        raise
    finally:
        stop(ranks)
        record = settle(recipe, folder, failure)
    if record["status"] == "failed" and any(rank.process.returncode == STOPPED for rank in ranks):
        raise Stopped(record["reason"])
    if received and record["status"] != "ok":
        raise Interrupted(received[0].name)
    return record


@contextlib.contextmanager
def _signals(more: Sequence[signal.Signals]) -> Iterator[list[signal.Signals]]:
    """The signals that asked for the end, in a list instead of an exception that could come at any instruction."""
    received: list[signal.Signals] = []
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *more}
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, lambda n, _: received.append(signal.Signals(n))) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- watching ------------------------------------------------------------------------------------------------------


def _interrupted(received: list[signal.Signals]) -> tuple[str, str] | None:
    return ("failed", f"interrupted by {received[0].name}") if received else None


def _late(limit_seconds: float, where: str, *, limit: str = LIMIT) -> tuple[str, str]:
    return "timeout", f"not done in {limit_seconds:g} s ({limit}): {where}"


def _watch(
    ranks: list[Rank],
    limit_seconds: float,
    deadline: float,
    received: list[signal.Signals],
    saving_signals: Sequence[signal.Signals],
    echo: Callable[[str], None] | None,
    *,
    limit: str = LIMIT,
) -> tuple[str, str] | None:
    """Waits until all ranks have ended well, and returns None; or until it is known why not: (status, reason)."""
    output = _Output(ranks[0], echo)
    folder = ranks[0].log.parent.parent
    record = folder / "record.json"
    first: Rank | None = None  # of those that failed
    early: Rank | None = None  # the first that ended as if all were done, before there was a record
    handed_on, latest = False, deadline
    while True:
        output.copy(POLL_SECONDS)
        running = [rank for rank in ranks if rank.ended() is None]
        failed = [rank for rank in ranks if rank.ended()]
        if early is None and first is None and not failed and len(running) < len(ranks) and not record.exists():
            early = next(rank for rank in ranks if rank not in running)
            latest, deadline = deadline, min(deadline, time.monotonic() + EARLY_SECONDS)
        elif early and first is None and read_record(record)["status"] == "ok":  # rank 0 was a moment later
            early, deadline = None, latest
        if failed and first is None:
            # Of ranks that failed within one poll, one that a signal killed has had no time to follow another.
            first = min(failed, key=lambda rank: (rank.process.returncode > 0, rank.rank))
            deadline = time.monotonic() + GRACE_SECONDS
        if received and not set(received) <= set(saving_signals):
            return _interrupted(received)
        if received and not handed_on:
            handed_on = True
            for rank in running:
                os.kill(rank.process.pid, received[0])
        if not running or time.monotonic() > deadline:
            break
    if first is None and early is None and running:
        return _late(limit_seconds, _ask_where(running), limit=limit)
    output.copy(0)
    if received and first and first.process.returncode != STOPPED:  # it came before a rank could heed it
        return _interrupted(received)
    end = why(folder, first.rank, first.process.returncode) if first else None
    if early and (end is None or PEER_LOST.search(end[1])):
        return why(folder, early.rank, 0) if end or running else None
    return end


class _Output:
    """Copies what rank 0 prints to its log and, line by line, to `echo`."""

    def __init__(self, rank: Rank, echo: Callable[[str], None] | None) -> None:
        assert rank.output is not None
        self.pipe = rank.output
        os.set_blocking(self.pipe, False)
        self.log, self.echo = rank.log, echo
        self.open, self.line = True, b""

    def copy(self, wait_seconds: float) -> None:
        """Copies what there is, after waiting for it at most so long."""
        if not self.open:
            time.sleep(wait_seconds / 5)  # rank 0 is leaving, and the others with it
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


def _ask_where(running: list[Rank]) -> str:
    """Has each rank write its stack to its log, and says in a line where each is: those at one place together."""
    before = {rank.rank: rank.log.stat().st_size for rank in running}
    for rank in running:
        os.kill(rank.process.pid, signal.SIGUSR2)  # not to what it has started
    earlier: dict[int, str] | None = None
    stacks: dict[int, str] = {}
    deadline = time.monotonic() + STACK_SECONDS
    # Until each has answered and no answer grows.
    while time.monotonic() < deadline and not (stacks == earlier and all(map(FRAME.search, stacks.values()))):
        time.sleep(4 * POLL_SECONDS)
        earlier, stacks = stacks, {rank.rank: text_of(rank.log, start=before[rank.rank]) for rank in running}
    places: dict[str, list[int]] = {}
    for number, stack in stacks.items():
        places.setdefault(place(stack), []).append(number)
    return "; ".join(f"rank{'s' * (len(at) > 1)} {', '.join(map(str, at))} {where}" for where, at in places.items())
