"""The memory tracker: exact where a peak can be worked out by hand, and held to what the system calls resident."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import CPU, batch_of, small_recipe
from ranks import Ranks
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from parallel.assemble import Assembled, assemble
from parallel.batches import rows_of_replica
from parallel.measure.accelerators import Peak
from parallel.measure.counters import Measures, fill_in
from parallel.measure.memory import MemoryTracker, allocator_peaks, reset_allocator_peaks
from parallel.measure.record import CATEGORIES, Record
from parallel.mesh import build_mesh
from parallel.recipe import Recipe
from parallel.strategies.chunked_loss import chunked_linear_loss
from parallel.transformer import cross_entropy

B, D, H = 2, 8, 16  # rows, width, hidden width
X, A = 4 * B * D, 4 * B * H  # bytes of x and of the hidden activations
W = 4 * D * H  # bytes of a matrix


def layer(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x @ up).relu() @ down  # relu keeps its result for backward, not its input


def weights(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for _ in range(n) for shape in ((D, H), (H, D))]


def split(peak: dict[str, int]) -> list[int]:
    """By category; and the peak is their sum."""
    values = [peak[f"{category}_bytes"] for category in CATEGORIES]
    assert peak["peak_bytes"] == sum(values)
    return values


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_forward_keeps_what_backward_needs() -> None:
    parameters, x = weights(2), torch.ones(B, D)
    with MemoryTracker(parameters, None, device=CPU) as tracker:
        y = layer(layer(x, *parameters[:2]), *parameters[2:])
    # At the last relu: the first layer's hidden activations and result, and relu's input and result.
    assert split(tracker.peak()) == [4 * W, 0, 0, (A + X) + 2 * A, X]
    assert y.requires_grad


def test_recompute_keeps_the_inputs_of_layers_and_one_layer_at_work() -> None:
    parameters, x = weights(3), torch.ones(B, D)
    with MemoryTracker(parameters, None, device=CPU) as tracker:
        y = x
        for i in range(0, 6, 2):
            y = checkpoint(layer, y, *parameters[i : i + 2], use_reentrant=False, preserve_rng_state=False)
    assert split(tracker.peak()) == [6 * W, 0, 0, 2 * X + 2 * A, X]


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 5])
def test_a_loss_in_chunks_holds_one_chunk_of_logits(n_chunks: int) -> None:
    x, weight = torch.ones(1, 24, D, requires_grad=True), nn.Parameter(torch.ones(1000, D))
    targets = torch.ones(1, 24, dtype=torch.int64)
    with MemoryTracker([weight], None, device=CPU) as tracker:
        chunked_linear_loss(x, weight, targets, loss=cross_entropy, n_chunks=n_chunks).backward()
    # Of one chunk: logits, their log-softmax, and the gradients of both; whole: those of x and W; three scalars.
    chunk, numbers = 4 * 1000 * math.ceil(24 / n_chunks), 4 * 3
    assert split(tracker.peak())[3] == 4 * chunk + 4 * 24 * D + 4 * 1000 * D + numbers


def test_gradients_are_those_that_become_grad() -> None:
    parameters, x = weights(1), torch.ones(B, D)
    y = layer(x, *parameters).sum()
    with MemoryTracker(parameters, None, device=CPU) as tracker:
        y.backward()
    # The last matmul of backward makes the second gradient out of x and the hidden activations' gradient. Beside them
    # there are the loss, which the region found, and its own gradient.
    assert split(tracker.peak()) == [2 * W, 2 * W, 0, A + 4, X + 4]


def test_a_gradient_on_its_way_into_grad_is_other() -> None:
    weight, x = nn.Parameter(torch.ones(D, H)), torch.ones(B, D)
    (x @ weight).sum().backward()
    y = (x @ weight).sum()
    with MemoryTracker([weight], None, device=CPU) as tracker:
        y.backward()
    assert split(tracker.peak()) == [W, W, 0, 4, W + X + 4]


def test_optimizer_state_is_eight_bytes_a_parameter_and_four_a_step_count() -> None:
    parameters = weights(1)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with MemoryTracker(parameters, optimizer, device=CPU) as tracker:
        optimizer.step()  # makes the state
    assert split(tracker.peak()) == [2 * W, 2 * W, 2 * (2 * W + 4), 0, 0]


def test_temporaries_of_the_optimizer_are_other() -> None:
    parameters = weights(1)
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with MemoryTracker(parameters, optimizer, device=CPU) as tracker:
        optimizer.step()
    *known, activations, other = split(tracker.peak())
    assert known == [2 * W, 2 * W, 2 * (2 * W + 4)]
    assert activations == 0
    assert other >= 2 * W  # the square roots of both second moments at once


def test_storages_count_once_and_at_their_present_size() -> None:
    tied = nn.Parameter(torch.ones(D, H))
    buffer = torch.ones(100)
    with MemoryTracker([tied, tied], None, device=CPU) as tracker:
        views = [tied.t(), tied[0], tied.flatten()]
        made = torch.zeros(10)
        made.untyped_storage().resize_(4000)
        made.untyped_storage().resize_(40)
        buffer.untyped_storage().resize_(0)
        made.add_(torch.tensor([1.0]))
    assert split(tracker.peak()) == [W, 0, 0, 0, 400 + 4000]  # what is resized by hand is FSDP's: other
    assert len(views) == 3


def test_what_is_older_than_the_region_counts_if_it_is_used() -> None:
    unused, used, freed = torch.ones(1000), torch.ones(100), torch.ones(10)
    with MemoryTracker([], None, device=CPU) as tracker:
        y = used + freed.sum()
        del freed
        y = y * 2
    assert split(tracker.peak()) == [0, 0, 0, 400 + 400, 400]
    assert len(unused) == 10 * len(y)


def test_nothing_stays_after_the_region() -> None:
    resize, parameters = torch.UntypedStorage.resize_, weights(1)
    optimizer = torch.optim.AdamW(parameters)
    tracker = MemoryTracker(parameters, optimizer, device=CPU)
    with pytest.raises(KeyError), tracker:
        y = torch.ones(D)
        raise KeyError
    assert torch.UntypedStorage.resize_ is resize
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    storage = weakref.ref(y.untyped_storage())
    del y
    assert storage() is None  # the tracker holds no tensor
    before = tracker.peak()
    torch.ones(1000)
    assert tracker.peak() == before


# ---- layouts -------------------------------------------------------------------------------------------------------


def tracked_step(recipe: Recipe, model: Assembled, batch: tuple[Tensor, Tensor]) -> dict[str, int]:
    """The lowest peak of three steps after the first, which makes optimizer state and FSDP's buffers.

    The lowest, for on a busy machine gloo's threads may let go of a message later than the tracker waits for them.
    """
    parameters = [parameter for _, parameter in model.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> dict[str, int]:
        with MemoryTracker(parameters, optimizer, device=CPU) as tracker:
            model.zero_gradients()
            model.forward_backward(*batch)
            model.clip_gradients(norm=model.gradient_norm(), largest=1.0)
            optimizer.step()
        return tracker.peak()

    step()
    return min((step() for _ in range(3)), key=lambda peak: peak["peak_bytes"])


def peak_of(recipe: Recipe) -> dict[str, int]:
    mesh = build_mesh(recipe, "cpu")
    model = assemble(recipe, mesh=mesh, device=CPU)
    return tracked_step(recipe, model, batch_of(recipe, rows_of_replica(recipe, mesh)))


def peaks(ranks: Ranks, **sections: dict[str, Any]) -> list[dict[str, int]]:
    recipe = small_recipe("float32", **sections)
    found = ranks(recipe.world_size, peak_of, recipe)
    for peak in found:
        split(peak)
    return found


TENSORS = 2 + 1 + 4 * 9  # parameters of the small model, each with a step count of 4 bytes
PARAMETERS = 68 * 32 * 2 + 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)


def test_one_process_and_ddp_hold_everything(ranks: Ranks) -> None:
    (single,), (ddp, _) = peaks(ranks), peaks(ranks, parallel=dict(dp_replicate=2))
    (small, _) = peaks(ranks, parallel=dict(dp_replicate=2), ddp=dict(bucket_mib=0.001))
    for peak in (single, ddp, small):
        assert peak["parameters_bytes"] == 4 * PARAMETERS
        assert peak["optimizer_bytes"] == 8 * PARAMETERS + 4 * TENSORS
    for peak in (single, small):
        assert peak["gradients_bytes"] == 0  # the peak is where backward begins, and no gradient exists yet
    assert ddp["gradients_bytes"] == 4 * PARAMETERS  # a single bucket, from the first gradient on
    assert ddp["activations_bytes"] < 0.6 * single["activations_bytes"]


@pytest.mark.parametrize("n", [2, 4])
def test_fsdp_divides_parameters_and_optimizer_state(ranks: Ranks, n: int) -> None:
    for peak in peaks(ranks, parallel=dict(dp_shard=n)):
        assert peak["parameters_bytes"] == 4 * PARAMETERS // n
        assert peak["optimizer_bytes"] == 8 * PARAMETERS // n + 4 * TENSORS


def test_weights_that_fsdp_gathered_are_other(ranks: Ranks) -> None:
    # At the peak, where backward begins, ZeRO-2 holds every weight; FSDP the last units'.
    fsdp, zero2 = (
        peaks(ranks, parallel=dict(dp_shard=2), sharding=dict(reshard_after_forward=reshard))[0]
        for reshard in (True, False)
    )
    assert zero2["other_bytes"] > 4 * PARAMETERS > fsdp["other_bytes"]


def test_full_recompute_lowers_activations_and_nothing_else(ranks: Ranks) -> None:
    (none,), (full,) = peaks(ranks), peaks(ranks, recompute=dict(mode="full"))
    assert full["activations_bytes"] < 0.4 * none["activations_bytes"]
    for category in ("parameters", "optimizer"):
        assert full[f"{category}_bytes"] == none[f"{category}_bytes"]


def test_tied_embeddings_count_once(ranks: Ranks) -> None:
    (tied,) = peaks(ranks, model=dict(tied_embeddings=True))
    assert tied["parameters_bytes"] == 4 * (PARAMETERS - 68 * 32)


def test_receive_buffers_of_a_pipeline_are_other(ranks: Ranks) -> None:
    message = 4 * 2 * 16 * 32  # (B, T, D) of a microbatch
    first, last = peaks(ranks, parallel=dict(pp=2), train=dict(micro_batch=2))
    for peak in (first, last):
        assert peak["other_bytes"] >= 4 * message  # 4 microbatches: hidden states or their gradients


# ---- fake is real --------------------------------------------------------------------------------------------------


def fake_peak(recipe: Recipe, *, fake_tensors: bool) -> dict[str, int]:
    """The same step as rank 0 of a fake process group, in this process."""
    dist.init_process_group("fake", rank=0, world_size=recipe.world_size, store=FakeStore())
    try:
        mesh = build_mesh(recipe, "cpu")
        model, batch = assemble(recipe, mesh=mesh, device=CPU), batch_of(recipe, rows_of_replica(recipe, mesh))
        if not fake_tensors:
            return tracked_step(recipe, model, batch)
        fake = FakeTensorMode()
        for module in model.stages[0].modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake.from_tensor(buffer))
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(_fake(parameter.detach(), fake)))
        with fake:
            tokens, targets = batch
            return tracked_step(recipe, model, (fake.from_tensor(tokens), fake.from_tensor(targets)))
    finally:
        dist.destroy_process_group()


def _fake(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    if not isinstance(tensor, DTensor):
        return fake.from_tensor(tensor)
    return DTensor.from_local(
        fake.from_tensor(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@pytest.mark.parametrize(
    ("sections", "fake_tensors"),
    [
        (dict(), True),
        (dict(recompute=dict(mode="selective")), True),
        (dict(parallel=dict(tp=2)), True),
        (dict(parallel=dict(tp=2), tensor=dict(sequence_parallel=False), recompute=dict(mode="full")), True),
        (dict(parallel=dict(dp_replicate=2)), False),
        (dict(parallel=dict(dp_shard=2)), False),
        (dict(parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1)), False),
        (dict(parallel=dict(cp=2)), False),
        (dict(parallel=dict(cp=2), context=dict(method="ulysses")), False),
    ],
)
def test_a_fake_group_gives_the_peak_of_a_real_one(
    ranks: Ranks, sections: dict[str, dict[str, Any]], fake_tensors: bool
) -> None:
    recipe = small_recipe("float32", **sections)
    assert fake_peak(recipe, fake_tensors=fake_tensors) == ranks(recipe.world_size, peak_of, recipe)[0]


# ---- resident memory -----------------------------------------------------------------------------------------------

RESIDENT = """
import gc, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from parallel.assemble import assemble
from parallel.measure.memory import MemoryTracker
from parallel.mesh import build_mesh
from parallel.recipe import load_recipe

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

