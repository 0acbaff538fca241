"""FLOPs: the formula of a model, the count of what every strategy runs, and the section of the record."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import CPU, batch_of, small_recipe
from ranks import Ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel.assemble import assemble
from parallel.batches import rows_of_replica
from parallel.measure import record
from parallel.measure.accelerators import Peak
from parallel.measure.flops import FlopCounter, flops_section
from parallel.measure.model_flops import model_flops_per_token
from parallel.mesh import build_mesh
from parallel.recipe import PRESETS, SCHEDULES, Model, Recipe
from parallel.strategies import context
from parallel.strategies.pipeline import stage_layers
from parallel.transformer import Linear, Transformer

Sections = dict[str, dict[str, Any]]
aten = torch.ops.aten


# ---- the formula ---------------------------------------------------------------------------------------------------


def preset(name: str) -> Model:
    return Model(preset=name, **PRESETS[name])


def test_llama3_8b_by_hand() -> None:
    """Llama 3 8B at 8192: 32 layers of d 4096, 8 of 32 heads for keys, d_ff 14336, vocabulary 128256."""
    attention = 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096
    weights = 32 * (attention + 3 * 4096 * 14336) + 128256 * 4096
    assert weights == 7_504_658_432  # of 8.03e9: without the embedding look-up and the norms
    flops = model_flops_per_token(preset("llama3-8b"), seq_len=8192)
    assert flops.full == 6 * 7_504_658_432 + 12 * 32 * 4096 * 8192 == 57_912_852_480
    assert flops.causal == 57_912_852_480 - 6 * 32 * 4096 * 8192 == 51_470_401_536


def test_llama3_8b_as_published() -> None:
    """MaxText's log of Llama 3.1 8B at 8192 on TPU v6e prints 412.319 TFLOP/s at 7119.65 tokens/s, attention in full.

    github.com/AI-Hypercomputer/tpu-recipes@c8cfe2f, training/trillium. Both are rounded in the sixth digit.
    """
    assert model_flops_per_token(preset("llama3-8b"), seq_len=8192).full == pytest.approx(
        412.319e12 / 7119.65, rel=2e-6
    )


@pytest.mark.parametrize(("seq_len", "ratio"), [(8192, 1.125), (131072, 1.70)])
def test_the_two_conventions_are_as_far_apart_as_published_ones(seq_len: int, ratio: float) -> None:
    """torchtitan's MFU of Llama 3 8B is 1.125 times Megatron's at 8192 tokens, and 1.70 times at 131072."""
    flops = model_flops_per_token(preset("llama3-8b"), seq_len=seq_len)
    assert flops.full / flops.causal == pytest.approx(ratio, abs=0.005)


def test_tying_takes_no_product_away() -> None:
    tied = Model(preset="none", **PRESETS["tiny"] | {"tied_embeddings": True})
    assert model_flops_per_token(tied, seq_len=256) == model_flops_per_token(preset("tiny"), seq_len=256)


# ---- what operations are counted -----------------------------------------------------------------------------------


def counted(function: Any, *args: Any, **kwargs: Any) -> int:
    with FlopCounter() as counter:
        function(*args, **kwargs)
    return counter.flops


def test_products() -> None:
    a, b, c = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    assert counted(torch.mm, a, b) == 2 * 3 * 5 * 7
    assert counted(torch.mm, a, b, out=torch.empty(3, 7)) == 2 * 3 * 5 * 7
    assert counted(torch.addmm, c, a, b) == 2 * 3 * 5 * 7
    batches = [x.expand(2, *x.shape) for x in (a, b, c)]
    assert counted(torch.bmm, batches[0], batches[1]) == 2 * 2 * 3 * 5 * 7
    assert counted(torch.baddbmm, batches[2], batches[0], batches[1]) == 2 * 2 * 3 * 5 * 7
    assert counted(F.linear, torch.ones(2, 3, 5), b.T) == 2 * 6 * 5 * 7
    assert counted(torch.mul, a, a) == 0


def kernel(name: str, grad: Tensor, q: Tensor, kv: Tensor, causal: bool) -> tuple[int, int]:
    """FLOPs of forward and of backward of one of torch's attention kernels, with its own arguments."""
    none = torch.empty(0, device="meta")
    lengths = (q.shape[2], kv.shape[2])
    with FlopCounter() as forward:
        if name in ("flash_attention_for_cpu", "flash_attention"):
            out, lse, *_ = getattr(aten, f"_scaled_dot_product_{name}")(q, kv, kv, 0.0, causal)
        else:
            out, lse, *_ = getattr(aten, f"_scaled_dot_product_{name}")(q, kv, kv, None, True, 0.0, causal)
    after: dict[str, tuple[Any, ...]] = {
        "flash_attention_for_cpu": (out, lse, 0.0, causal),
        "flash_attention": (out, lse, None, None, *lengths, 0.0, causal, none, none),
        "efficient_attention": (None, out, lse, none, none, 0.0, [True, True, True, False], causal),
        "cudnn_attention": (out, lse, none, none, None, None, None, *lengths, 0.0, causal),
    }
    with FlopCounter() as backward:
        getattr(aten, f"_scaled_dot_product_{name}_backward")(grad, q, kv, kv, *after[name])
    return forward.flops, backward.flops


