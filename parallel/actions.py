"""What a rank of a pipeline does, as it is told to whoever observes."""

from typing import NamedTuple


class Action(NamedTuple):
    """What a rank of the pipeline does with one microbatch."""

    name: str  # forward; backward, or where that is split backward_input and backward_weight
    stage: int
    microbatch: int
