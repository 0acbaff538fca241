"""What a rank of a pipeline does with one microbatch, as it is told to whoever observes."""

from typing import NamedTuple


class Action(NamedTuple):
    name: str  # forward; backward, or where that is split backward_input and backward_weight
    stage: int
    microbatch: int