@pytest.mark.parametrize(
    "name", ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"]
)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_kernels(name: str, causal: bool) -> None:
    q, kv = (torch.empty(2, 4, t, 8, device="meta", dtype=torch.bfloat16) for t in (16, 16 if causal else 24))
    product = 2 * 2 * 4 * 16 * kv.shape[2] * 8 // (2 if causal else 1)
    assert kernel(name, q, q, kv, causal) == (2 * product, 5 * product)


def test_grouped_heads_count_as_their_queries() -> None:
    q, kv = torch.randn(2, 4, 16, 8, requires_grad=True), torch.randn(2, 2, 16, 8, requires_grad=True)
    product = 2 * 2 * 4 * 16 * 16 * 8 // 2
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True).sum().backward()
    assert counter.flops == 7 * product


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_a_kernel_is_counted_as_it_runs(causal: bool) -> None:
    """Plain products compute what the mask then hides."""
    q, k = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert counted(context._plain, q, k, k, causal) == 2 * product
    out, lse = context._plain(q, k, k, causal)
    assert counted(context._plain_backward, q, q, k, k, out, lse, causal) == 5 * product


def train_a_linear() -> None:
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    F.linear(x, w).sum().backward()


def test_fake_tensors_count_like_real_ones() -> None:
    with FakeTensorMode():
        fake = counted(train_a_linear)
    assert fake == counted(train_a_linear) == 3 * 2 * 3 * 5 * 7


def local_products() -> int:
    mesh = init_device_mesh("cpu", (2,))
    a = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
    b = distribute_tensor(torch.ones(6, 8), mesh, [Replicate()])
    a @ b  # torch finds the placement of a first product by trying it on fake tensors
    return counted(torch.mm, a, b)


def test_a_rank_counts_its_part_of_a_dtensor(ranks: Ranks) -> None:
    assert ranks(2, local_products) == [2 * 2 * 6 * 8] * 2


# ---- what strategies run -------------------------------------------------------------------------------------------


def case(name: str, **sections: dict[str, Any]) -> Any:
    return pytest.param(sections, id=name)


