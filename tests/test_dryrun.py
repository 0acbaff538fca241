"""A dry run says what the same step does on real gloo ranks: memory to the byte, traffic and FLOPs equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import CPU, small_recipe
from ranks import Ranks

from launch.cli import main
from parallel.dryrun import dry_run, dry_run_rank
from parallel.engines.engine import run_step
from parallel.engines.native import NativeEngine
from parallel.kinds import distinct_ranks, scaled
from parallel.measure.counters import Counters, Measures
from parallel.measure.model_flops import model_flops_per_token
from parallel.measure.observer import Step
from parallel.mesh import build_mesh
from parallel.recipe import SCHEDULES, Recipe, RecipeError, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
Sections = dict[str, dict[str, Any]]


def case(name: str, **sections: dict[str, Any]) -> Any:
    """Two layers, unless `sections` say otherwise: the time goes by the number of operators."""
    marks = [pytest.mark.long] * (name in LONG)
    return pytest.param(sections | {"model": dict(n_layers=2) | sections.get("model", {})}, id=name, marks=marks)


# Of these another case has the schedule, the method of context or the chunks.
LONG = ("cp all-gather", "pp interleaved-1f1b", "pp looped-bfs", "pp zbv", "pp·fsdp", "tp, loss in chunks")
ONE_BY_ONE = dict(global_batch=4, micro_batch=1)

CASES = [
    case("single", train=dict(micro_batch=4, dtype="bfloat16")),
    case("ddp", parallel=dict(dp_replicate=2), train=dict(micro_batch=3), ddp=dict(bucket_mib=0.01)),
    case("ddp, no overlap, tied", parallel=dict(dp_replicate=2), ddp=dict(overlap=False),
         model=dict(tied_embeddings=True)),
    case("zero2", parallel=dict(dp_shard=2), sharding=dict(reshard_after_forward=False), train=ONE_BY_ONE),
    case("fsdp", parallel=dict(dp_shard=2), train=ONE_BY_ONE),
    case("fsdp, bfloat16, foreach", parallel=dict(dp_shard=2), train=dict(dtype="bfloat16", adamw="foreach")),
    case("fsdp, three ranks that divide nothing", parallel=dict(dp_shard=3), train=dict(global_batch=9)),
    case("fsdp, prefetch, tied", parallel=dict(dp_shard=2), sharding=dict(prefetch=2),
         model=dict(n_layers=4, tied_embeddings=True)),
    case("hsdp", parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1)),
    *(
        case(f"recompute {mode}", parallel=parallel, recompute=dict(mode=mode), model=dict(n_layers=3))
        for mode, parallel in (
            ("full", dict(dp_shard=2)),
            ("every(2)", dict(dp_replicate=2)),
            ("sqrt", dict(tp=2)),
        )
    ),
    case("recompute selective", parallel=dict(dp_shard=2, tp=2), recompute=dict(mode="selective")),
    case("tp", parallel=dict(tp=2), tensor=dict(sequence_parallel=False, loss_parallel=False)),
    case("tp, uneven vocabulary", parallel=dict(tp=2), tensor=dict(sequence_parallel=False),
         model=dict(vocab_size=67)),
    case("tp·sp, uneven vocabulary", parallel=dict(tp=2), model=dict(vocab_size=67)),
    *(
        case(f"cp {method}", parallel=dict(cp=4), context=dict(method=method))
        for method in ("ring", "all-gather", "ulysses")
    ),
    *(
        case(f"pp {schedule}", parallel=dict(pp=2), pipeline=dict(schedule=schedule), train=ONE_BY_ONE,
             model=dict(n_layers=5, tied_embeddings=True))
        for schedule in SCHEDULES
    ),
    case("pp, bfloat16", parallel=dict(pp=2), pipeline=dict(schedule="gpipe"),
         train=ONE_BY_ONE | dict(dtype="bfloat16")),
    case("pp 4", parallel=dict(pp=4), train=dict(micro_batch=1), model=dict(n_layers=4)),
    case("ddp·tp", parallel=dict(dp_replicate=2, tp=2)),
    case("fsdp·tp", parallel=dict(dp_shard=2, tp=2), train=dict(micro_batch=2)),
    case("fsdp·cp", parallel=dict(dp_shard=2, cp=2)),
    case("cp·tp", parallel=dict(cp=2, tp=2), context=dict(method="all-gather")),
    case("pp·fsdp", parallel=dict(pp=2, dp_shard=2), train=dict(micro_batch=1), recompute=dict(mode="full")),
    case("pp·tp", parallel=dict(pp=2, tp=2), train=ONE_BY_ONE, pipeline=dict(schedule="interleaved-1f1b"),
         model=dict(n_layers=4)),
    case("pp·ddp, zbv", parallel=dict(pp=2, dp_replicate=2), train=dict(micro_batch=1),
         pipeline=dict(schedule="zbv"), model=dict(n_layers=4)),
    *(
        case(f"{'·'.join(parallel) or 'single'}, loss in chunks", parallel=parallel,
             train=ONE_BY_ONE | dict(loss_chunks=3, dtype=dtype))
        for parallel, dtype in (
            ({}, "float32"), ({}, "bfloat16"), (dict(dp_shard=2), "bfloat16"), (dict(tp=2), "float32")
        )
    ),
    case("pp, zbv, loss in chunks", parallel=dict(pp=2), train=ONE_BY_ONE | dict(loss_chunks=3),
         pipeline=dict(schedule="zbv"), model=dict(n_layers=4)),
]  # fmt: skip


def real_step(recipe: Recipe, peaks: set[int]) -> Measures:
    """The second step, or, where a rank's peak is none of `peaks`, the one with the least peak of up to five.

    On a busy machine gloo's threads may keep a message longer than the tracker waits, so that a peak is too high.
    """
    engine = NativeEngine(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU)
    parameters = [parameter for _, parameter in engine.named_parameters()]

    def batch(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(recipe.replica_batch, recipe.train.seq_len, dtype=torch.int64)
        return tokens, torch.zeros_like(tokens)

    run_step(engine, Step(1), batch)
    steps: list[Measures] = []
    done = torch.tensor(False)
    while not done and len(steps) < 5:
        counters = Counters(recipe, parameters, engine.optimizer, mesh=engine.mesh, device=CPU, nth=1)
        engine.observers[:] = [counters]
        run_step(engine, Step(2), batch)
        assert counters.measures is not None
        steps.append(counters.measures)
        least = min(steps, key=lambda measures: measures.memory["peak_bytes"])
        done.fill_(least.memory["peak_bytes"] in peaks)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return least


@pytest.mark.parametrize("sections", CASES)
def test_equals_the_real_step(ranks: Ranks, sections: Sections) -> None:
    recipe = small_recipe("float32", **sections)
    kinds = distinct_ranks(recipe)
    dry = {rank: dry_run_rank(recipe, rank=rank) for rank in kinds}
    real = ranks(recipe.world_size, real_step, recipe, {measures.memory["peak_bytes"] for measures in dry.values()})
    assert dry == {rank: real[rank] for rank in kinds}
    # Ranks that are left out are like one that is not.
    assert sum(kinds.values()) == recipe.world_size
    assert sum(n_ranks * real[rank].flops for rank, n_ranks in kinds.items()) == sum(rank.flops for rank in real)
    for extreme in (max, min):
        assert extreme(real[rank].memory["peak_bytes"] for rank in kinds) == extreme(
            rank.memory["peak_bytes"] for rank in real
        )


def test_finds_a_layer_more_and_a_message_less() -> None:
    recipe = small_recipe("float32", parallel=dict(dp_shard=2))
    here = dry_run_rank(recipe, rank=0)
    deeper = dry_run_rank(small_recipe("float32", parallel=dict(dp_shard=2), model=dict(n_layers=5)), rank=0)
    assert deeper.memory["peak_bytes"] > here.memory["peak_bytes"]
    assert deeper.flops > here.flops
    kept = small_recipe("float32", parallel=dict(dp_shard=2), sharding=dict(reshard_after_forward=False))
    assert _calls(dry_run_rank(kept, rank=0), "all_gather") < _calls(here, "all_gather")


def _calls(measures: Measures, collective: str) -> int:
    return sum(row["calls"] for row in measures.traffic if row["collective"] == collective)


@pytest.mark.parametrize(("dtype", "n_bytes"), [("bfloat16", 2 * (4 + 4 - 2)), ("float32", 2 * (4 + 4 - 4) - 4)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_norm_keeps_its_input_on_cuda_and_on_a_cpu_what_it_makes_of_it(
    dtype: str, n_bytes: int, recompute: str
) -> None:
    """So many bytes less of each token and feature, in both norms of a block; but in float32 keys and values are kept
    for each head, here twice as many. Nothing else is counted differently.
    """
    of_device: dict[str, list[Measures]] = {"cpu": [], "cuda": []}
    for device, found in of_device.items():
        for n_layers in (3, 4):
            recipe = small_recipe(
                dtype, model=dict(n_layers=n_layers), train=dict(device=device), recompute=dict(mode=recompute)
            )
            found.append(dry_run_rank(recipe, rank=0))
    tokens, d_model = 8 * 16, recipe.model.d_model
    on_cpu, on_cuda = (
        many.memory["activations_bytes"] - few.memory["activations_bytes"] for few, many in of_device.values()
    )
    assert on_cpu - on_cuda == (n_bytes * tokens * d_model if recompute == "none" else 0)
    for one, other in zip(*of_device.values(), strict=True):
        assert (one.flops, one.traffic) == (other.flops, other.traffic)
        assert one.memory["parameters_bytes"] == other.memory["parameters_bytes"]
    note = dry_run(recipe, ranks=[0])
    assert note["environment"]["device"] == "fake cuda" and "norms as on CUDA" in note["memory"]["note"]


# ---- scale ---------------------------------------------------------------------------------------------------------


def test_thousands_of_ranks_by_hand() -> None:
    """Llama 3 8B's shape on 16,384 ranks, more than it has rows: a rank keeps a row of padding, or next to nothing."""
    overrides = ["model.n_layers=2", "train.seq_len=128", "train.micro_batch=8"]
    recipe = scaled(load_recipe(RECIPES / "large/llama3-8b-fsdp.toml", overrides), 16384)
    first, last = (dry_run_rank(recipe, rank=rank).memory for rank in (0, 16383))
    block = 6 * 4096 + 14336 + 2  # a row of q, k, v, out, gate, up; of down; of two norms
    ends = 2 * 8 * 4096 + 1  # 128256 rows are 8 each, of embedding and output; the last norm
    assert first["parameters_bytes"] == last["parameters_bytes"] == 4 * (2 * block + ends)
    n_tensors = 2 * 9 + 3  # each with a float32 count of steps
    assert first["optimizer_bytes"] == 2 * first["parameters_bytes"] + 4 * n_tensors
    assert last["optimizer_bytes"] == 4 * n_tensors


