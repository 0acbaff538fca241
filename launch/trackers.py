"""Trackers: Weights & Biases and TensorBoard are told what steps.jsonl and record.json say, where [track] asks for it.

    DIR/<name>/wandb/           W&B's own files, whether they are sent or not        track.wandb = "offline" | "online"
    DIR/<name>/tensorboard/     event files                                          track.tensorboard = true

Each works on a thread of its own, of rank 0 alone: whatever it waits for, or fails of, training does not. To add one:
docs/trackers.md.
"""

import contextlib
import functools
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launch.folder import variant_order
from launch.redaction import without_secrets
from launch.terminal import printable
from parallel.measure.record import Labels, read_record
from parallel.recipe import Recipe

CONNECT_SECONDS = 10.0  # for W&B's first answer; 90 by its default
FINISH_SECONDS = 20.0  # after a run that went well: for what is still to be sent
FAILED_SECONDS = 4.0  # after any other: its launcher will soon end it


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run, or a whole comparison, as it is known before the first step."""

    name: str
    folder: Path
    config: Mapping[str, Any]  # the resolved recipe; of a comparison nothing
    group: str | None  # the comparison
    say: Callable[[str], None]  # takes a line for whoever looks at the terminal
    goes_on: bool = False  # a life of the run after the first
    labels: Labels = field(default_factory=Labels.of_environment)

    def warn(self, text: str) -> None:
        self.say(f"warning: {printable(without_secrets(' '.join(text.split())))[:500]}")


class Tracker(Protocol):
    """Is made and called on one thread. What it raises is said in a line, and is the end of it."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A line of steps.jsonl: {step, loss, grad_norm, seconds}; of a run that goes on, some steps come again."""

    def finish(self, record: Mapping[str, Any], files: Sequence[Path]) -> None:
        """The result, whatever came of the run. Of a comparison: its status, and the record of each variant by name.

        files: record.json; of a comparison the table and the page.
        """


class Wandb:
    """One run of W&B: the recipe is its config, a line a step its history, the record its summary and an artifact.

    Online without an answer it keeps the run in files, as it does offline. W&B itself adds the use of this host by
    rank 0; its inventory of host, user, command line and packages is turned off.
    """

    def __init__(self, subject: Subject, mode: str) -> None:
        import wandb

        self._subject = subject
        folders = subject.folder.glob("wandb/*run-*-*") if subject.goes_on else ()
        ids = [folder.name.rpartition("-")[2] for folder in folders]  # of the one run that its lives are
        self._id = ids[0] if ids else uuid.uuid4().hex[:8]
        try:
            self._run = self._begin(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            subject.warn(f"W&B does not answer, and the run is kept in {subject.folder}/wandb for wandb sync: {error}")
            wandb.teardown()  # its own process holds the run that has failed
            self._run = self._begin("offline")

    def _begin(self, mode: str) -> Any:
        import wandb

        subject = self._subject
        settings: dict[str, Any] = dict(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            finish_timeout=FINISH_SECONDS / 2,
            init_timeout=CONNECT_SECONDS,
            silent=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,  # else a process that is killed leaves nothing
        )
        return wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else "parallel-lab",
            dir=str(subject.folder),
            mode=mode,  # type: ignore[arg-type]
            id=self._id,
            resume="allow" if mode == "online" else None,
            name=subject.name,
            group=subject.group,
            job_type="run" if subject.config else "comparison",
            tags=subject.labels.tags,
            notes=subject.labels.note,
            config=dict(subject.config),
            settings=wandb.Settings(**settings),
        )

    def step(self, row: Mapping[str, Any]) -> None:
        values = {key: value for key, value in row.items() if key != "step" and value is not None}
        self._run.log(values, step=row["step"], commit=True)  # of a step that it knows it takes no second

    def finish(self, record: Mapping[str, Any], files: Sequence[Path]) -> None:
        import wandb

        self._run.summary.update(summary_of(record))
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self._subject.name)
        artifact = wandb.Artifact(f"{name}-result", type="result")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)
        self._run.finish(exit_code=int(record["status"] != "ok"))
        wandb.teardown()  # else its own process may still have a part of the file when this one ends