LAYOUTS = [
    case("single"),
    case("grouped heads, odd vocabulary", model=dict(n_kv_heads=1, vocab_size=67)),
    case("tied", model=dict(tied_embeddings=True)),
    case("float32", train=dict(dtype="float32")),
    case("bfloat16", train=dict(dtype="bfloat16"), parallel=dict(dp_shard=2)),
    case("short last microbatch", train=dict(micro_batch=3)),
    case("ddp", parallel=dict(dp_replicate=2), train=dict(micro_batch=3)),
    case("fsdp", parallel=dict(dp_shard=4), train=dict(global_batch=8, micro_batch=1)),
    case("fsdp, tied", parallel=dict(dp_shard=2), model=dict(tied_embeddings=True)),
    case("zero2", parallel=dict(dp_shard=2), sharding=dict(reshard_after_forward=False)),
    case("hsdp", parallel=dict(dp_replicate=2, dp_shard=2)),
    case("tp", parallel=dict(tp=2), model=dict(vocab_size=67)),
    case("tp, no sp", parallel=dict(tp=2), tensor=dict(sequence_parallel=False)),
    case("tp, no loss_parallel", parallel=dict(tp=2), tensor=dict(loss_parallel=False), model=dict(vocab_size=67)),
    case("tp, tied", parallel=dict(tp=2), model=dict(tied_embeddings=True, vocab_size=67)),
    *(case(f"cp, {m}", parallel=dict(cp=4), context=dict(method=m), model=dict(n_kv_heads=1)) for m in context.METHODS),
    *(case(f"pp, {s}", parallel=dict(pp=2), pipeline=dict(schedule=s), train=dict(micro_batch=2),
           model=dict(n_layers=5, tied_embeddings=True)) for s in SCHEDULES),
    case("fsdp·tp", parallel=dict(dp_shard=2, tp=2)),
    case("fsdp·cp·tp", parallel=dict(dp_shard=2, cp=2, tp=2)),
    case("hsdp·cp", parallel=dict(dp_replicate=2, dp_shard=2, cp=2), context=dict(method="all-gather")),
    *(case(f"pp·fsdp·tp, {s}", parallel=dict(pp=2, dp_shard=2, tp=2), pipeline=dict(schedule=s),
           sharding=dict(reshard_after_forward=False), train=dict(global_batch=4, micro_batch=1),
           model=dict(vocab_size=67)) for s in ("1f1b", "zbv")),
    case("pp·cp·tp", parallel=dict(pp=2, cp=2, tp=2), context=dict(method="ulysses"), train=dict(micro_batch=1)),
    case("compiled", train=dict(compile="aot_eager")),
    *(case(f"{'·'.join(parallel) or 'single'}, loss in chunks", parallel=parallel,
           train=dict(loss_chunks=3, micro_batch=2), model=dict(tied_embeddings=True, vocab_size=67))
      for parallel in ({}, dict(dp_shard=2), dict(cp=2, tp=2))),
    *(case(f"pp, {s}, loss in chunks", parallel=dict(pp=2), pipeline=dict(schedule=s),
           train=dict(loss_chunks=3, micro_batch=2)) for s in ("gpipe", "zbv")),
]  # fmt: skip

RECOMPUTE = [
    case(f"{'·'.join(parallel) or 'single'}, {'+'.join([mode, *save])}", parallel=parallel, model=dict(n_layers=7),
         train=dict(global_batch=4, micro_batch=2), recompute=dict(mode=mode) | (dict(save=save) if save else {}))
    for parallel, mode, save in (
        *(({}, mode, []) for mode in ("full", "every(2)", "sqrt")),
        *(({}, "selective", save) for save in (["attention", "matmul"], ["attention"], ["matmul"])),
        (dict(dp_shard=2), "full", []),
        (dict(dp_shard=2), "selective", ["attention"]),
        (dict(tp=2), "every(2)", []),
        (dict(tp=2), "selective", ["matmul"]),
        (dict(cp=2), "sqrt", []),
        (dict(cp=2), "selective", ["attention"]),
        (dict(cp=2), "selective", ["matmul"]),
        (dict(pp=2), "full", []),
        (dict(pp=2), "every(2)", []),
        (dict(pp=2), "sqrt", []),
    )
] + [
    case("cp all-gather, full", parallel=dict(cp=2), context=dict(method="all-gather"), recompute=dict(mode="full")),
    case("interleaved, every(2)", parallel=dict(pp=2), pipeline=dict(schedule="interleaved-1f1b"),
         model=dict(n_layers=7), train=dict(micro_batch=4), recompute=dict(mode="every(2)")),
    case("compiled, full", parallel=dict(dp_shard=2), train=dict(compile="aot_eager"), recompute=dict(mode="full")),
]  # fmt: skip


