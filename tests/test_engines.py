"""Other engines: gradients and whole trajectories are those of one process, and records are measured, on real ranks."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from layouts import CPU, batch_of, small_recipe
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

import parallel.measure.hardware as hardware
from launch.table import table
from parallel.batches import rows_of_replica
from parallel.checkpoint.files import Checkpoint, refuse_unfit
from parallel.dryrun import dry_run
from parallel.engines import engine_of
from parallel.engines.engine import run_step
from parallel.measure.observer import Step
from parallel.measure.parity import compare_with_reference, reference_gradients
from parallel.mesh import build_mesh
from parallel.proof import PROOF_TOLERANCE
from parallel.recipe import Recipe, RecipeError, refuse_missing_packages
from parallel.training import train_in_group
from parallel.transformer import Transformer

Sections = dict[str, dict[str, Any]]


def case(name: str, **sections: dict[str, Any]) -> Any:
    return pytest.param(sections, id=name)


def of_engine(name: str, sections: Sections, dtype: str = "", **engine: Any) -> Recipe:
    """A small recipe for that engine, in the most exact type that it has, if in no other."""
    recipe = small_recipe("float32", **sections | {"engine": dict(name=name, **engine)})
    dtype = dtype or recipe.engine.exact_dtype
    return small_recipe(dtype, **sections | {"engine": dict(name=name, **engine)})


def reference_of(recipe: Recipe) -> Any:
    """On rank 0: loss and gradients of step 1 of one process in float64."""
    if dist.get_rank() != 0:
        return None
    exact = small_recipe(model=recipe.resolved()["model"], train=dict(global_batch=recipe.train.global_batch))
    return reference_gradients(exact, *batch_of(exact, range(recipe.train.global_batch)))


def proof(recipe: Recipe) -> tuple[dict[str, float], dict[str, float]] | None:
    """On rank 0: the differences of step 1 from one process, as they are, and with one gradient doubled."""
    mesh, reference = build_mesh(recipe, "cpu"), reference_of(recipe)
    engine = engine_of(recipe, mesh=mesh, device=CPU)
    loss = engine.gradients(*batch_of(recipe, rows_of_replica(recipe, mesh))).item()
    first = engine.named_parameters()[0][0]

    def doubled(name: str) -> list[Tensor]:
        times = 2.0 if name == first and dist.get_rank() == dist.get_world_size() - 1 else 1.0
        return [gradient * times for gradient in engine.gradient(name)]

    differences = compare_with_reference(engine.gradient, loss, reference, device=CPU)
    sabotaged = compare_with_reference(doubled, loss, reference, device=CPU)
    return (differences, sabotaged) if differences and sabotaged else None


def trajectory(recipe: Recipe) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of 8 steps."""
    mesh = build_mesh(recipe, "cpu")
    engine = engine_of(recipe, mesh=mesh, device=CPU)
    steps = [Step(number) for number in range(1, 9)]
    for step in steps:
        run_step(engine, step, lambda number: batch_of(recipe, rows_of_replica(recipe, mesh), number - 1))
    return [step.loss.item() for step in steps], [step.grad_norm.item() for step in steps]


def run(recipe: Recipe, out: str) -> dict[str, Any] | None:
    Path(out).mkdir(exist_ok=True)
    with mock.patch.object(hardware, "CEILING_SECONDS", 0.01):
        return train_in_group(recipe, out=Path(out), device=CPU)


# ---- Accelerate ----------------------------------------------------------------------------------------------------

