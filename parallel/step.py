"""One optimizer step, the same in a run and in a dry run, and what can be counted of it."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from parallel.assemble import Assembled
from parallel.measure.flops import FlopCounter
from parallel.measure.memory import UNTRACKED, MemoryTracker, allocator_peaks, reset_allocator_peaks
from parallel.measure.timeline import Action, ideal_bubble
from parallel.measure.traffic import TrafficLog

MEASURED_STEP = 1  # the second: the optimizer has its state by then, and no time is taken of a warm-up step


class Measures(NamedTuple):
    """Of one step of one rank."""

    flops: int
    memory: dict[str, Any]  # peak_bytes, and parameters_bytes, ... at that peak; the CUDA allocator's own peaks
    traffic: list[dict[str, Any]] | None  # {mesh_dim, collective, calls, bytes_per_rank}
    actions: list[Action]  # of the pipeline, in order


def make_optimizer(model: Assembled) -> torch.optim.AdamW:
    """AdamW over this rank's parameters, as the recipe asks for it."""
    train = model.recipe.train
    return torch.optim.AdamW(
        [parameter for _, parameter in model.named_parameters()],
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        fused=train.adamw == "fused",
        foreach=train.adamw == "foreach",
    )


def train_step(
    model: Assembled, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean loss of the global batch and the global gradient norm, on every rank."""
    model.zero_gradients()
    loss = model.forward_backward(tokens, targets)
    norm = model.gradient_norm()
    if model.recipe.train.grad_clip:
        model.clip_gradients(norm=norm, largest=model.recipe.train.grad_clip)
    with record_function("optimizer"):
        optimizer.step()
    return loss, norm


def measured_step(
    model: Assembled, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Measures]:
    """A train_step under the trackers, which slow it down; on real or on fake tensors. Never the first step: that one
    makes the optimizer's state. Compiled code makes tensors where no tracker sees them: there FLOPs alone are counted,
    and memory and traffic are None but for the allocator's own peaks.
    """
    actions: list[Action] = []

    def note(action: Action) -> contextlib.AbstractContextManager[None]:
        if actions[-1:] != [action]:  # a loss goes on with the last stage's forward
            actions.append(action)
        return contextlib.nullcontext()

    reset_allocator_peaks(tokens.device)
    with observed(model, note), FlopCounter() as flops:
        if model.recipe.train.compile != "none":
            loss, norm = train_step(model, optimizer, tokens, targets)
            return loss, norm, Measures(flops.flops, UNTRACKED | allocator_peaks(tokens.device), None, actions)
        parameters = [parameter for _, parameter in model.named_parameters()]
        with (
            TrafficLog(model.mesh) as traffic,
            MemoryTracker(parameters, optimizer, device=tokens.device) as memory,
        ):
            loss, norm = train_step(model, optimizer, tokens, targets)
    peaks = memory.peak() | allocator_peaks(tokens.device)
    return loss, norm, Measures(flops.flops, peaks, traffic.rows(), actions)


@contextlib.contextmanager
def observed(model: Assembled, observer: Callable[[Action], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Within, `observer` learns of each action of the pipeline; there is nothing to learn where there is none."""
    if model.pipeline is None:
        yield
        return
    before, model.pipeline.observer = model.pipeline.observer, observer
    try:
        yield
    finally:
        model.pipeline.observer = before


def pipeline_section(of_ranks: Iterable[Sequence[Action]], *, n_stages: int) -> dict[str, Any]:
    """The `pipeline` of a record, of which nothing is measured yet, from the actions of ranks of every kind."""
    orders = {frozenset(action.stage for action in actions): actions for actions in of_ranks if actions}
    complete = sum(map(len, orders)) == n_stages > 1
    return {
        "bubble_fraction": None,
        "bubble_fraction_ideal": ideal_bubble(list(orders.values())) if complete else None,
        "timeline": None,
    }


def largest_traffic(of_ranks: Sequence[list[dict[str, Any]] | None]) -> list[dict[str, Any]] | None:
    """The `traffic` of a record: of each kind of message, the row of the rank that sends most."""
    known = [rows for rows in of_ranks if rows is not None]
    if len(known) < len(of_ranks):
        return None
    largest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in itertools.chain(*known):
        key = (row["mesh_dim"], row["collective"])
        if key not in largest or (row["bytes_per_rank"] or 0) > (largest[key]["bytes_per_rank"] or 0):
            largest[key] = row
    return [row for _, row in sorted(largest.items())]
