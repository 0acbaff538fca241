"""The loop: norms, clipping, optimizers, types and records, on real gloo ranks."""

import gc
import json
import math
import os
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import CPU, batch_of, parity, small_recipe
from ranks import Ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import parallel.measure.hardware as hardware
from parallel.assemble import assemble
from parallel.batches import rows_of_replica
from parallel.engines.native import NativeEngine
from parallel.measure.parity import compare_with_reference, parity_recipe, reference_gradients
from parallel.mesh import build_mesh, local_part
from parallel.process import choose_device
from parallel.recipe import Recipe, RecipeError, recipe_from_tables
from parallel.training import train_in_group
from parallel.transformer import Transformer, initial_weight, lookup

LAYOUTS = {
    "ddp": dict(parallel=dict(dp_replicate=2)),
    "fsdp": dict(parallel=dict(dp_shard=2)),
    "tp": dict(parallel=dict(tp=2)),
    "tp without sp": dict(parallel=dict(tp=2), tensor=dict(sequence_parallel=False)),
    "cp": dict(parallel=dict(cp=2)),
    "pp, tied": dict(parallel=dict(pp=2), model=dict(tied_embeddings=True)),
    "zbv, tied": dict(parallel=dict(pp=2), pipeline=dict(schedule="zbv"), model=dict(tied_embeddings=True)),
    "fsdp·tp": dict(parallel=dict(dp_shard=2, tp=2), model=dict(vocab_size=67)),
    "pp·fsdp·tp": dict(parallel=dict(pp=2, dp_shard=2, tp=2)),
}


def run(recipe: Recipe, out: str) -> dict[str, Any] | None:
    with mock.patch.object(hardware, "CEILING_SECONDS", 0.01):  # no test here looks at it
        return train_in_group(recipe, out=Path(out), device=CPU)


def trained(ranks: Ranks, out: Path, sections: dict[str, Any], **train: Any) -> list[dict[str, Any]]:
    """The steps of a run, after checking that its own parity proof passed."""
    settings = dict(steps=3, learning_rate=1e-2, grad_clip=0.1, micro_batch=1) | train
    recipe = small_recipe(**sections | {"train": settings})
    record = ranks(recipe.world_size, run, recipe, str(out))[0]
    assert record["status"] == "ok" and record["parity"]["passed"]
    return record["steps"]