ACCELERATE = [
    case("single, accumulation", train=dict(micro_batch=3)),
    case("ddp", parallel=dict(dp_replicate=4)),
    case("ddp, three ranks, many buckets", parallel=dict(dp_replicate=3), ddp=dict(bucket_mib=0.001),
         train=dict(global_batch=9, micro_batch=2)),
    case("ddp, tied, short last microbatch", parallel=dict(dp_replicate=2), model=dict(tied_embeddings=True),
         train=dict(micro_batch=3)),
    case("ddp, recompute", parallel=dict(dp_replicate=2), recompute=dict(mode="sqrt"), train=dict(micro_batch=1)),
    case("fsdp", parallel=dict(dp_shard=4), model=dict(n_layers=5, vocab_size=67)),
    case("fsdp, three ranks that divide nothing", parallel=dict(dp_shard=3), train=dict(global_batch=9, micro_batch=2)),
    case("fsdp, tied, short last microbatch", parallel=dict(dp_shard=2), model=dict(tied_embeddings=True),
         train=dict(micro_batch=3)),
    case("fsdp, weights kept", parallel=dict(dp_shard=4), sharding=dict(reshard_after_forward=False)),
    case("fsdp, recompute", parallel=dict(dp_shard=2), recompute=dict(mode="full"), train=dict(micro_batch=2)),
    case("fsdp, selective, loss in chunks", parallel=dict(dp_shard=2), recompute=dict(mode="selective"),
         train=dict(loss_chunks=3)),
    case("fsdp, recompute in groups", parallel=dict(dp_shard=2), recompute=dict(mode="sqrt")),
    case("hsdp", parallel=dict(dp_replicate=2, dp_shard=2)),
    case("hsdp, accumulation", parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1, global_batch=16)),
]  # fmt: skip


@pytest.mark.parametrize("sections", ACCELERATE)
def test_gradients_of_accelerate_are_those_of_one_process(ranks: Ranks, sections: Sections) -> None:
    recipe = of_engine("accelerate", sections)
    differences, sabotaged = ranks(recipe.world_size, proof, recipe)[0]
    assert differences["max_rel_grad_diff"] <= PROOF_TOLERANCE["float64"]
    assert differences["max_abs_loss_diff"] <= PROOF_TOLERANCE["float64"]
    assert sabotaged["max_rel_grad_diff"] > 1e-3


TRAJECTORY = dict(learning_rate=1e-2, weight_decay=0.3, grad_clip=0.1)


@pytest.mark.parametrize(
    "sections",
    [
        dict(parallel=dict(dp_replicate=2), train=TRAJECTORY | dict(micro_batch=3)),
        dict(parallel=dict(dp_shard=2), train=TRAJECTORY | dict(micro_batch=3), model=dict(tied_embeddings=True)),
        dict(parallel=dict(dp_replicate=2, dp_shard=2), train=TRAJECTORY | dict(adamw="foreach")),
        dict(parallel=dict(dp_shard=2), train=TRAJECTORY | dict(grad_clip=0.0)),
    ],
    ids=lambda sections: "·".join(sections["parallel"]),
)
def test_accelerate_trains_as_one_process(ranks: Ranks, sections: Sections) -> None:
    recipe = of_engine("accelerate", sections)
    answers = ranks(recipe.world_size, trajectory, recipe)
    alone = ranks(1, trajectory, small_recipe(model=sections.get("model", {}), train=sections["train"]))[0]
    for losses, norms in answers:  # the same on every rank
        assert losses == pytest.approx(alone[0], rel=1e-9) and norms == pytest.approx(alone[1], rel=1e-9)
    assert alone[1][0] > 0.2  # clipping halves it at least


def prepared(recipe: Recipe) -> set[tuple[Any, ...]]:
    engine = engine_of(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU)
    parameters = [parameter for _, parameter in engine.named_parameters()]
    assert {id(p) for group in engine.optimizer.param_groups for p in group["params"]} == set(map(id, parameters))
    return {(isinstance(p, DTensor), p.device_mesh.shape if isinstance(p, DTensor) else ()) for p in parameters}


def test_accelerate_on_a_cpu_is_what_the_recipe_says(ranks: Ranks) -> None:
    """By itself it takes DDP for FSDP2 there, without a word. Each engine after another is its own, too."""
    for parallel, found in (
        (dict(dp_shard=4), (True, (4,))),
        (dict(dp_replicate=4), (False, ())),
        (dict(dp_replicate=2, dp_shard=2), (True, (2, 2))),
    ):
        assert ranks(4, prepared, of_engine("accelerate", dict(parallel=parallel))) == [{found}] * 4


def test_what_accelerate_has_not_prepared_is_refused() -> None:
    from parallel.engines.accelerate import _refuse_other_split

    recipe = of_engine("accelerate", dict(parallel=dict(dp_shard=2)))
    with pytest.raises(RecipeError, match=r"engine.name = 'accelerate': has prepared .* for dp_replicate 1 · dp_shard"):
        _refuse_other_split(recipe, Transformer(recipe.model, seq_len=16))
    recipe = of_engine("accelerate", dict(parallel=dict(dp_replicate=2)))
    with pytest.raises(RecipeError, match=r"has prepared Transformer for dp_replicate 2"):
        _refuse_other_split(recipe, Transformer(recipe.model, seq_len=16))


