"""Who watches a run: the clock, the trackers, the progress line and all else that is no part of training."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

from parallel.actions import Action
from parallel.measure.record import Record


@dataclass
class Step:
    """One optimizer step, as far as it has come."""

    number: int  # from 1
    loss: Tensor = field(init=False)  # mean over the global batch; on the host, a number when the step is done
    grad_norm: Tensor = field(init=False)  # before clipping; the same
    began: float = field(init=False)  # time.time(); this and the next when the clock has read them
    seconds: float = field(init=False)


class Observer:
    """Sees every step of a rank. Its methods do nothing; override those that are of use.

    Observers are nested as they are listed: the first begins first and ends last.
    """

    def step(self, step: Step) -> AbstractContextManager[None]:
        """The step happens within; on CUDA it is queued there, and may be done later."""
        return contextlib.nullcontext()

    def read(self, step: Step) -> None:
        """The step is done, and has its numbers. The last observer is told first."""

    def around(self, action: Action) -> AbstractContextManager[None]:
        """An action of the pipeline happens within."""
        return contextlib.nullcontext()

    def report(self, record: Record) -> None:
        """Gives its section after the last step; on every rank, in the order of the list: some are collective."""


@contextlib.contextmanager
def nested(contexts: Iterable[AbstractContextManager[object]]) -> Iterator[None]:
    """Within all of `contexts`, entered in their order."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