class TensorBoard:
    """Event files: a scalar for each figure of a step, and for each number of the record; the recipe and the rest are
    text. The variants of a comparison are runs of `tensorboard --logdir` its folder.
    """

    def __init__(self, subject: Subject, _on: bool) -> None:
        from tensorboardX import SummaryWriter

        self._config, self._last = subject.config, 0
        self._open = functools.partial(SummaryWriter, str(subject.folder / "tensorboard"), flush_secs=1)

    @functools.cached_property
    def _writer(self) -> Any:
        writer = self._open(purge_step=self._last)  # hides what a life before has written from that step on
        if self._config:
            writer.add_text("recipe", _markdown(summary_of(self._config)), 0)
        return writer

    def step(self, row: Mapping[str, Any]) -> None:
        self._last = row["step"]
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, self._last)

    def finish(self, record: Mapping[str, Any], files: Sequence[Path]) -> None:
        summary = summary_of(record)
        for key, value in summary.items():
            if not isinstance(value, str):
                self._writer.add_scalar(f"record/{key}", value, self._last)
        self._writer.add_text("record", _markdown(summary), self._last)
        self._writer.close()


# By the keys of [track]; each is made with its subject and the value of its key.
TRACKERS: dict[str, Callable[[Subject, Any], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def summary_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is one number or text of a record, as "throughput/tokens_per_s"; the recipe is told before."""
    summary: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            summary |= {} if key in ("recipe", "layout", "labels") else summary_of(value, f"{prefix}{key}/")
        elif value is not None and not isinstance(value, list):
            summary[f"{prefix}{key}"] = value
    return summary


def _markdown(values: Mapping[str, Any]) -> str:
    rows = (f"| {key} | {printable(value)} |" for key, value in values.items())
    return "\n".join(["| key | value |", "|---|---|", *rows])


# ---- at work -------------------------------------------------------------------------------------------------------


class Background:
    """A tracker on a thread of its own."""

    def __init__(self, key: str, value: Any, subject: Subject) -> None:
        self._key, self._warn = key, subject.warn
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        make = functools.partial(TRACKERS[key], subject, value)
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # whatever a library thinks of
            self._warn(f"track.{self._key} is told no more of this run: {type(error).__name__}: {error}")

    def step(self, row: Mapping[str, Any]) -> None:
        if self._thread.is_alive():
            self._calls.put(lambda tracker: tracker.step(row))

    def finish(self, record: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._calls.put(lambda tracker: tracker.finish(record, files))
        self._calls.put(None)

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"track.{self._key} was not done in time, and may lack the end of this run")


def _begin(asked: Mapping[str, Any], subject: Subject) -> list[Background]:
    return [Background(key, value, subject) for key, value in asked.items()]


def _finish(trackers: Sequence[Background], record: Mapping[str, Any], files: Sequence[Path]) -> None:
    deadline = time.monotonic() + (FINISH_SECONDS if record["status"] == "ok" else FAILED_SECONDS)
    for tracker in trackers:
        tracker.finish(record, [file for file in files if file.exists()])
    for tracker in trackers:
        tracker.wait(deadline)


@contextlib.contextmanager
def tracking(recipe: Recipe, folder: Path, *, goes_on: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within, the run in `folder` is tracked: what it gives is to be called with each row. Then there is a record."""
    asked = {key: getattr(recipe.track, key) for key in recipe.track.chosen}
    group = folder.absolute().parent.name if folder.name in variant_order(folder.parent) else None
    say, config = functools.partial(print, flush=True), recipe.resolved()
    subject = Subject(name=recipe.name, folder=folder, config=config, group=group, say=say, goes_on=goes_on)
    trackers = _begin(asked, subject)

    def tell(row: Mapping[str, Any]) -> None:
        for tracker in trackers:
            tracker.step(row)

    try:
        yield tell
    finally:
        if trackers:
            file = folder / "record.json"
            _finish(trackers, read_record(file), [file])


def track_comparison(
    folder: Path, recipes: Sequence[Recipe], records: Mapping[str, Mapping[str, Any]], *, say: Callable[[str], None]
) -> None:
    """Tells the trackers of its variants of a comparison that is done. records: by variant."""
    asked = {key: getattr(recipe.track, key) for recipe in reversed(recipes) for key in recipe.track.chosen}
    name = folder.absolute().name
    trackers = _begin(asked, Subject(name=name, folder=folder, config={}, group=name, say=say))
    if trackers:
        files = [folder / file for file in ("comparison.json", "table.txt", "page.html")]
        _finish(trackers, {"status": "ok", **records}, files)
