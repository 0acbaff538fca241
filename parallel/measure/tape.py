"""What a rank does in a step, in its order: operators, messages, and who waits for what. Numbers alone, without torch.

A stream is a queue of a device, by number: 0 is that on which the rank computes. A point is the end of something, by
number: of a message, or of all that a stream was given before it was marked.
"""

from typing import Literal, NamedTuple

from parallel.actions import Action

Kind = Literal["product", "attention", "attention_backward", "bytes", "view"]


class Operator(NamedTuple):
    """shape: of a product (matrices, m, n, inner); of attention (heads, queries, keys, head_dim, 1 if causal)."""

    stream: int
    kind: Kind  # a view takes the host alone
    shape: tuple[int, ...] = ()
    element_bytes: int = 1
    n_bytes: int = 0  # read and written, of kind bytes
    updates: bool = False  # the weights: from the norm of the gradients on


class Message(NamedTuple):
    """n_bytes: what an all-gather gives, a reduce-scatter takes, each rank puts into any other."""

    stream: int  # that it waits for
    dim: str  # of the mesh
    collective: str
    n_bytes: int
    ranks: int  # that take part, so far apart:
    stride: int
    point: int
    blocks: bool  # that stream then waits for it


class Mark(NamedTuple):
    stream: int
    point: int


class Wait(NamedTuple):
    stream: int
    point: int


class Begin(NamedTuple):
    action: Action  # of a pipeline


class End(NamedTuple):
    action: Action


Event = Operator | Message | Mark | Wait | Begin | End
