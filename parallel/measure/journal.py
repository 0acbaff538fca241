"""What a run says of its steps: in steps.jsonl, on the terminal, in the record; and when it must end."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.measure.observer import Observer, Step
from parallel.measure.record import Record, finite, naming, read_steps
from parallel.process import say

KEPT_STEPS = 10_000  # in the record, evenly spaced


class Diverged(ArithmeticError):
    """Nothing that is computed from here on means anything."""


class FiniteCheck(Observer):
    """Ends the run, with Diverged, at the first loss or gradient norm that is no finite number."""

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        yield
        loss, norm = step.loss.item(), step.grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"step {step.number} gave loss {loss:g} and gradient norm {norm:g}; the run has diverged")


class Journal(Observer):
    """A line of steps.jsonl for each step, and the steps of the record: all, or of a long run evenly spaced ones.

    Steps from first_step on that are there already are of a life of the run that was lost, and are removed. told: is
    called with each line on rank 0, too.
    """

    def __init__(
        self, path: Path, *, first_step: int = 1, told: Callable[[Mapping[str, Any]], None] = lambda row: None
    ) -> None:
        self._path, self._told = path, told
        self._rows: list[dict[str, Any]] = []
        self._n_steps, self._stride = 0, 1
        if dist.get_rank() == 0 and path.exists():
            earlier = [row for row in read_steps(path) if row["step"] < first_step]
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in earlier), encoding="utf-8")
            os.replace(partial, path)
            for row in earlier:
                self._keep(row)

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        yield
        loss, norm = step.loss.item(), step.grad_norm.item()
        row = {"step": step.number, "loss": loss, "grad_norm": norm, "seconds": step.seconds}
        if dist.get_rank() == 0:
            with naming(self._path), self._path.open("a") as file:
                file.write(json.dumps(finite(row)) + "\n")
            self._told(finite(row))
        self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        if self._n_steps % self._stride == 0:
            self._rows.append(row)
        self._n_steps += 1
        if len(self._rows) > KEPT_STEPS:
            self._rows, self._stride = self._rows[::2], 2 * self._stride
        self._last = row

    def report(self, record: Record) -> None:
        record.steps = self._rows + ([self._last] if self._rows and self._rows[-1] is not self._last else [])


class Progress(Observer):
    """Rank 0 prints a line a step."""

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        yield
        number = f"{step.number:{len(str(self._n_steps))}}/{self._n_steps}"
        say(f"step {number}  loss {step.loss:.4f}  grad_norm {step.grad_norm:.4f}  {step.seconds:.3f} s")
