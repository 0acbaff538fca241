"""When a run saves itself, and how it goes on from what it saved."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel.checkpoint.files import (
    CHECKPOINTS,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    Damaged,
    Stopped,
    candidates,
    read_checkpoint,
    remove_checkpoint,
    step_folder,
    step_folders,
)
from parallel.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from parallel.collectives import gathered
from parallel.measure.clock import Clock
from parallel.measure.record import Record
from parallel.mesh import local_part
from parallel.process import say
from parallel.recipe import Recipe, RecipeError

State = dict[str, Tensor]


class Saver:
    """Saves the run every n steps, after the last, and where a signal has asked any rank for the end.

    Steps happen within it, and `after` is called after each. Collective, as the steps are.
    state: the engine's. about: what the manifest says of the run. asked: signals that came to this rank, as they come.
    """

    def __init__(
        self,
        recipe: Recipe,
        state: Callable[[], State],
        *,
        run: Path,
        about: Mapping[str, Any],
        clock: Clock,
        device: torch.device,
        asked: Sequence[int] = (),
    ) -> None:
        self._recipe, self._state, self._run, self._about = recipe, state, run, about
        self._clock, self._device, self._asked = clock, device, asked
        limit = timedelta(seconds=recipe.train.time_limit_seconds)
        self._group = dist.new_group(backend="gloo", timeout=limit)  # torch's planner talks while training does
        # Hosts agree among themselves, or they would wait for all that their GPUs have still to do.
        self._hosts = dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else dist.group.WORLD
        self._copies: list[Tensor] = []  # in memory, for what is written in the background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._disturbed = False  # the step that is run now, by what is written in the background
        self._waited: list[float] = []
        self._in_background: list[float] = []
        self._last: Path | None = None
        self.saved: Callable[[float], None] = lambda waited_seconds: None  # told of each save

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Exception):
            self._finish()  # what is under way in the background is of an earlier step than one that failed, and good

    def after(self, number: int, read: Callable[[], None]) -> None:
        """Step `number` has been run. read: waits until it is done, and raises where it must not be saved."""
        last = number == self._recipe.train.steps
        signal, failed = self._agreed()
        if failed:
            self._finish()
        saves = bool(last or signal or number % self._recipe.checkpoint.every == 0)
        if saves:
            read()
            self._save(number)
        if saves or self._disturbed:
            self._clock.leave_out(number, "checkpoint")
        if last or signal:
            self._finish()
        self._disturbed = self._running is not None and not self._running.done()
        if signal and not last:
            raise Stopped(f"stopped by {Signals(signal).name} after step {number}, and saved: --resume goes on")

    def refuse_to_begin(self) -> None:
        """Raises Stopped where a signal has come before the first step."""
        signal, _ = self._agreed()
        if signal:
            raise Stopped(f"stopped by {Signals(signal).name} before its first step: --resume goes on")

    def report(self, record: Record) -> None:
        costs = gathered((self._waited, self._in_background))
        slowest = [[max(of_save) for of_save in zip(*of_ranks, strict=True)] for of_ranks in zip(*costs, strict=True)]
        waited, in_background = (statistics.median(seconds) if seconds else None for seconds in slowest)
        kept = record.checkpoint
        kept.saves, kept.waited_seconds, kept.background_seconds = len(self._waited), waited, in_background
        if self._last is not None and dist.get_rank() == 0:
            kept.bytes = read_checkpoint(self._last).n_bytes

    def _agreed(self) -> tuple[int, int]:
        """A signal that some rank was sent, and whether some rank's save has failed: the same on all ranks.

        No reduction of a step has all ranks in it, so that this is one more, of two numbers.
        """
        failed = self._running is not None and self._running.done() and self._running.exception() is not None
        mine = torch.tensor([max(self._asked, default=0), failed])
        dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._hosts)
        signal, failed = mine.tolist()
        return signal, failed

    def _save(self, number: int) -> None:
        start = time.perf_counter()
        self._finish()  # one at a time
        state, folder = self._state(), step_folder(self._run, number)
        with torch.no_grad():
            parts = {name: local_part(value) for name, value in state.items()}
            if self._recipe.checkpoint.asynchronous:
                parts = self._copied(parts)
        writer = SafetensorsWriter(folder, {"step": number, **self._about}, parts)
        if self._recipe.checkpoint.asynchronous:
            self._running = self._thread.submit(self._write_in_background, state, writer)
        else:
            self._write(state, writer)
        self._waited.append(time.perf_counter() - start)
        self.saved(self._waited[-1])
        self._last = folder

    def _copied(self, parts: State) -> State:
        # Our own, for torch's stager copies through DTensor: four times as long.
        if not self._copies:
            pinned = self._device.type == "cuda"
            self._copies = [torch.empty_like(part, device="cpu", pin_memory=pinned) for part in parts.values()]
        torch._foreach_copy_(self._copies, list(parts.values()))
        return dict(zip(parts, self._copies, strict=True))

    def _finish(self) -> None:
        """Waits for what is written in the background. Raises CheckpointError."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write_in_background(self, state: State, writer: SafetensorsWriter) -> None:
        start = time.perf_counter()
        self._write(state, writer)
        self._in_background.append(time.perf_counter() - start)

    def _write(self, state: State, writer: SafetensorsWriter) -> None:
        try:
            plain = {name: value.detach() for name, value in state.items()}
            dcp.save(plain, storage_writer=writer, process_group=self._group)
            if dist.get_rank() == 0:
                self._remove_old(writer.folder)
        except dcp.CheckpointException as error:  # the same on all ranks, after all have done what they could
            rank, (cause, _) = sorted(error.failures.items())[0]
            if dist.get_rank() == 0:
                with contextlib.suppress(OSError):
                    remove_checkpoint(writer.folder)
            left = [folder.name for folder in candidates(self._run) if folder != writer.folder]
            last = f"the last good one is {left[0]}" if left else "there is none before it"
            reason = f"rank {rank}: {type(cause).__name__}: {cause}"
            raise CheckpointError(f"checkpoint {writer.folder.name} cannot be written ({reason}); {last}") from None

    def _remove_old(self, newest: Path) -> None:
        older = [folder for folder in step_folders(self._run) if folder != newest]
        whole = [folder for folder in older if (folder / MANIFEST).exists()]
        for folder in older:
            if folder not in whole[: self._recipe.checkpoint.keep - 1]:
                remove_checkpoint(folder)


