"""Pipeline parallelism by itself: stages, schedules, what they leave in .grad, and what may be applied to a stage."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from parallel.recipe import (
    SCHEDULES,
    SINGLE_STAGE_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    Recipe,
    RecipeError,
    recipe_from_tables,
)
from parallel.strategies.pipeline import (
    SCHEDULE_CLASSES,
    PipelineStep,
    split_pipeline,
    stage_layers,
    stages_of_rank,
    sum_tied_gradients,
    tied_copies,
)
from parallel.transformer import Transformer, cross_entropy, initial_weight, linear_cross_entropy, weight_name

WHOLE_BACKWARD_SCHEDULES = [schedule for schedule in SCHEDULES if schedule not in SPLIT_BACKWARD_SCHEDULES]
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """One pipeline to try; its text is what a failure is called."""

    schedule: str
    pp: int
    n_microbatches: int
    stages_per_rank: int = 0
    n_layers: int = 0  # 0: one per stage
    tied: bool = False
    dp_shard: int = 1
    dtype: str = field(default="float64", repr=False)

    @property
    def recipe(self) -> Recipe:
        stages_per_rank = self.stages_per_rank or (1 if self.schedule in SINGLE_STAGE_SCHEDULES else 2)
        micro_batch, fits_all = 2, 4 * self.pp
        recipe = recipe_from_tables(
            {
                "model": dict(
                    preset="none",
                    n_layers=self.n_layers or self.pp * stages_per_rank,
                    d_model=16,
                    n_heads=4,
                    n_kv_heads=2,
                    d_ff=24,
                    vocab_size=40,
                    tied_embeddings=self.tied,
                ),
                "data": dict(source="synthetic"),
                "train": dict(
                    seq_len=6,
                    global_batch=fits_all * micro_batch * self.dp_shard,
                    micro_batch=micro_batch,
                    dtype=self.dtype,
                ),
                "parallel": dict(pp=self.pp, dp_shard=self.dp_shard),
                "pipeline": dict(schedule=self.schedule, stages_per_rank=self.stages_per_rank),
                "sharding": dict(reshard_after_forward=False),
            }
        )
        # Any number of microbatches that torch takes, whatever recipes allow.
        train = dataclasses.replace(recipe.train, global_batch=self.n_microbatches * micro_batch * self.dp_shard)
        return dataclasses.replace(recipe, train=train)


# ---- one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 6, 11])
def test_stage_layers_are_even_and_spare_the_last(n_stages: int, extra: int) -> None:
    n_layers = n_stages + extra
    layers = stage_layers(n_layers=n_layers, n_stages=n_stages)
    assert [layer for stage in layers for layer in stage] == list(range(n_layers))
    sizes = [len(stage) for stage in layers]
    assert len(sizes) == n_stages and max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)
    assert sizes[:-1] == sorted(sizes[:-1])


def test_stage_layers_of_uneven_models() -> None:
    assert [len(stage) for stage in stage_layers(n_layers=5, n_stages=4)] == [1, 1, 2, 1]
    assert [len(stage) for stage in stage_layers(n_layers=9, n_stages=8)] == [1, 1, 1, 1, 1, 1, 2, 1]
    assert [len(stage) for stage in stage_layers(n_layers=126, n_stages=16)] == [7] + 14 * [8] + [7]


def test_stages_of_rank_make_loops_and_vs() -> None:
    loop = [stages_of_rank(Case("looped-bfs", pp=3, n_microbatches=6).recipe, r) for r in range(3)]
    assert loop == [[0, 3], [1, 4], [2, 5]]
    v = [stages_of_rank(Case("zbv", pp=3, n_microbatches=6).recipe, r) for r in range(3)]
    assert v == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_share_out_the_model(schedule: str) -> None:
    recipe = Case(schedule, pp=3, n_microbatches=6, n_layers=7, tied=True).recipe
    model = on_meta(recipe, torch.float64)
    stages: dict[int, Transformer] = {}
    for rank in range(3):
        indices = stages_of_rank(recipe, rank)
        stages |= dict(zip(indices, split_pipeline(model, recipe=recipe, pp_rank=rank), strict=True))
    names = [name for index in sorted(stages) for name, _ in stages[index].named_parameters()]
    assert names == [*(name for name, _ in model.named_parameters()), "output.weight"]  # tied: listed once there
    assert [index for index in stages if stages[index].embedding is not None] == [0]
    assert [index for index in stages if stages[index].output is not None] == [recipe.n_stages - 1]
    assert {weight_name(name, recipe.model) for name in names} == {name for name, _ in model.named_parameters()}
    assert len(model.blocks) == 7 and model.embedding is not None and model.output is not None


SCHEDULES_AND_STAGES = [
    (schedule, stages_per_rank)
    for schedule in SCHEDULES
    for stages_per_rank in ([1] if schedule in SINGLE_STAGE_SCHEDULES else [2] if schedule in V_SCHEDULES else [2, 3])
]


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES_AND_STAGES)
def test_what_recipes_allow_torch_can_schedule(schedule: str, stages_per_rank: int) -> None:
    n_allowed = 0
    for pp in (2, 4):
        for n_microbatches in range(1, 2 * pp + 4):
            tables = {
                "model": dict(n_layers=pp * stages_per_rank),
                "train": dict(global_batch=n_microbatches, micro_batch=1),
                "parallel": dict(pp=pp),
                "pipeline": dict(schedule=schedule, stages_per_rank=stages_per_rank),
            }
            try:
                recipe_from_tables(tables)
            except RecipeError:
                continue
            n_allowed += 1
            schedule_class = SCHEDULE_CLASSES[schedule]
            assert isinstance(schedule_class, type)
            assert len(get_schedule_ops(schedule_class, pp, n_microbatches, stages_per_rank)) == pp
    assert n_allowed >= 4


# ---- ranks --------------------------------------------------------------------------------------------------------


def on_meta(recipe: Recipe, compute_dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        return Transformer(recipe.model, seq_len=recipe.train.seq_len, compute_dtype=compute_dtype)


@torch.no_grad()
def fill(model: Transformer, recipe: Recipe) -> None:
    model.to(torch.float64 if recipe.train.dtype == "float64" else torch.float32).to_empty(device="cpu")
    model.rotary.reset_buffers()
    if recipe.model.tied_embeddings and model.embedding is not None and model.output is not None:
        model.output.weight = model.embedding.weight
    for name, parameter in model.named_parameters():
        name = weight_name(name, recipe.model)
        n_layers = recipe.model.n_layers
        parameter.copy_(initial_weight(name, parameter.shape, seed=0, n_layers=n_layers, device="cpu"))


def batch(recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of the global batch: (B, T), two views of (B, T + 1)."""
    generator = torch.Generator().manual_seed(step)
    shape = recipe.train.global_batch, recipe.train.seq_len + 1
    sequences = torch.randint(recipe.model.vocab_size, shape, generator=generator)
    return sequences[:, :-1], sequences[:, 1:]


