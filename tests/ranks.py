"""Real gloo ranks for tests: processes that start once and then serve one test function after another.

    results = ranks(4, function, *arguments)   # function(*arguments) runs on each rank; its returns, by rank

`function` must be importable (top level of a test module). A rank that raises fails the test with its traceback; a
test that hangs is ended after `timeout_seconds` with the stack of each rank. A rank that native code ends leaves its
core, and the native stack of each of its threads, in runs/cores/.
"""

import faulthandler
import gc
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Ranks start afresh, in a moment, after so many calls, for torch 2.11 never lets go of DTensor's strategies and what
# they hold; and with so many threads, for other engines never let go of their groups.
MOST_CALLS, MOST_THREADS = 250, 40
PRELOADED = ["ranks", "pytest", "parallel.training", "torch.distributed.tensor.debug"]
CORES = Path(__file__).parents[1] / "runs" / "cores"


class RankDied(AssertionError):
    """Native code has ended a rank."""


def _serve(rank: int, calls: Connection, log: str) -> None:
    # One file per rank for whatever native code prints, and for the stacks of a hang.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    os.makedirs(f"{log}.cwd")
    os.chdir(f"{log}.cwd")  # where Linux leaves a core, if nobody has told it otherwise
    import torch.distributed as dist
    from torch.distributed.tensor import debug

    import parallel.training  # noqa: F401  # with all of torch that most tests need
    from parallel.torch_private import one_thread_per_gloo_group

    gc.freeze()  # what is imported stays: collections need not go through it
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, world_size, store, timeout_seconds = calls.recv()
        except EOFError:
            os._exit(0)
        faulthandler.dump_traceback_later(timeout_seconds - 1, file=sys.stderr)
        try:
            with one_thread_per_gloo_group():
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout_seconds),
                )
                answer = ("returned", function(*arguments))
            dist.barrier()  # no group ends while a peer still listens
        except BaseException:
            answer = ("raised", traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        calls.send(answer)
        if answer[0] == "returned":
            del function, arguments, answer
            dist.destroy_process_group()
            # DTensor's caches remember meshes, and an equal mesh of the next test would get this one's dead groups.
            debug._clear_sharding_prop_cache()
            # A gloo group has threads until the last mesh, model or bucket that holds it is gone, and these are cycles
            # of which one collection does not free all. (DTensor keeps one mesh of each shape for ever, not more.)
            while gc.collect():
                pass


class Ranks:
    """A pool of gloo ranks; calling it runs one function on the first `world_size` of them."""

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection, str]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.n_calls = 0
        self.may_die = True

    def __call__(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 240
    ) -> list[Any]:
        try:
            return self._call(world_size, function, arguments, timeout_seconds)
        except RankDied as error:
            # One of thousands of ranks used to die amid a step in two of some ten runs of all tests. A core told why
            # (one_thread_per_gloo_group mends it). Until many runs have shown that this was all, one death is
            # forgiven, and told at the end; a defect of ours would kill again.
            if not self.may_die:
                raise
            self.may_die = False
            warnings.warn(f"tried again, for a rank had died: {error}", stacklevel=2)
            return self._call(world_size, function, arguments, timeout_seconds)

    def _call(
        self, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_seconds: float
    ) -> list[Any]:
        if self.n_calls % MOST_CALLS == MOST_CALLS - 1 or self._n_threads() > MOST_THREADS:
            self.close()
        self._grow(world_size)
        self.n_calls += 1
        store = str(Path(self.folder.name) / f"store-{self.n_calls}")
        team = self.workers[:world_size]
        for _, calls, _ in team:
            calls.send((function, arguments, world_size, store, timeout_seconds))
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout_seconds
        waiting = {calls: rank for rank, (_, calls, _) in enumerate(team)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for calls in wait(list(waiting), timeout=left):
                assert isinstance(calls, Connection)
                rank = waiting.pop(calls)
                try:
                    answers[rank] = calls.recv()
                except (EOFError, ConnectionResetError):
                    process = self.workers[rank][0]
                    process.join(60)  # a core takes time to write
                    stacks = native_stacks(Path(f"{self.workers[rank][2]}.cwd"))
                    answers[rank] = ("died", f"ended with {process.exitcode}\n{self._log_tail(rank)}\n{stacks}")
                if answers[rank][0] != "returned":  # its peers may wait for it for ever: give them 2 s to say why too
                    deadline = min(deadline, time.monotonic() + 2)
        failures = [  # first those that died: the others have lost them
            f"rank {rank}: {what}"
            for of_kind in ("died", "raised")
            for rank, (kind, what) in sorted(answers.items())
            if kind == of_kind
        ]
        if waiting and not failures:
            failures = [f"rank {rank} hangs:\n{self._log_tail(rank)}" for rank in waiting.values()]
        if failures:
            self.close()
            died = any(kind == "died" for kind, _ in answers.values())
            raise (RankDied if died else AssertionError)("\n".join(failures))
        return [answers[rank][1] for rank in range(world_size)]

    def _grow(self, world_size: int) -> None:
        # Forked from one process that has imported everything: ranks that import it themselves take 2 s of a core each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # what is forked must have one thread
            os.environ.setdefault(name, "1")
        while len(self.workers) < world_size:
            rank = len(self.workers)
            ours, theirs = context.Pipe()
            log = str(Path(self.folder.name) / f"rank-{rank}-{time.monotonic_ns()}.log")
            process = context.Process(target=_serve, args=(rank, theirs, log), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours, log))

    def _n_threads(self) -> int:
        """Of the rank that has most; 0 where the system does not say."""
        tasks = [Path("/proc") / str(process.pid) / "task" for process, _, _ in self.workers]
        return max((len(os.listdir(folder)) for folder in tasks if folder.is_dir()), default=0)

    def _log_tail(self, rank: int) -> str:
        return Path(self.workers[rank][2]).read_text(errors="replace")[-6000:]

    def close(self) -> None:
        for process, calls, _ in self.workers:
            process.kill()
            process.join()
            calls.close()
        self.workers.clear()


def native_stacks(folder: Path) -> str:
    """What gdb reads from the core in `folder`: the native stack of each thread. Both are kept in CORES."""
    cores = list(folder.glob("core*"))
    if not cores:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
        return f"it left no core (core_pattern is {pattern!r}, limits {resource.getrlimit(resource.RLIMIT_CORE)})"
    CORES.mkdir(parents=True, exist_ok=True)
    core = CORES / f"{folder.stem}.core"
    shutil.move(cores[0], core)
    if shutil.which("gdb") is None:
        return f"{core}: no gdb here to read it (apt-get install gdb)"
    command = ["gdb", "--batch", "-nx", "-ex", "bt 60", "-ex", "thread apply all bt 25", sys.executable, str(core)]
    answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    text = answer.stdout[answer.stdout.find("Core was generated") :]
    core.with_suffix(".txt").write_text(f"{answer.stdout}\n{answer.stderr}")
    return f"{core}\n{text[:12000]}"
