"""One optimizer step, the same in a run and in a dry run, and what can be counted of it."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.assemble import Assembled
from parallel.measure.flops import FlopCounter
from parallel.measure.memory import MemoryTracker, allocator_peaks, reset_allocator_peaks
from parallel.measure.traffic import TrafficLog


class Measures(NamedTuple):
    """Of one step of one rank."""

    flops: int
    memory: dict[str, Any]  # peak_bytes, and parameters_bytes, ... at that peak; the CUDA allocator's own peaks
    traffic: list[dict[str, Any]]  # {mesh_dim, collective, calls, bytes_per_rank}


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
    optimizer.step()
    return loss, norm


def measured_step(
    model: Assembled, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Measures]:
    """A train_step under the trackers, which slow it down; on real or on fake tensors. Never the first step: that one
    makes the optimizer's state. Compiled code makes tensors where no tracker sees them: there FLOPs alone are counted,
    and memory and traffic are empty.
    """
    if model.recipe.train.compile != "none":
        with FlopCounter() as flops:
            loss, norm = train_step(model, optimizer, tokens, targets)
        return loss, norm, Measures(flops.flops, {}, [])
    parameters = [parameter for _, parameter in model.named_parameters()]
    reset_allocator_peaks(tokens.device)
    with (
        FlopCounter() as flops,
        TrafficLog(model.mesh) as traffic,
        MemoryTracker(parameters, optimizer, device=tokens.device) as memory,
    ):
        loss, norm = train_step(model, optimizer, tokens, targets)
    return loss, norm, Measures(flops.flops, memory.peak() | allocator_peaks(tokens.device), traffic.rows())


def largest_traffic(of_ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The `traffic` of a record: of each kind of message, the row of the rank that sends most."""
    largest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in itertools.chain(*of_ranks):
        key = (row["mesh_dim"], row["collective"])
        if key not in largest or (row["bytes_per_rank"] or 0) > (largest[key]["bytes_per_rank"] or 0):
            largest[key] = row
    return [row for _, row in sorted(largest.items())]