def traffic_of(record: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {row["collective"]: (row["calls"], row["bytes_per_rank"]) for row in record["traffic"]}


@pytest.mark.parametrize("dim", ["dp_replicate", "dp_shard"])
def test_the_record_of_accelerate_is_as_whole_as_ours(ranks: Ranks, tmp_path: Path, dim: str) -> None:
    sections: Sections = dict(parallel={dim: 2}, train=dict(steps=5))
    theirs = ranks(2, run, of_engine("accelerate", sections, "float32"), str(tmp_path / "theirs"))[0]
    ours = ranks(2, run, small_recipe("float32", **sections), str(tmp_path / "ours"))[0]
    assert theirs["status"] == "ok" and theirs["parity"]["passed"] and theirs["parity"]["dtype"] == "float64"
    assert re.fullmatch(r"accelerate 1\.\d+\.\d+", theirs["environment"]["engine"])
    assert ours["environment"]["engine"] == "native" and theirs["memory"]["step"] == 3
    assert theirs["flops"]["hardware_flops_per_token"] == ours["flops"]["hardware_flops_per_token"]
    assert theirs["throughput"]["cpu_seconds_per_step"] > 0
    their_memory, our_memory = (record["memory"]["per_rank"][0] for record in (theirs, ours))
    for category in ("parameters", "optimizer"):
        assert their_memory[f"{category}_bytes"] == our_memory[f"{category}_bytes"] > 0
    their_traffic, our_traffic = traffic_of(theirs), traffic_of(ours)
    assert {row["mesh_dim"] for row in theirs["traffic"]} == {dim}
    if dim == "dp_shard":
        assert their_traffic["reduce_scatter"][1] == our_traffic["reduce_scatter"][1]
        assert sum(theirs["throughput"]["step_parts"].values()) > 0
    else:
        assert their_memory["gradients_bytes"] == our_memory["gradients_bytes"]
        assert their_traffic["broadcast"] == (1, 2 * 16 * 8 * 4)  # cos and sin of 16 positions x 8, from rank 0
        # ours adds 8 bytes of the loss, in a call of its own, as the engine for Accelerate does
        assert their_traffic["all_reduce"][1] == our_traffic["all_reduce"][1]
        assert theirs["throughput"]["step_parts"] is None  # DDP waits where no clock of Python's sees it


@pytest.mark.parametrize("parallel", [dict(dp_replicate=2), dict(dp_shard=2)])
def test_accelerate_in_bfloat16_is_near(ranks: Ranks, tmp_path: Path, parallel: dict[str, int]) -> None:
    recipe = of_engine("accelerate", dict(parallel=parallel, train=dict(steps=4)), "bfloat16")
    record = ranks(2, run, recipe, str(tmp_path))[0]
    assert record["parity"]["passed"] and record["parity"]["trained_passed"]
    assert 1e-4 < record["parity"]["trained_max_rel_grad_diff"] < 3e-2
    assert {row["parameters_bytes"] for row in record["memory"]["per_rank"]} <= {
        4 * recipe.model.n_parameters // parallel.get("dp_shard", 1)
    }  # in float32


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed_ranks() -> Iterator[Ranks]:
    """Of their own: DeepSpeed leaves much behind in a process."""
    pool = Ranks()
    yield pool
    pool.close()


def anew(function: Callable[..., Any], recipe: Recipe, *arguments: Any) -> Any:
    """`function` in a process where DeepSpeed has forgotten the groups of a test before, and what it has numbered."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    comm.cdb, Init.param_id = None, 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    of_tensors = ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP")
    of_data = ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
    for name in (*of_tensors, *of_data, "mpu", "mesh_device"):
        assert hasattr(groups, name)
        setattr(groups, name, None)
    groups._ALL_TO_ALL_GROUP = {}
    return function(recipe, *arguments)


def of_stage(stage: int, sections: Sections, dtype: str = "", n_ranks: int = 2) -> Recipe:
    if stage == 0:
        return of_engine("deepspeed", sections | {"parallel": dict(dp_replicate=n_ranks)}, dtype)
    return of_engine("deepspeed", sections | {"parallel": dict(dp_shard=n_ranks)}, dtype, zero_stage=stage)


DEEPSPEED = [
    case("odd shapes", n_ranks=4, model=dict(n_layers=5, vocab_size=67)),
    case("tied, short last microbatch", n_ranks=2, model=dict(tied_embeddings=True), train=dict(micro_batch=3)),
    case("three ranks that divide nothing", n_ranks=3, train=dict(global_batch=9, micro_batch=2)),
    case("recompute, loss in chunks", n_ranks=2, recompute=dict(mode="full"), train=dict(loss_chunks=3)),
]  # fmt: skip


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("sections", DEEPSPEED)
def test_gradients_of_deepspeed_are_those_of_one_process(
    deepspeed_ranks: Ranks, sections: dict[str, Any], stage: int
) -> None:
    """In float32, which shows, against one process in float64."""
    sections = dict(sections)
    recipe = of_stage(stage, n_ranks=sections.pop("n_ranks"), sections=sections)
    assert recipe.train.dtype == "float32"
    differences, sabotaged = deepspeed_ranks(recipe.world_size, anew, proof, recipe)[0]
    assert 1e-8 < differences["max_rel_grad_diff"] <= PROOF_TOLERANCE["float32"]
    assert differences["max_abs_loss_diff"] <= PROOF_TOLERANCE["float32"]
    assert sabotaged["max_rel_grad_diff"] > 1e-3


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_trains_as_one_process(deepspeed_ranks: Ranks, stage: int) -> None:
    train = TRAJECTORY | dict(micro_batch=3)
    alone = deepspeed_ranks(1, trajectory, small_recipe(train=train))[0]
    for losses, norms in deepspeed_ranks(2, anew, trajectory, of_stage(stage, dict(train=train))):
        assert losses == pytest.approx(alone[0], rel=1e-6) and norms == pytest.approx(alone[1], rel=1e-4)
    assert alone[1][0] > 0.2


@pytest.mark.parametrize("stage", range(4))
def test_the_record_of_deepspeed_shows_what_its_stage_shares(
    deepspeed_ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    recipe = of_stage(stage, dict(train=dict(steps=5)))
    record = deepspeed_ranks(2, anew, run, recipe, str(tmp_path))[0]
    assert record["status"] == "ok" and record["parity"]["passed"] and record["parity"]["dtype"] == "float32"
    assert record["environment"]["engine"].startswith("deepspeed 0.19.") and record["memory"]["step"] == 3
    assert "proven in float32, the most exact type of deepspeed" in table([record])
    assert sum(record["throughput"]["step_parts"].values()) > 0
    whole = 4 * recipe.model.n_parameters
    part = pytest.approx(whole / 2, rel=0.01)  # padded
    memory = record["memory"]["per_rank"][0]
    assert memory["parameters_bytes"] == (part if stage == 3 else pytest.approx(whole, rel=0.01))
    # Two moments; with a copy of the weights beside them where they are of a part.
    moments = pytest.approx(2 * whole, rel=0.01) if stage == 0 else pytest.approx(3 / 2 * whole, rel=0.01)
    assert memory["optimizer_bytes"] == moments
    traffic = traffic_of(record)
    assert {row["mesh_dim"] for row in record["traffic"]} == {"dp_shard" if stage else "dp_replicate"}
    if stage < 3:
        assert traffic["all_reduce"][1] == pytest.approx(whole, rel=0.01)  # of 2 ranks each sends all, once
        assert ("all_gather" in traffic) == (stage > 0)
    else:
        assert traffic["reduce_scatter"][1] == part
        assert traffic["all_gather"][1] > 1.2 * whole / 2  # for forward, and most of it again for backward


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_in_bfloat16_is_near(deepspeed_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    recipe = of_stage(stage, dict(train=dict(steps=4)), "bfloat16")
    record = deepspeed_ranks(2, anew, run, recipe, str(tmp_path))[0]
    assert record["parity"]["passed"] and record["parity"]["trained_passed"]
    assert 1e-4 < record["parity"]["trained_max_rel_grad_diff"] < 3e-2


PLUGIN = dict(name="accelerate", plugin="deepspeed")
ULYSSES = dict(context=dict(method="ulysses"))
AUTOTP = dict(tensor=dict(sequence_parallel=False))
SHORT_LAST = dict(train=dict(micro_batch=3))
BY_DEEPSPEED = [
    case("offload, stage 2", **SHORT_LAST, parallel=dict(dp_shard=2), engine=dict(zero_stage=2, offload="optimizer")),
    case("offload of weights", **SHORT_LAST, parallel=dict(dp_shard=2), engine=dict(offload="parameters")),
    case("hpz", parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1)),
    case("recompute", **SHORT_LAST, parallel=dict(dp_shard=2), recompute=dict(mode="full"),
         engine=dict(checkpointing="deepspeed")),
    case("recompute, every second", parallel=dict(dp_replicate=2), recompute=dict(mode="every(2)"),
         engine=dict(checkpointing="deepspeed")),
    case("ulysses", **ULYSSES, **SHORT_LAST, parallel=dict(cp=2)),
    case("ulysses, stage 1", **ULYSSES, parallel=dict(cp=2, dp_shard=2), engine=dict(zero_stage=1)),
    case("ulysses, stage 3", **ULYSSES, parallel=dict(cp=2, dp_shard=2)),
    case("autotp", **AUTOTP, **SHORT_LAST, parallel=dict(tp=2)),
    case("autotp, stage 1", **AUTOTP, parallel=dict(tp=2, dp_shard=2), engine=dict(zero_stage=1)),
    case("autotp, stage 3", **AUTOTP, parallel=dict(tp=2, dp_shard=2)),
    case("pipeline", parallel=dict(pp=2), train=dict(micro_batch=2), engine=dict(zero_stage=1)),
    case("pipeline, data, recompute", parallel=dict(pp=2, dp_shard=2), train=dict(micro_batch=1),
         recompute=dict(mode="full"), engine=dict(zero_stage=1, checkpointing="deepspeed")),
    case("accelerate, stage 0", **SHORT_LAST, parallel=dict(dp_replicate=2), engine=PLUGIN),
    case("accelerate, stage 3", **SHORT_LAST, parallel=dict(dp_shard=2), engine=PLUGIN),
]  # fmt: skip


def by_deepspeed(sections: Sections, **train: Any) -> Recipe:
    engine = dict(name="deepspeed") | sections.get("engine", {})
    return small_recipe("float32", **sections | {"engine": engine, "train": sections.get("train", {}) | train})


def proven_trajectory(recipe: Recipe) -> tuple[dict[str, float] | None, list[float], list[float]]:
    """The differences of step 1 from one process, on rank 0; loss and gradient norm of 8 steps."""
    mesh, reference = build_mesh(recipe, "cpu"), reference_of(recipe)
    engine = engine_of(recipe, mesh=mesh, device=CPU)
    losses, norms, differences = [], [], None
    for step in range(8):
        losses.append(engine.gradients(*batch_of(recipe, rows_of_replica(recipe, mesh), step)).item())
        if step == 0:
            differences = compare_with_reference(engine.gradient, losses[0], reference, device=CPU)
        norms.append(engine.update().item())
    return differences, losses, norms


@pytest.fixture(scope="module")
def alone(deepspeed_ranks: Ranks) -> tuple[list[float], list[float]]:
    """The trajectory of one process, in float64."""
    answer: tuple[list[float], list[float]] = deepspeed_ranks(1, trajectory, small_recipe(train=TRAJECTORY))[0]
    return answer


@pytest.mark.parametrize("sections", BY_DEEPSPEED)
def test_what_else_deepspeed_does_is_as_one_process(
    deepspeed_ranks: Ranks, alone: tuple[list[float], list[float]], sections: Sections
) -> None:
    """Gradients of the first step, and eight steps with clipping and weight decay."""
    recipe = by_deepspeed(sections, **TRAJECTORY)
    answers = deepspeed_ranks(recipe.world_size, anew, proven_trajectory, recipe)
    differences = answers[0][0]
    assert 1e-8 < differences["max_rel_grad_diff"] <= PROOF_TOLERANCE["float32"]
    assert differences["max_abs_loss_diff"] <= PROOF_TOLERANCE["float32"]
    for _, losses, norms in answers:
        assert losses == pytest.approx(alone[0], rel=1e-5) and norms == pytest.approx(alone[1], rel=1e-4)


def refusal_without(recipe: Recipe, section: str, key: str) -> str:
    """What is said where DeepSpeed was not told `key` of that section of its configuration."""
    from parallel.engines import deepspeed

    config = deepspeed.config_of(recipe)
    del config[section][key]
    with mock.patch.object(deepspeed, "config_of", lambda recipe: config), pytest.raises(RecipeError) as refusal:
        engine_of(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("sections", "key", "said"),
    [
        (dict(parallel=dict(tp=2), **AUTOTP), ("tensor_parallel", "autotp_size"), "split by AutoTP: 0, where .* 28;"),
        (
            dict(parallel=dict(dp_shard=2), engine=dict(offload="parameters")),
            *(("zero_optimization", "offload_param"), "weights offloaded: False, where the recipe says True;"),
        ),
        (
            dict(parallel=dict(dp_replicate=2, dp_shard=2)),
            *(("zero_optimization", "zero_hpz_partition_size"), "ranks of hpZ: 4, where the recipe says 2;"),
        ),
    ],
    ids=["autotp", "offload", "hpz"],
)
def test_what_deepspeed_has_not_prepared_is_refused(
    deepspeed_ranks: Ranks, sections: Sections, key: tuple[str, str], said: str
) -> None:
    recipe = by_deepspeed(sections)
    for refusal in deepspeed_ranks(recipe.world_size, anew, refusal_without, recipe, *key):
        assert re.search(f"engine.name = 'deepspeed': has prepared .*{said}", refusal), refusal


def test_the_record_of_hpz_shows_which_weights_come_from_near(deepspeed_ranks: Ranks, tmp_path: Path) -> None:
    recipe = by_deepspeed(dict(parallel=dict(dp_replicate=2, dp_shard=2)), steps=5)
    record = deepspeed_ranks(4, anew, run, recipe, str(tmp_path))[0]
    sent = {(row["mesh_dim"], row["collective"]): row["bytes_per_rank"] for row in record["traffic"]}
    whole = 4 * recipe.model.n_parameters
    assert sent["dp_replicate·dp_shard", "all_gather"] == pytest.approx(3 / 4 * whole, rel=0.05)  # for forward
    assert 0.2 * whole < sent["dp_shard", "all_gather"] <= whole / 2  # for backward, of what did not stay
    parameters = record["memory"]["per_rank"][0]["parameters_bytes"]
    assert 0.3 * whole < parameters < 0.8 * whole  # a quarter, and of the half that is near what there is at the peak


def test_the_record_of_a_pipeline_shows_its_actions(deepspeed_ranks: Ranks, tmp_path: Path) -> None:
    recipe = by_deepspeed(dict(parallel=dict(pp=2), engine=dict(zero_stage=1)), micro_batch=2, steps=5)
    record = deepspeed_ranks(2, anew, run, recipe, str(tmp_path))[0]
    assert record["status"] == "ok" and record["parity"]["passed"]
    assert record["pipeline"]["bubble_fraction_ideal"] == pytest.approx(1 / 5) and record["pipeline"]["bubble_fraction"]
    done = {(row["rank"], row["action"], row["microbatch"]) for row in record["pipeline"]["timeline"]}
    assert done == {(rank, name, i) for rank in range(2) for name in ("forward", "backward") for i in range(4)}
    assert {row["mesh_dim"] for row in record["traffic"]} == {"pp"}


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_an_engine_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing_packages(small_recipe())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse_missing_packages(small_recipe())
    for name in ("accelerate", "deepspeed"):
        with pytest.raises(RecipeError) as refusal:
            refuse_missing_packages(of_engine(name, {}))
        said = f"engine.name = '{name}': is not installed; pip install 'parallel-lab[{name}]'"
        assert str(refusal.value) == said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "deepspeed" or None)
    with pytest.raises(
        RecipeError, match=r"engine.plugin = 'deepspeed': is not installed; .* 'parallel-lab\[deepspeed\]'"
    ):
        refuse_missing_packages(by_deepspeed(dict(engine=PLUGIN)))


def test_no_dry_run_and_no_checkpoint_of_another_engine() -> None:
    recipe = of_engine("accelerate", {})
    with pytest.raises(RecipeError, match=r"engine.name = 'accelerate': cannot be dry-run"):
        dry_run(recipe, ranks=[0])
    files: dict[str, Any] = dict(files={}, tensors={})
    checkpoint = Checkpoint(folder=Path(), step=1, recipe=recipe.resolved(), data=None, float32_matmul=None, **files)
    with pytest.raises(RecipeError, match=r"engine.name = 'accelerate': reads no checkpoints yet; --resume-from needs"):
        refuse_unfit(recipe, checkpoint, resume=False)