def tracked(batch):
    tokens = torch.zeros(batch, recipe.train.seq_len, dtype=torch.int64)
    with MemoryTracker(parameters, optimizer, device=device) as tracker:
        model.forward_backward(tokens, tokens)
        optimizer.step()
        model.zero_gradients()
    return tracker.peak()

device = torch.device("cpu")
torch.set_num_threads(1)
recipe = load_recipe(sys.argv[1], sys.argv[2:])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = assemble(recipe, mesh=build_mesh(recipe, "cpu"), device=device)
parameters = [parameter for _, parameter in model.named_parameters()]
optimizer = torch.optim.AdamW(parameters, fused=True)
tracked(1)
gc.collect()
resident = status("VmRSS")
peak = tracked(recipe.train.global_batch)
older = sum(peak[key] for key in ("parameters_bytes", "optimizer_bytes", "other_bytes"))
print(json.dumps([peak["peak_bytes"] - older, status("VmHWM") - resident]))
"""


@pytest.mark.parametrize(("mode", "batch"), [("none", 8), ("full", 32)])
def test_resident_memory_agrees_within_two_percent(mode: str, batch: int) -> None:
    overrides = [f"recompute.mode={mode}", f"train.global_batch={batch}"]
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, "recipes/tiny.toml", *overrides],
        # glibc then takes each storage from the system by itself, and gives it back when it is freed.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    tracked, resident = json.loads(done.stdout)
    assert tracked > 100e6
    assert abs(resident - tracked) <= 0.02 * tracked


# ---- the record ----------------------------------------------------------------------------------------------------


def test_the_section_of_the_record() -> None:
    entries = [{"rank": 1, "peak_bytes": 5}, {"rank": 0, "peak_bytes": 7}]
    counted = {one["rank"]: Measures(0, {"peak_bytes": one["peak_bytes"]}, [], [], set()) for one in entries}
    record, peak = Record(), Peak(None, "none")
    fill_in(record, small_recipe(), counted, kinds=dict.fromkeys((0, 1), 1), step=2, peak=peak, ceiling=None, note=None)
    assert dataclasses.asdict(record.memory) == {
        "per_rank": entries[::-1],
        "max_peak_bytes": 7,
        "min_peak_bytes": 5,
        "step": 2,
        "note": None,
    }


def test_a_cpu_has_no_allocator_figures() -> None:
    reset_allocator_peaks(CPU)
    assert allocator_peaks(CPU) == {"allocator_peak_bytes": None, "allocator_reserved_peak_bytes": None}