# ---- which ranks ---------------------------------------------------------------------------------------------------


def test_world_size_scales_data_parallel_ranks_and_the_batch() -> None:
    recipe = small_recipe(parallel=dict(pp=2, dp_shard=2, tp=2), train=dict(micro_batch=1))
    large = scaled(recipe, 64)
    assert (large.world_size, large.parallel.dp_shard, large.train.global_batch) == (64, 16, 64)
    assert large.n_microbatches == recipe.n_microbatches
    replicas = scaled(small_recipe(parallel=dict(tp=2)), 8).parallel
    assert (replicas.dp_replicate, replicas.dp_shard) == (4, 1)
    with pytest.raises(RecipeError, match=r"--world-size = 6: .* multiple of the rest, 4"):
        scaled(recipe, 6)


@pytest.mark.parametrize(
    ("sections", "kinds"),
    [
        (dict(parallel=dict(dp_replicate=8)), {0: 8}),
        (dict(parallel=dict(tp=2), model=dict(vocab_size=68)), {0: 2}),
        (dict(parallel=dict(tp=2), model=dict(vocab_size=67)), {0: 1, 1: 1}),
        (dict(parallel=dict(pp=4, dp_replicate=2), train=dict(micro_batch=1)), {0: 2, 2: 2, 4: 2, 6: 2}),
        # 68, 48 and 32 rows over 5 ranks: 14 or 12, 10 or 8, 7 or 4; 16 rows: 4, or none on the last
        (dict(parallel=dict(dp_shard=5), train=dict(global_batch=10)), {0: 4, 4: 1}),
        (dict(parallel=dict(cp=4)), {0: 1, 1: 2, 3: 1}),
        (dict(parallel=dict(cp=4), context=dict(method="ulysses")), {0: 4}),
    ],
)
def test_distinct_ranks(sections: Sections, kinds: dict[int, int]) -> None:
    assert distinct_ranks(small_recipe(**sections)) == kinds