# ---- going on ------------------------------------------------------------------------------------------------------


def last_whole(run: Path) -> Checkpoint | None:
    """The last checkpoint of `run` whose every file is as it was written; None where the run has none at all.

    Each rank looks at its share of the files. Those that are damaged are named. Raises RecipeError where all are.
    Collective.
    """
    folders: list[Path] = gathered(candidates(run))[0]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for folder in folders:
        checkpoint, damage = None, None
        try:
            checkpoint = read_checkpoint(folder)
            looked_at = map(checkpoint.damage, sorted(checkpoint.files)[rank::world_size])
            damage = next((found for found in looked_at if found), None)
        except Damaged as error:
            damage = str(error)
        found = next((theirs for theirs in gathered(damage) if theirs), None)
        if found is None:
            return checkpoint
        say(f"warning: checkpoint {folder.name} is damaged: {found}; looking for the one before")
    if folders:
        remedy = "none of them is whole; start without --resume, in another folder"
        raise RecipeError("checkpoints", str(run / CHECKPOINTS), remedy)
    return None


def load(checkpoint: Checkpoint, into: State) -> None:
    """Fills the tensors of `into`, an engine's state, with those of `checkpoint`. Collective.

    Weights alone, as those that were imported, leave the optimizer's state at zero.
    """
    weights_alone = not any(name.endswith(".exp_avg") for name in checkpoint.tensors)
    if weights_alone:
        for name, value in into.items():
            if name not in checkpoint.tensors:
                value.zero_()
        into = {name: value for name, value in into.items() if name in checkpoint.tensors}
    dcp.load(into, storage_reader=SafetensorsReader(checkpoint))