def test_one_process_trains_as_a_plain_torch_loop(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe(train=dict(steps=3, learning_rate=1e-2, grad_clip=0.1))
    model = Transformer(recipe.model, seq_len=16, compute_dtype=torch.float64).double()
    model.rotary.reset_buffers()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, seed=0, n_layers=4, device="cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    steps = trained(ranks, tmp_path, {}, micro_batch=8)
    for step in range(3):
        tokens, targets = batch_of(recipe, range(8), step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert steps[step]["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert steps[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)


def skipping(recipe: Recipe, poisoned: int) -> tuple[list[float], list[float]]:
    """Losses and norms of four steps; at step `poisoned` a gradient of the last rank is no number.

    Of replicas every rank's: they have added up their gradients.
    """
    mesh = build_mesh(recipe, "cpu")
    engine = NativeEngine(recipe, mesh=mesh, device=CPU)
    losses, norms = [], []
    for number in range(1, 5):
        losses.append(engine.gradients(*batch_of(recipe, rows_of_replica(recipe, mesh), number - 1)).item())
        if number == poisoned and (recipe.parallel.dp_replicate > 1 or mesh.get_rank() == recipe.world_size - 1):
            gradients = (
                local_part(parameter.grad) for _, parameter in engine.named_parameters() if parameter.grad is not None
            )
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = torch.nan
        norms.append(engine.update().item())
    return losses, norms


@pytest.mark.parametrize("layout", ["ddp", "fsdp·tp", "zbv, tied"])
def test_a_step_without_a_finite_norm_is_left_out_on_every_rank(ranks: Ranks, layout: str) -> None:
    train = dict(learning_rate=1e-2, grad_clip=0.1, micro_batch=1, non_finite="skip")
    recipe = small_recipe(**LAYOUTS[layout] | {"train": train})
    alone = small_recipe(model=LAYOUTS[layout].get("model", {}), train=train | {"micro_batch": 8})
    expected = ranks(1, skipping, alone, 2)[0]
    for losses, norms in ranks(recipe.world_size, skipping, recipe, 2):
        assert losses == pytest.approx(expected[0], rel=1e-9)
        assert math.isnan(norms[1]) and norms[2:] == pytest.approx(expected[1][2:], rel=1e-9)
    untouched = ranks(1, skipping, alone, 5)[0]
    assert expected[0][:2] == untouched[0][:2] and expected[0][2] != pytest.approx(untouched[0][2], rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "adamw"),
    [
        pytest.param(layout, adamw, marks=[pytest.mark.long] * (adamw != "fused" and layout != "fsdp·tp"))
        for layout in ("tp", "tp without sp", "fsdp·tp")
        for adamw in ("fused", "foreach", "for-loop")
    ],
)
def test_every_adamw_steps_alike(ranks: Ranks, tmp_path: Path, layout: str, adamw: str) -> None:
    steps = trained(ranks, tmp_path, LAYOUTS[layout], adamw=adamw)
    reference = trained(ranks, tmp_path, {"model": LAYOUTS[layout].get("model", {})}, adamw="for-loop")
    assert steps[2]["loss"] == pytest.approx(reference[2]["loss"], rel=1e-9)


def bfloat16_differences(recipe: Recipe) -> dict[str, Any] | None:
    """bfloat16 gradients of this layout against one process in float64."""
    mesh = build_mesh(recipe, "cpu")
    reference = None
    if mesh.get_rank() == 0:
        exact = small_recipe(model=dict(tied_embeddings=recipe.model.tied_embeddings))
        reference = reference_gradients(exact, *batch_of(recipe, range(recipe.train.global_batch)))
    model = assemble(recipe, mesh=mesh, device=CPU)
    model.zero_gradients()
    loss = model.forward_backward(*batch_of(recipe, rows_of_replica(recipe, mesh))).item()
    assert {parameter.dtype for _, parameter in model.named_parameters()} == {torch.float32}
    for _, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    return compare_with_reference(model.gradient, loss, reference, device=CPU)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp", "tp without sp", "cp", "pp, tied", "zbv, tied", "pp·fsdp·tp"])
def test_bfloat16_is_near_and_keeps_float32_weights_and_gradients(ranks: Ranks, layout: str) -> None:
    sections = LAYOUTS[layout] | {"train": dict(micro_batch=1)}
    recipe = small_recipe(dtype="bfloat16", **sections)
    differences = ranks(recipe.world_size, bfloat16_differences, recipe)[0]
    assert 1e-4 < differences["max_rel_grad_diff"] < 3e-2
    assert differences["max_abs_loss_diff"] < 3e-2


def test_bfloat16_is_near_with_the_loss_in_chunks_and_compiled_blocks(ranks: Ranks) -> None:
    for layout in (dict(tp=2), dict(dp_shard=2)):
        train = dict(micro_batch=1, loss_chunks=3, compile="aot_eager")
        differences = ranks(2, bfloat16_differences, small_recipe("bfloat16", parallel=layout, train=train))[0]
        assert 1e-4 < differences["max_rel_grad_diff"] < 3e-2


def test_gradients_of_a_frequent_token_are_added_exactly_in_bfloat16() -> None:
    """FSDP hands the embedding bfloat16 weights; the same token 500 times over, each with a small gradient."""
    weight = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.full((1, 500), 2)
    lookup(tokens, weight).backward(torch.full((1, 500, 4), 0.5, dtype=torch.bfloat16))
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.tensor([[0.0], [0.0], [250.0]], dtype=torch.bfloat16).expand(3, 4))


class Casts(TorchDispatchMode):
    """Counts how often each of these weights is made bfloat16."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.counts = {local_part(weight.detach()).data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(type_, DTensor) for type_ in types):
            return NotImplemented
        casts = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        if casts and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def casts(recipe: Recipe) -> set[int]:
    mesh = build_mesh(recipe, "cpu")
    model = assemble(recipe, mesh=mesh, device=CPU)
    batch = batch_of(recipe, rows_of_replica(recipe, mesh))
    matrices = [w for name, w in model.named_parameters() if w.ndim == 2 and not name.startswith("embedding")]
    with Casts(matrices) as seen:
        model.forward_backward(*batch)
    return set(seen.counts.values())


@pytest.mark.parametrize("parallel", [{}, dict(tp=2), dict(pp=2)])
def test_weights_are_cast_once_a_step(ranks: Ranks, parallel: dict[str, int]) -> None:
    for recompute, expected in (("none", {1}), ("full", {8})):  # 4 microbatches: a block twice in each
        recipe = small_recipe("bfloat16", parallel=parallel, train=dict(micro_batch=2), recompute=dict(mode=recompute))
        for counts in ranks(recipe.world_size, casts, recipe):
            assert counts - {4} == expected  # the output is not recomputed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_trains_is_proven_too_where_float64_has_other_kernels(ranks: Ranks, tmp_path: Path, dtype: str) -> None:
    recipe = small_recipe(dtype, parallel=dict(tp=2), train=dict(steps=1))
    parity = ranks(2, run, recipe, str(tmp_path))[0]["parity"]
    assert parity["passed"] and parity["dtype"] == "float64"
    if dtype == "float32":  # on a CPU all but bfloat16 have the same
        assert parity["trained_dtype"] is parity["trained_passed"] is None
    else:
        assert parity["trained_dtype"] == dtype and parity["trained_passed"]
        assert 1e-4 < parity["trained_max_rel_grad_diff"] < 3e-2


def test_float32_trains_to_the_same_losses(ranks: Ranks, tmp_path: Path) -> None:
    steps = trained(ranks, tmp_path, LAYOUTS["fsdp·tp"], dtype="float32")
    alone = trained(ranks, tmp_path, {"model": LAYOUTS["fsdp·tp"]["model"]}, dtype="float32")
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in alone], abs=1e-4)


def test_batches_do_not_depend_on_the_layout() -> None:
    recipe = small_recipe(train=dict(micro_batch=3))
    whole, _ = batch_of(recipe, range(8), step=5)
    parts = [batch_of(recipe, range(first, first + 2), step=5)[0] for first in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_large_model_is_proven_on_a_smaller_one(ranks: Ranks) -> None:
    tables = dict(
        model=dict(preset="llama3-70b"),
        train=dict(seq_len=8192, global_batch=16, micro_batch=1, dtype="bfloat16"),
        parallel=dict(pp=2, dp_shard=2, tp=2),
        pipeline=dict(schedule="interleaved-1f1b"),
    )
    recipe = recipe_from_tables(tables)
    proof, words = parity_recipe(recipe)
    assert proof.parallel == recipe.parallel and proof.model.n_layers == 4 and "smaller model" in words
    differences, _ = ranks(8, parity, proof)[0]
    assert differences["max_rel_grad_diff"] <= 1e-10
    same, words = parity_recipe(small_recipe(dtype="bfloat16"))
    assert same == small_recipe() and words == "one process, same model and batch"


def test_a_long_sequence_is_proven_on_a_shorter_one() -> None:
    """Attention counts: tiny is small, but 4096 tokens are not; and plain products in float64 keep every score."""
    lengths = {}
    for seq_len in (1024, 8192, 16384):
        recipe = recipe_from_tables(dict(train=dict(seq_len=seq_len, global_batch=1)))
        lengths[seq_len] = [parity_recipe(recipe, on_cuda=on_cuda)[0].train.seq_len for on_cuda in (False, True)]
    assert lengths == {1024: [1024, 1024], 8192: [8192, 16], 16384: [16, 16]}


def test_record_and_steps(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe(parallel=dict(dp_shard=2), train=dict(steps=5))
    assert ranks(2, run, recipe, str(tmp_path))[1] is None  # rank 0 alone writes
    record = json.loads((tmp_path / "record.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert record["steps"] == lines and [step["step"] for step in lines] == [1, 2, 3, 4, 5]
    speed = record["throughput"]
    assert speed["step_seconds"]["p10"] <= speed["step_seconds"]["median"] <= speed["step_seconds"]["p90"]
    assert speed["tokens_per_s"] == pytest.approx(8 * 16 / speed["step_seconds"]["median"])
    assert speed["tokens_per_s_per_rank"] == pytest.approx(speed["tokens_per_s"] / 2)
    assert speed["cpu_seconds_per_step"] > 0
    assert record["environment"]["backend"] == "gloo" and "synthetic" in record["environment"]["data"]
    assert str(os.getcwd()) not in json.dumps(record)


def test_too_few_steps_for_a_time_give_null(ranks: Ranks, tmp_path: Path) -> None:
    record = ranks(1, run, small_recipe(train=dict(steps=3, parity=False)), str(tmp_path))[0]
    assert record["throughput"]["step_seconds"] == {"median": None, "p10": None, "p90": None}
    assert record["throughput"]["tokens_per_s"] is None and record["throughput"]["cpu_seconds_per_step"] is None
    assert record["parity"]["passed"] is None


@pytest.mark.parametrize("sections", [{}, dict(parallel=dict(tp=2)), dict(recompute=dict(mode="selective"))])
def test_attention_kernels_agree_and_only_plain_products_compute_what_the_mask_hides(
    ranks: Ranks, tmp_path: Path, sections: dict[str, Any]
) -> None:
    runs = {}
    for attention in ("auto", "flash", "math"):
        recipe = small_recipe(**sections | {"train": dict(steps=2, attention=attention)})
        runs[attention] = ranks(recipe.world_size, run, recipe, str(tmp_path))[0]
        assert runs[attention]["parity"]["passed"]
    losses = [[step["loss"] for step in record["steps"]] for record in runs.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[2] == pytest.approx(losses[0], rel=1e-9)
    auto, flash, math = (record["flops"]["hardware_flops_per_token"] for record in runs.values())
    assert auto == flash < math
    kernels = [record["flops"]["attention_kernels"] for record in runs.values()]
    assert kernels == [["flash_attention_for_cpu"], ["flash_attention_for_cpu"], []]


def test_a_kernel_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"train.attention = 'cudnn': needs CUDA"):
        choose_device(small_recipe(train=dict(attention="cudnn", device="cpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=r"train.attention = 'flash': has no float32 kernel on CUDA"):
        choose_device(small_recipe("float32", train=dict(attention="flash")))
    device, _ = choose_device(small_recipe("bfloat16", train=dict(attention="flash")))
    assert device.type == "cuda"


def buckets_left(recipe: Recipe) -> bool:
    model = assemble(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU)
    model.forward_backward(*batch_of(recipe, range(4)))
    buckets = weakref.ref(model.buckets)
    del model
    while gc.collect():
        pass
    return buckets() is not None


def test_a_model_that_is_dropped_is_freed(ranks: Ranks) -> None:
    """With its gradient buckets, and so the process groups and their threads."""
    assert ranks(2, buckets_left, small_recipe(parallel=dict(dp_replicate=2))) == [False, False]


def test_what_compiled_code_hides_is_null_with_the_reason(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe("float32", parallel=dict(tp=2), train=dict(steps=5, compile="aot_eager", parity=False))
    record = ranks(2, run, recipe, str(tmp_path))[0]
    assert record["traffic"] is None and record["throughput"]["step_parts"] is None
    assert [row["peak_bytes"] for row in record["memory"]["per_rank"]] == [None, None]
    assert record["memory"]["max_peak_bytes"] is None and "compiled" in record["memory"]["note"]
    assert record["flops"]["hardware_flops_per_token"] > record["flops"]["model_flops_per_token_causal"]