# ---- the record and the command ------------------------------------------------------------------------------------


def test_a_record_says_null_for_what_the_chosen_ranks_leave_open() -> None:
    recipe = small_recipe("float32", parallel=dict(pp=2), train=dict(micro_batch=2))
    half = dry_run(recipe, ranks=[1])
    assert (half["kind"], half["status"], half["steps"]) == ("dry-run", "ok", [])
    assert [row["rank"] for row in half["memory"]["per_rank"]] == [1]
    assert half["memory"]["max_peak_bytes"] is None and half["flops"]["hardware_flops_per_token"] is None
    assert half["flops"]["mfu"] is None and half["throughput"]["tokens_per_s"] is None
    whole = dry_run(recipe, ranks=[0, 1])
    peaks = [row["peak_bytes"] for row in whole["memory"]["per_rank"]]
    assert (whole["memory"]["max_peak_bytes"], whole["memory"]["min_peak_bytes"]) == (max(peaks), min(peaks))
    assert whole["memory"]["per_rank"][1] == half["memory"]["per_rank"][0]
    model_flops = model_flops_per_token(recipe.model, seq_len=recipe.train.seq_len)
    assert model_flops.causal < whole["flops"]["hardware_flops_per_token"] < model_flops.full * 1.5
    with pytest.raises(RecipeError, match=r"--rank = 2: the recipe has ranks 0 to 1"):
        dry_run(recipe, ranks=[2])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "strategies/fsdp.toml")
    assert main(["dry-run", recipe, "--world-size", "64", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "fsdp/record.json").read_text())
    assert printed["layout"]["world_size"] == printed["recipe"]["parallel"]["dp_shard"] == 64
    assert main(["dry-run", recipe]) == 0
    assert "rank 0" in capsys.readouterr().out
    for wrong, message in (
        (["--rank", "9"], "--rank = 9"),
        (["--world-size", "0"], "--world-size = 0"),
        (["--rank", "1", "--all-distinct-ranks"], "--rank"),
        (["--set", "parallel.tp=3"], "parallel.tp = 3"),
    ):
        assert main(["dry-run", recipe, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
