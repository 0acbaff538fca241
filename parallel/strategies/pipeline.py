"""Pipeline parallelism: each rank holds some layers, and microbatches flow through them.

    stage 0: embedding, blocks ─ (B, T, D) ─> stage 1: blocks ─ (B, T, D) ─> last stage: blocks, norm, output, loss

`split_pipeline` cuts the model into stages, each a Transformer with fewer parts; `PipelineStep` runs forward and
backward of all microbatches in the order of one of torch.distributed.pipelining's schedules.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from parallel.actions import Action
from parallel.collectives import exchange
from parallel.gradients import local_gradient
from parallel.recipe import Recipe, Schedule
from parallel.torch_private import several_stages_orders
from parallel.transformer import Transformer

SCHEDULE_CLASSES: dict[Schedule, Callable[..., Any]] = {
    "gpipe": pipelining.ScheduleGPipe,  # all forwards, then all backwards (arXiv:1811.06965)
    "1f1b": pipelining.Schedule1F1B,  # one forward, one backward: fewer activations kept (arXiv:2104.04473)
    "interleaved-1f1b": pipelining.ScheduleInterleaved1F1B,  # several stages per rank: a smaller bubble (the same)
    "looped-bfs": pipelining.ScheduleLoopedBFS,  # several stages per rank, breadth first (arXiv:2211.05953)
    "interleaved-zero-bubble": pipelining.ScheduleInterleavedZeroBubble,  # dW fills the bubble (arXiv:2401.10241)
    "zbv": pipelining.ScheduleZBVZeroBubble,  # the same on a V (section 6): a rank holds an early and a late stage
    "dualpipev": pipelining.ScheduleDualPipeV,  # the V of DualPipe (arXiv:2412.19437)
}


def stage_layers(*, n_layers: int, n_stages: int) -> list[range]:
    """The layers of each stage, in order; their numbers differ by at most one."""
    least, n_larger = divmod(n_layers, n_stages)
    assert least, "a stage without a layer; the recipe refuses this"
    # The larger stages stand just before the last: the last also has the output projection, and the earliest keep
    # the activations of the most microbatches.
    sizes = [least + (n_stages - 1 - n_larger <= stage < n_stages - 1) for stage in range(n_stages)]
    ends = [sum(sizes[: stage + 1]) for stage in range(n_stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def stages_of_rank(recipe: Recipe, pp_rank: int) -> list[int]:
    """The stages that a rank of the pipeline holds: r, r + pp, r + 2·pp, ..., or r and 2·pp - 1 - r on a V."""
    if recipe.pipeline.is_v:
        return [pp_rank, recipe.n_stages - 1 - pp_rank]
    return list(range(pp_rank, recipe.n_stages, recipe.parallel.pp))


def schedule_orders(recipe: Recipe) -> list[list[Action]]:
    """What each rank of the pipeline does in a step, in order."""
    pp, m, schedule = recipe.parallel.pp, recipe.n_microbatches, recipe.pipeline.schedule
    if not recipe.pipeline.single_stage:
        found = several_stages_orders(SCHEDULE_CLASSES[schedule], pp, m, recipe.stages_per_rank)
        return [[Action(*action) for action in order] for order in found]
    orders: list[list[Action]] = []
    for rank in range(pp):
        ahead = m if schedule == "gpipe" else min(m, pp - rank)
        alternating = [(name, i + ahead * (name == "forward")) for i in range(m) for name in ("backward", "forward")]
        first = [("forward", i) for i in range(ahead)]
        orders.append([Action(name, rank, i) for name, i in (*first, *alternating) if i < m])
    return orders


def split_pipeline(model: Transformer, *, recipe: Recipe, pp_rank: int) -> list[Transformer]:
    """The stages of one rank, cut out of the whole `model` (on the meta device, and left as it is).

    Each is a Transformer that lacks what other stages hold; parameters keep the names they have in the whole model.
    With tied embeddings the first stage's embedding.weight and the last one's output.weight are two parameters that
    must start equal (transformer.weight_name) and get the same gradient (`sum_tied_gradients`).
    """
    layers = stage_layers(n_layers=recipe.model.n_layers, n_stages=recipe.n_stages)
    stages = []
    for index in stages_of_rank(recipe, pp_rank):
        stage = copy.deepcopy(model)
        stage.blocks = nn.ModuleDict({str(layer): stage.blocks[str(layer)] for layer in layers[index]})
        if index > 0:
            stage.embedding = None
        if index < recipe.n_stages - 1:
            stage.norm = stage.output = None
        stages.append(stage)
    return stages


class _Stage(pipelining.PipelineStage):
    """Does what it does within an action of `step`."""

    def __init__(self, step: "PipelineStep", *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.step = step
        self._losses: dict[int, Tensor] = {}

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        with self.step.action("forward", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not full_backward and loss is not None and isinstance(loss.grad_fn, BackwardCFunction):
            # torch detaches it, and up to 2.12 nothing else keeps a node of Python's until the weights' gradients.
            self._losses[bwd_chunk_id] = loss.view_as(loss)
        with self.step.action("backward" if full_backward else "backward_input", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self.step.action("backward_weight", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._losses.pop(bwd_chunk_id, None)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # Called by torch 2.11 alone. At the turn of a V two neighbours share a rank, and gloo cannot send to itself.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


class PipelineStep:
    """Forward and backward of a whole step through the pipeline.

    stages: this rank's, of `split_pipeline`, with the other strategies applied and the weights in place. The last one's
        loss is a sum over tokens, in shares of the step's loss; microbatches are summed.
    mesh: the one-dimensional mesh of the pipeline's ranks. compute_dtype: type of the residual stream between stages.
    residual_tokens: tokens of a sequence's residual stream on this rank, where other strategies split them.
    around: is called with each Action of this rank, which then happens within the context that it returns.
    """

    def __init__(
        self,
        stages: list[Transformer],
        *,
        recipe: Recipe,
        mesh: DeviceMesh,
        device: torch.device,
        compute_dtype: torch.dtype,
        residual_tokens: int | None = None,
        around: Callable[[Action], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self.around, self.group, self.device = around, mesh.get_group(), device
        n_stages, indices = recipe.n_stages, stages_of_rank(recipe, mesh.get_local_rank())
        self.has_first, self.has_last = 0 in indices, n_stages - 1 in indices
        self.rank_of_last = 0 if recipe.pipeline.is_v else recipe.parallel.pp - 1

        # Shapes and types are told to torch, which would otherwise find them by an extra forward and backward.
        def example(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

        b, t, d = recipe.micro_batch, len(stages[0].rotary.positions), recipe.model.d_model
        first_in = example(b, t, dtype=torch.int64)
        hidden = example(b, residual_tokens or t, d, dtype=compute_dtype)
        loss = example(dtype=torch.promote_types(compute_dtype, torch.float32))
        torch_stages = []
        for index, stage in zip(indices, stages, strict=True):
            takes, gives = first_in if index == 0 else hidden, loss if index == n_stages - 1 else hidden
            torch_stages.append(_Stage(self, stage, index, n_stages, device, takes, gives, group=self.group))

        scheduled = torch_stages[0] if recipe.pipeline.single_stage else torch_stages
        make, n_microbatches = SCHEDULE_CLASSES[recipe.pipeline.schedule], recipe.n_microbatches
        # What the last stage gives is the loss already.
        self.schedule = make(scheduled, n_microbatches, loss_fn=lambda loss, _: loss, scale_grads=False)

    @contextmanager
    def action(self, name: str, stage: int, microbatch: int) -> Iterator[None]:
        """Within, this rank does that: in traces, and to whoever observes."""
        span = record_function(f"{name} stage {stage} microbatch {microbatch}")
        with span, self.around(Action(name, stage, microbatch)):
            yield

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Runs all microbatches of `tokens` and `targets` (replica_batch, T), the same on each rank of the pipeline.

        Gradients are added to .grad. Returns the sum of the microbatches' losses on every rank, in float64.
        """
        losses: list[Tensor] = []
        inputs = (tokens.contiguous(),) if self.has_first else ()  # torch 2.11 compares strides too
        targets = targets.contiguous()
        last = dict(targets=targets, target=targets) if self.has_last else {}  # for the model; for torch to see a loss
        self.schedule.step(*inputs, **last, losses=losses, return_outputs=False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss.detach()
        dist.broadcast(total, group=self.group, group_src=self.rank_of_last)
        return total


# ---- tied embeddings ----------------------------------------------------------------------------------------------


def tied_copies(stages: list[Transformer]) -> list[nn.Parameter]:
    """Those of this rank's parameters that are second copies of a weight: the gradient norm leaves them out."""
    tied = [stage for stage in stages if stage.shape.tied_embeddings and not stage.tied]
    return [stage.output.weight for stage in tied if stage.output is not None]


@torch.no_grad()
def sum_tied_gradients(stages: list[Transformer], *, mesh: DeviceMesh) -> None:
    """Gives both copies of a tied embedding the sum of their gradients. After data-parallel ranks are reduced.

    Nothing to do on the ranks that hold neither copy, or without tied embeddings.
    """
    if not stages[0].shape.tied_embeddings:
        return
    mine = [local_gradient(part.weight) for s in stages for part in (s.embedding, s.output) if part is not None]
    if len(mine) == 2:  # a V: the first rank holds both
        mine[0].add_(mine[1])
        mine[1].copy_(mine[0])
    elif len(mine) == 1 and mine[0].numel():
        peer = mesh.size() - 1 - mesh.get_local_rank()  # 0 <-> last
        receive = exchange(mine[0], to=peer, source=peer, group=mesh.get_group())
        mine[0].add_(receive())
