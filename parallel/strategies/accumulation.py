"""Gradient accumulation: one microbatch after the other, where there is no pipeline to run them in."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from parallel.transformer import Transformer


class Accumulation:
    """Forward and backward of a whole step; gradients are added to .grad.

    loss: logits and targets of a microbatch -> scalar, a sum over tokens already divided by the number of tokens of the
    step. before: is called before each microbatch, with whether it is the last.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        micro_batch: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        before: Callable[[bool], None] | None = None,
    ) -> None:
        self.model, self.micro_batch, self.loss, self.before = model, micro_batch, loss, before

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (replica_batch, T). Returns the sum of the microbatches' losses, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        starts = range(0, len(tokens), self.micro_batch)
        for start in starts:
            if self.before is not None:
                self.before(start == starts[-1])
            rows = slice(start, start + self.micro_batch)  # the last microbatch may be short
            with record_function("forward"):
                loss = self.loss(self.model(tokens[rows]), targets[rows])
            with record_function("backward"):
                loss.backward()
            total += loss.detach()
        return total
