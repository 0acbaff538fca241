"""Gradient accumulation: one microbatch after the other, where there is no pipeline to run them in."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from parallel.transformer import Transformer


@dataclass(kw_only=True)
class Accumulation:
    """Forward and backward of a whole step; gradients are added to .grad."""

    model: Transformer  # its loss is in shares of the step's
    micro_batch: int
    before: Callable[[bool], None] | None  # is called before each microbatch, with whether it is the last

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (replica_batch, T). Returns the sum of the microbatches' losses, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        starts = range(0, len(tokens), self.micro_batch)
        for start in starts:
            if self.before is not None:
                self.before(start == starts[-1])
            rows = slice(start, start + self.micro_batch)  # the last microbatch may be short
            with record_function("forward"):
                loss = self.model(tokens[rows], targets[rows])
            with record_function("backward"):
                loss.backward()
            total += loss.detach()
        return total