def one_process(recipe: Recipe, step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model, microbatch by microbatch."""
    model = on_meta(recipe, getattr(torch, recipe.train.dtype))
    fill(model, recipe)
    tokens, targets = batch(recipe, step)
    total = 0.0
    for x, y in zip(tokens.split(recipe.micro_batch), targets.split(recipe.micro_batch), strict=True):
        loss = cross_entropy(model(x), y) / targets.numel()
        loss.backward()
        total += loss.item()
    return total, {name: gradient_of(parameter) for name, parameter in model.named_parameters()}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


class Pipelined:
    """The stages of this rank, filled, with a step to run them."""

    def __init__(self, case: Case, prepare: Callable[[Transformer, DeviceMesh], None] | None = None) -> None:
        self.case, self.recipe = case, case.recipe
        self.mesh = init_device_mesh("cpu", (case.pp, case.dp_shard), mesh_dim_names=("pp", "dp_shard"))
        compute_dtype = getattr(torch, case.dtype)
        model = on_meta(self.recipe, compute_dtype)
        self.stages = split_pipeline(model, recipe=self.recipe, pp_rank=self.mesh.get_local_rank("pp"))
        n_tokens = self.recipe.replica_batch * self.recipe.train.seq_len
        for stage in self.stages:
            stage.loss = lambda *x_weight, targets: linear_cross_entropy(*x_weight, targets) / n_tokens
            fill(stage, self.recipe)
            if prepare is not None:
                prepare(stage, self.mesh)
        self.step = PipelineStep(
            self.stages,
            recipe=self.recipe,
            mesh=self.mesh["pp"],
            device=torch.device("cpu"),
            compute_dtype=compute_dtype,
        )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for stage in self.stages:
            yield from stage.named_parameters()

    def run(self, step: int) -> float:
        """The loss of the global batch; its gradients are left in .grad, which is not zeroed before."""
        first = self.mesh.get_local_rank("dp_shard") * self.recipe.replica_batch
        rows = slice(first, first + self.recipe.replica_batch)
        tokens, targets = batch(self.recipe, step)
        loss = self.step(tokens[rows], targets[rows])
        sum_tied_gradients(self.stages, mesh=self.mesh["pp"])
        dist.all_reduce(loss, group=self.mesh.get_group("dp_shard"))
        return loss.item() / self.case.dp_shard

    def difference(self, loss: float, step: int) -> float:
        """Largest relative difference of this rank's gradients, and of the loss, from those of one process."""
        loss_alone, gradients = one_process(self.recipe, step)
        largest = abs(loss - loss_alone) / loss_alone
        for name, parameter in self.named_parameters():
            alone = gradients[weight_name(name, self.recipe.model)]
            largest = max(largest, ((gradient_of(parameter) - alone).norm() / alone.norm()).item())
        return largest


def check_case(case: Case, prepare: Callable[[Transformer, DeviceMesh], None] | None = None, steps: int = 1) -> None:
    pipelined = Pipelined(case, prepare)
    for step in range(steps):
        for _, parameter in pipelined.named_parameters():
            parameter.grad = None
        loss = pipelined.run(step)
        difference = pipelined.difference(loss, step)
        assert difference <= TOLERANCE, f"{case}, step {step}: {difference:.1e}"


def check_cases(cases: list[Case]) -> None:
    for case in cases:
        check_case(case)


def cases_of(pp: int) -> list[Case]:
    """Each schedule with the fewest microbatches it takes and with more, even and uneven, untied and tied."""
    cases = []
    for schedule in SCHEDULES:
        n_stages = pp if schedule in SINGLE_STAGE_SCHEDULES else 2 * pp
        fewest = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
        cases.append(Case(schedule, pp, fewest))
        cases.append(Case(schedule, pp, 2 * pp, n_layers=n_stages + 1, tied=True))
    return cases


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_schedules_compute_what_one_process_does(ranks: Ranks, pp: int) -> None:
    ranks(pp, check_cases, cases_of(pp))


def test_odd_numbers_of_microbatches_and_stages(ranks: Ranks) -> None:
    looped = ("interleaved-1f1b", "looped-bfs", "interleaved-zero-bubble")
    cases = [Case(schedule, 2, n, stages_per_rank=3, n_layers=7) for schedule in looped for n in (3, 6)]
    cases += [Case("zbv", 2, 5), Case("dualpipev", 2, 5), Case("1f1b", 2, 3), Case("gpipe", 2, 3)]
    ranks(2, check_cases, cases)
    ranks(4, check_cases, [Case(schedule, 4, n) for schedule in looped for n in (3, 10)])


def doubled_gradient(case: Case) -> list[float]:
    pipelined = Pipelined(case)
    loss = pipelined.run(0)
    right = pipelined.difference(loss, 0)
    for _, parameter in list(pipelined.named_parameters())[-1:]:
        gradient_of(parameter).mul_(2.0)
    return [right, pipelined.difference(loss, 0), pipelined.difference(2.0 * loss, 0)]


def test_a_doubled_gradient_is_seen(ranks: Ranks) -> None:
    for right, one_doubled, loss_doubled in ranks(2, doubled_gradient, Case("1f1b", 2, 2)):
        assert right <= TOLERANCE
        assert one_doubled == pytest.approx(1.0) and loss_doubled >= 1.0


def accumulate_into_views(schedule: str, n_steps: int) -> Counter[int]:
    """Keeps every .grad a view of one buffer. How often a parameter's hook ran, over all steps -> how many did."""
    case = Case(schedule, 2, 4, tied=True)
    pipelined = Pipelined(case)
    parameters = [parameter for _, parameter in pipelined.named_parameters()]
    buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    fired: Counter[int] = Counter({id(parameter): 0 for parameter in parameters})
    start = 0
    for parameter in parameters:
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
        parameter.register_post_accumulate_grad_hook(lambda parameter: fired.update([id(parameter)]))
    for step in range(n_steps):
        buffer.zero_()
        difference = pipelined.difference(pipelined.run(step), step)
        assert difference <= TOLERANCE, f"{case}, step {step}: {difference:.1e}"
        in_buffer = torch.cat([gradient_of(parameter).flatten() for parameter in parameters])
        assert torch.equal(in_buffer, buffer), f"{case}, step {step}: a gradient has left the buffer"
    return Counter(fired.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_added_in_place_and_hooks_run(ranks: Ranks, schedule: str) -> None:
    n_steps, n_microbatches = 3, 4
    counts = ranks(2, accumulate_into_views, schedule, n_steps)
    once_each = {n_steps * n_microbatches}
    if schedule in SPLIT_BACKWARD_SCHEDULES:  # dW is added without the hooks, except in a stage whose backward is whole
        assert any(set(count) != once_each for count in counts)
    else:
        assert all(set(count) == once_each for count in counts)


def tied_norms(schedule: str) -> tuple[float, float]:
    """This rank's part of the squared gradient norm, and the whole of it in one process."""
    pipelined = Pipelined(Case(schedule, 2, 4, tied=True))
    pipelined.run(0)
    copies = {id(parameter) for parameter in tied_copies(pipelined.stages)}
    mine = [p for _, p in pipelined.named_parameters() if id(p) not in copies]
    _, gradients = one_process(pipelined.recipe, 0)
    squares = [gradient_of(parameter).square().sum().item() for parameter in mine]
    return sum(squares), sum(gradient.square().sum().item() for gradient in gradients.values())


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_tied_copies_are_counted_once_in_the_norm(ranks: Ranks, schedule: str) -> None:
    parts = ranks(2, tied_norms, schedule)
    assert sum(mine for mine, _ in parts) == pytest.approx(parts[0][1], rel=1e-12)


# ---- what else is applied to a stage -------------------------------------------------------------------------------


def recompute_blocks(calls: Counter[str], stage: Transformer, mesh: DeviceMesh) -> None:
    for layer, block in stage.blocks.items():
        forward = functools.partial(_counted, calls, layer, block.forward)
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)


def _counted(calls: Counter[str], layer: str, forward: Callable[..., Tensor], *arguments: object) -> Tensor:
    calls[layer] += 1
    return forward(*arguments)


def check_recompute() -> None:
    for schedule in WHOLE_BACKWARD_SCHEDULES:
        case = Case(schedule, 2, 4)
        plain, calls = Pipelined(case), Counter[str]()
        plain.run(0)
        recomputed = Pipelined(case, functools.partial(recompute_blocks, calls))
        recomputed.run(0)
        for (name, p), (_, q) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
            assert torch.equal(gradient_of(p), gradient_of(q)), f"{case}: {name}"
        assert set(calls.values()) == {2 * case.n_microbatches}, f"{case}: {calls}"


def test_recompute_runs_each_block_twice_and_gives_the_same_bits(ranks: Ranks) -> None:
    ranks(2, check_recompute)


def compile_blocks(stage: Transformer, mesh: DeviceMesh) -> None:
    for block in stage.blocks.values():
        block.compile(backend="aot_eager")


@pytest.mark.parametrize("schedule", ["1f1b", "looped-bfs"])
def test_compiled_blocks(ranks: Ranks, schedule: str) -> None:
    ranks(2, check_case, Case(schedule, 2, 4), compile_blocks)


def check_bfloat16() -> None:
    for schedule in SCHEDULES:
        case, seen = Case(schedule, 2, 4, tied=True, dtype="bfloat16"), list[tuple[torch.dtype, torch.dtype]]()
        pipelined = Pipelined(case, functools.partial(note_dtypes, seen))
        difference = pipelined.difference(pipelined.run(0), 0)
        assert difference <= 1e-5, f"{case}: {difference:.1e}"  # the same bfloat16 values, added in another order
        allowed = {(torch.int64, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)}
        assert set(seen) <= allowed, f"{case}: {set(seen)}"  # float32: the loss
        assert {gradient_of(parameter).dtype for _, parameter in pipelined.named_parameters()} == {torch.float32}


def note_dtypes(seen: list[tuple[torch.dtype, torch.dtype]], stage: Transformer, mesh: DeviceMesh) -> None:
    stage.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))


def test_bfloat16_between_stages(ranks: Ranks) -> None:
    ranks(2, check_bfloat16)


def shard(reshard_after_forward: bool, stage: Transformer, mesh: DeviceMesh) -> None:
    for module in (*stage.blocks.values(), stage):
        fully_shard(module, mesh=mesh["dp_shard"], reshard_after_forward=reshard_after_forward)


def check_sharded(reshard_after_forward: bool, schedules: list[str]) -> None:
    for schedule in schedules:
        n_stages = 2 if schedule in SINGLE_STAGE_SCHEDULES else 4
        case = Case(schedule, 2, 4, n_layers=n_stages + 1, tied=True, dp_shard=2)
        check_case(case, functools.partial(shard, reshard_after_forward), steps=2)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_sharded_stages(ranks: Ranks, reshard_after_forward: bool) -> None:
    # A backward in two parts needs weights that stay whole in between; the recipe refuses the rest.
    schedules = WHOLE_BACKWARD_SCHEDULES if reshard_after_forward else list(SCHEDULES)
    ranks(4, check_sharded, reshard_after_forward, schedules)
