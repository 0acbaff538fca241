"""What a run says of its steps: in steps.jsonl, on the terminal, in the record; and when it must end."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.measure.counters import Counters
from parallel.measure.flops import model_flops_per_token
from parallel.measure.observer import Observer, Step
from parallel.measure.record import Record, finite, naming, read_steps
from parallel.process import say
from parallel.recipe import Recipe

KEPT_STEPS = 10_000  # in the record, evenly spaced
NARROW = 80  # columns of a terminal
MOST_SKIPPED = 10  # steps in a row


class Diverged(ArithmeticError):
    """Nothing that is computed from here on means anything."""


class FiniteCheck(Observer):
    """Ends the run, with Diverged, at the first loss or gradient norm that is no finite number.

    skips: steps whose norm is none are left out by the engine; MOST_SKIPPED in a row end the run.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self._may_skip = MOST_SKIPPED if skips else 0
        self._skipped = 0

    def read(self, step: Step) -> None:
        loss, norm = step.loss.item(), step.grad_norm.item()
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if 0 < self._skipped <= self._may_skip:
            say(f"warning: step {step.number} is left out: loss {loss:g}, gradient norm {norm:g}")
        elif not (math.isfinite(loss) and math.isfinite(norm)):
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

    def read(self, step: Step) -> None:
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
    """Rank 0 prints a line a step.

        step  7/15  loss 4.8123  grad 1.23  0.448 s  4571 tokens/s  MFU 28.1 %  48.0 MiB

    peak: of a rank's device, FLOP/s; None where it is not known. MFU is that of this one step, and the memory the peak
    of this rank, once a step has been counted.
    """

    def __init__(self, recipe: Recipe, *, peak: float | None, counters: Counters) -> None:
        train = recipe.train
        self._n_steps, self._tokens = train.steps, train.global_batch * train.seq_len
        flops = self._tokens * model_flops_per_token(recipe.model, seq_len=train.seq_len).full
        self._least_seconds = None if peak is None else flops / (recipe.world_size * peak)
        self._counters = counters

    def read(self, step: Step) -> None:
        if dist.get_rank() == 0:
            say(self._line(step))

    def _line(self, step: Step) -> str:
        parts = [f"step {step.number:{len(str(self._n_steps))}}/{self._n_steps}", f"loss {step.loss:.4f}"]
        parts += [
            f"grad {step.grad_norm:#.3g}",
            f"{step.seconds:#.3g} s",
            f"{self._tokens / step.seconds:.0f} tokens/s",
        ]
        if self._least_seconds is not None and self._least_seconds <= step.seconds:
            parts.append(f"MFU {100 * self._least_seconds / step.seconds:#.3g} %")
        if self._counters.measures and (peak_bytes := peak_of(self._counters.measures.memory)):
            unit, size = ("GiB", 2**30) if peak_bytes >= 2**30 else ("MiB", 2**20)
            parts.append(f"{peak_bytes / size:#.3g} {unit}")
        line = "  ".join(parts)
        return line if len(line) <= NARROW else " ".join(parts)


def peak_of(memory: Mapping[str, Any]) -> int | None:
    """Of live tensors or, where compiled code hides them, of the allocator."""
    return memory.get("peak_bytes") or memory.get("allocator_peak_bytes")