def executed_flops(recipe: Recipe) -> int:
    """Those of this rank in all that a step of training does."""
    mesh = build_mesh(recipe, "cpu")
    model = assemble(recipe, mesh=mesh, device=CPU)
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.named_parameters()], foreach=False)
    batch = batch_of(recipe, rows_of_replica(recipe, mesh))
    with FlopCounter() as counter:
        model.forward_backward(*batch)
        model.clip_gradients(norm=model.gradient_norm(), largest=1.0)
        optimizer.step()
    return counter.flops


def linear_sizes(module: nn.Module) -> dict[str, int]:
    return {name: part.weight.numel() for name, part in module.named_modules() if isinstance(part, Linear)}


def expected_flops(recipe: Recipe) -> int:
    """From the weights of the model, as torch holds them, and from the pairs of tokens that see each other."""
    model, train = recipe.model, recipe.train
    tokens = train.global_batch * train.seq_len
    with torch.device("meta"):
        whole = Transformer(model, seq_len=train.seq_len)
    block = linear_sizes(whole.blocks["0"])
    assert whole.output is not None
    matrices = 2 * tokens * sum(block.values())  # forward of one block
    last_matrix = 2 * tokens * block["mlp.down"]
    attention = 2 * (2 * train.global_batch * model.n_heads * train.seq_len**2 * model.head_dim) // 2  # causal
    output = 2 * tokens * whole.output.weight.numel()
    step = model.n_layers * (3 * matrices + attention * 7 // 2) + 3 * output

    # Recomputation stops once backward has what it needs: the last product of what was checkpointed is for no one.
    for stage in stage_layers(n_layers=model.n_layers, n_stages=recipe.n_stages):
        n_blocks, mode, save = len(stage), recipe.recompute.mode, recipe.recompute.save
        if mode == "sqrt":
            n_groups = math.ceil(n_blocks / math.ceil(math.sqrt(n_blocks)))
            step += n_blocks * (matrices + attention) - n_groups * last_matrix
        elif mode == "selective":
            step += n_blocks * attention * ("attention" not in save)
            step += n_blocks * (matrices - last_matrix) * ("matmul" not in save)
        elif mode != "none":
            n_recomputed = len(range(0, n_blocks, 2 if mode == "every(2)" else 1))
            step += n_recomputed * (matrices + attention - last_matrix)
    return step


@pytest.mark.parametrize("sections", LAYOUTS + RECOMPUTE)
def test_ranks_run_together_what_the_formula_says(ranks: Ranks, sections: Sections) -> None:
    sections = sections | {"train": {"dtype": "float64"} | sections.get("train", {})}
    recipe = small_recipe(**sections)
    assert sum(ranks(recipe.world_size, executed_flops, recipe)) == expected_flops(recipe)


@pytest.mark.parametrize("sections", LAYOUTS)
def test_model_flops_are_those_of_the_step_without_the_kernel_s_second_look_at_scores(sections: Sections) -> None:
    """Ties the formula of mfu_causal to the one above, which the counter confirms: attention 3, not 3.5, forwards."""
    recipe = small_recipe(**sections)
    model, train = recipe.model, recipe.train
    score_again = 2 * train.global_batch * model.n_layers * model.d_model * train.seq_len**2 // 2
    flops = model_flops_per_token(model, seq_len=train.seq_len)
    assert flops.causal * train.global_batch * train.seq_len == expected_flops(recipe) - score_again


def compiled_regions() -> list[int]:
    """Times that compiled code ran: in a step, in one under the counter, and in the next."""
    torch._dynamo.reset()
    recipe = small_recipe(train=dict(compile="aot_eager"))
    mesh = build_mesh(recipe, "cpu")
    model = assemble(recipe, mesh=mesh, device=CPU)
    batch = batch_of(recipe, rows_of_replica(recipe, mesh))
    regions = []
    for watched in (True, False, True):
        with torch.profiler.profile() as profile:
            if watched:
                counted(model.forward_backward, *batch)
            else:
                model.forward_backward(*batch)
        regions.append(sum(e.count for e in profile.key_averages() if e.key.startswith("Torch-Compiled Region")))
    return regions


def test_counting_does_not_undo_compilation(ranks: Ranks) -> None:
    [regions] = ranks(1, compiled_regions)
    assert regions == [4, 4, 4]


# ---- the section of the record -------------------------------------------------------------------------------------

PEAK = Peak(1e12, "made up")


def section(recipe: Recipe | None = None, **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = dict(hardware_flops=400_000_000, step_seconds=0.001, peak=PEAK, ceiling=8e11)
    return dataclasses.asdict(flops_section(recipe or small_recipe(parallel=dict(dp_shard=4)), **defaults | values))


def test_section_by_hand() -> None:
    """4 layers, d 32, 2 of 4 heads for keys, d_ff 48, vocabulary 68; 8 sequences of 16 tokens on 4 ranks."""
    weights = 4 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 68 * 32
    full, causal = 6 * weights + 12 * 4 * 32 * 16, 6 * weights + 6 * 4 * 32 * 16
    result = section()
    assert result.pop("definition").startswith("model FLOPs per token = 6 x")
    tokens, possible = 8 * 16, 0.001 * 4 * 1e12
    assert result == {
        "model_flops_per_token": full,
        "model_flops_per_token_causal": causal,
        "hardware_flops_per_token": 400_000_000 / tokens,
        "attention_kernels": None,  # the counters know them
        "mfu": pytest.approx(full * tokens / possible),
        "mfu_causal": pytest.approx(causal * tokens / possible),
        "hfu": pytest.approx(0.1),
        "peak_flops": 1e12,
        "peak_source": "made up",
        "matmul_ceiling_flops": 8e11,
    }


def test_section_has_the_keys_of_the_record() -> None:
    assert tuple(section()) == tuple(field.name for field in dataclasses.fields(record.Flops))


@pytest.mark.parametrize(
    ("missing", "null"),
    [
        (dict(hardware_flops=None), {"hardware_flops_per_token", "hfu"}),
        (dict(step_seconds=None), {"mfu", "mfu_causal", "hfu"}),
        (dict(peak=Peak(None, "unknown; give --peak-flops")), {"mfu", "mfu_causal", "hfu", "peak_flops"}),
        (dict(ceiling=None), {"matmul_ceiling_flops"}),
    ],
)
def test_what_was_not_measured_is_null(missing: dict[str, Any], null: set[str]) -> None:
    assert {key for key, value in section(**missing).items() if value is None} == null | {"attention_kernels"}


def test_utilizations_above_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"flops.hfu = 4: .* 4 ranks and 2.5e\+10 FLOP/s .*made up.*--peak-flops"):
        section(peak=Peak(25e9, "made up"))
    with pytest.raises(ValueError, match=r"flops.mfu_causal = 1\.\d+: "):
        section(hardware_flops=None, step_seconds=5e-6)


def test_a_long_sequence_takes_mfu_above_one_and_it_is_null() -> None:
    """At 131072 tokens mfu is 1.7 times mfu_causal: 65 % by one is 110 % by the other, and no peak is wrong."""
    recipe = small_recipe(
        model={"preset": "llama3-8b", **PRESETS["llama3-8b"]}, train=dict(seq_len=131072, global_batch=1)
    )
    causal = model_flops_per_token(recipe.model, seq_len=131072).causal
    result = section(recipe, step_seconds=causal * 131072 / 1e12 / 0.65, hardware_flops=None)
    assert result["mfu_causal"] == pytest.approx(0.65)
    assert result["mfu"] is None and "mfu is null: with attention in full it would be 1.1" in result["definition"]
