"""Who executes a step: what the loop, the proof and the measures ask of it."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.assemble import attention_kernel
from parallel.measure.observer import Observer, Step, nested
from parallel.recipe import Recipe


class Engine(Protocol):
    name: str  # and its version, where that is not this library's
    recipe: Recipe
    mesh: DeviceMesh  # of build_mesh
    optimizer: torch.optim.Optimizer
    observers: list[Observer]  # of the actions of a pipeline
    settled_step: int  # the first that does and holds what every later one does
    waits_in_python: bool  # for messages, on a CPU: no clock sees those of C++

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Computes those of the mean loss of the global batch; that loss, on every rank.

        tokens, targets: what this rank's replica trains on in one step, int64 (replica_batch, seq_len).
        """

    def update(self) -> Tensor:
        """Clips, takes the optimizer's step; the global gradient norm before clipping, on every rank."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's, under their names in the whole model; two copies of one weight bear the same name."""

    def gradient(self, name: str) -> list[Tensor]:
        """This rank's gradients of the parameter of that name, since `gradients`: none, one, or one of each copy.

        Each is a DTensor that knows which part of the whole it is, or whole.
        """

    def holds(self) -> dict[str, list[Tensor]]:
        """What this rank keeps beside parameters, their .grad and the optimizer's state, by category of its memory."""


@runtime_checkable
class Resumable(Protocol):
    """An engine that takes [checkpoint]."""

    def state(self) -> dict[str, Tensor]:
        """All that training changes: parameters by name, and the optimizer's state as "<name>.<its key>"."""

    def load_state(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Hands `read` the whole `state`, before a first step too, to be filled in place. Collective."""


def adamw(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    train = recipe.train
    return torch.optim.AdamW(
        list(parameters),
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        fused=train.adamw == "fused",
        foreach=train.adamw == "foreach",
    )


def averaged_times(recipe: Recipe) -> int:
    """What a library divides gradients by that averages over microbatches and over replicas."""
    return recipe.n_microbatches * recipe.replicas


def scale_of_averages(recipe: Recipe, averaged: int) -> float:
    """That of a loss, a sum over tokens, whose average is the step's: so a short last microbatch counts as it is."""
    return averaged / (recipe.train.global_batch * recipe.train.seq_len)


def over_microbatches(
    recipe: Recipe,
    mesh: DeviceMesh,
    tokens: Tensor,
    targets: Tensor,
    *,
    averaged: int,
    one: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The step's loss, on every rank. one: forward and backward of the i-th microbatch, and its loss."""
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    microbatches = (tensor.split(recipe.micro_batch) for tensor in (tokens, targets))
    with attention_kernel(recipe.train.attention):
        for i, (inputs, wanted) in enumerate(zip(*microbatches, strict=True)):
            total += one(i, inputs, wanted).detach()
    dist.all_reduce(total, group=mesh.get_group("data"))
    return total / averaged


@contextlib.contextmanager
def environment(**variables: object) -> Iterator[None]:
    """Within, these are set; what a library sets there, for itself to read, is gone afterwards, too."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_step(engine: Engine, step: Step, batch: Callable[[int], Iterable[Tensor]]) -> None:
    """One optimizer step, within the engine's observers. batch: number of a step -> tokens and targets.

    On CUDA it need not be done: `read_step` waits for that.
    """
    with nested(observer.step(step) for observer in engine.observers):
        loss = engine.gradients(*batch(step.number))
        grad_norm = engine.update()
        step.loss, step.grad_norm = (number.to("cpu", non_blocking=True) for number in (loss, grad_norm))


def read_step(engine: Engine, step: Step) -> None:
    """Tells the observers that a step is done, when it is: a clock among them waits for it."""
    for observer in reversed(engine.observers):
        observer.read(step)
