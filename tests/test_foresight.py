"""Step times foretold: units, identities, hand-computed cases, and runs that others published."""

import csv
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.dryrun import dry_run_rank
from parallel.foresight.clusters import CATALOGUE, PROFILES, Cluster, cluster_from_tables, load_cluster
from parallel.foresight.constants import values_of
from parallel.foresight.memory import LAB, ON_CPU, Keeping, peak_bytes
from parallel.foresight.prediction import hardware_flops_per_token, parts_of, predict
from parallel.foresight.price import LINK_HOP_SECONDS, PARTS, Links, hop_seconds, price
from parallel.foresight.uncertainty import PROGRAM_DEVIATION, RUN_DEVIATION, corrected, covariance
from parallel.foresight.workload import Workload, bubble, of_recipe, stacked
from parallel.measure.accelerators import ACCELERATORS
from parallel.measure.model_flops import model_flops_per_token
from parallel.recipe import SCHEDULES, Recipe, RecipeError, Schedule, load_recipe, recipe_from_tables

ROOT = Path(__file__).parents[1]
H100 = load_cluster("h100")


def recipe(**sections: dict[str, Any]) -> Recipe:
    """Llama 3 8B in bfloat16, sequences of 4096; `sections` override its keys."""
    tables: dict[str, Any] = {
        "model": {"preset": "llama3-8b"},
        "data": {"source": "synthetic"},
        "train": {"seq_len": 4096, "global_batch": 64, "micro_batch": 1, "dtype": "bfloat16"},
    }
    for key, table in sections.items():
        tables[key] = tables.get(key, {}) | table
    return recipe_from_tables(tables)


def parts(found: Recipe, cluster: Cluster = H100) -> dict[str, float]:
    return {name: float(value) for name, value in parts_of(of_recipe(found), cluster, found.train.dtype).items()}


# ---- clusters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_names_accelerators_whose_peaks_are_known_and_says_where_figures_are_from(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.device.source and cluster.links.source
    assert cluster.accelerator == "cpu" or cluster.accelerator in ACCELERATORS
    rate = cluster.matmul_flops("float32" if name == "cpu" else "bfloat16")
    assert rate is not None
    peak = cluster.peak("bfloat16").flops
    assert peak is None or name == "cpu" or rate < peak


TABLES: dict[str, Any] = {
    "accelerator": "NVIDIA H200",
    "ranks_per_node": 8,
    "device": {"matmul_tflops": 800.0, "memory_gb_per_s": 4800.0, "multiprocessors": 132},
    "links": {"inside_gb_per_s": 400.0, "across_gb_per_s": 50.0},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 8}, "gpus = 8: unknown key"),
        ({"device": TABLES["device"] | {"matmul_tflop": 1}}, "did you mean matmul_tflops?"),
        (
            {"links": TABLES["links"] | {"inside_gb_per_s": -1.0}},
            "links.inside_gb_per_s = -1.0: give a number of",
        ),
        ({"links": TABLES["links"] | {"inside_gb_per_s": math.nan}}, "links.inside_gb_per_s = nan"),
        ({"software": {"profile": "tensorflow"}}, f"choose {', '.join(PROFILES)}"),
        ({"accelerator": "NVIDIA H300"}, "give its exact name, or memory_gib"),
        ({"accelerator": ["NVIDIA H200"]}, "accelerator = ['NVIDIA H200']"),
        ({"ranks_per_node": 0}, "ranks_per_node = 0"),
        ({"device": {}}, "device.memory_gb_per_s = 0.0"),
        ({"device": 3}, "write [device]"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        cluster_from_tables(TABLES | change, default_name="mine")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_cluster_of_ones_own_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'accelerator = "mine"\nmemory_gib = 64\nranks_per_node = 4\n[device]\nmatmul_tflops = 100\n'
        "memory_gb_per_s = 900\nmultiprocessors = 64\n[links]\ninside_gb_per_s = 100\nacross_gb_per_s = 10\n"
    )
    cluster = load_cluster(str(file))
    assert (cluster.name, cluster.memory_gib, cluster.software.profile) == ("mine", 64, "torch")
    assert cluster.peak("bfloat16").flops is None
    prediction = predict(recipe(parallel=dict(dp_shard=4)), cluster)
    assert prediction.mfu is None and "no peak is known" in prediction.peak_source
    with pytest.raises(RecipeError, match="is no cluster of the catalogue"):
        load_cluster("h1000")
    with pytest.raises(RecipeError, match="has no rate for it"):
        predict(recipe(train=dict(dtype="float32")), cluster)


# ---- the closed form -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "one": {},
    "ddp": dict(parallel=dict(dp_replicate=16)),
    "fsdp": dict(parallel=dict(dp_shard=64)),
    "zero2": dict(parallel=dict(dp_shard=16), sharding=dict(reshard_after_forward=False)),
    "hsdp": dict(parallel=dict(dp_replicate=4, dp_shard=8), recompute=dict(mode="full")),
    "tp": dict(parallel=dict(tp=8), recompute=dict(mode="selective", save=["attention"])),
    "cp": dict(parallel=dict(cp=4, dp_shard=2)),
    "ulysses": dict(parallel=dict(cp=4), context=dict(method="ulysses")),
    "pp": dict(parallel=dict(pp=4, tp=2)),
    "zbv": dict(parallel=dict(pp=4), pipeline=dict(schedule="zbv")),
    "compiled": dict(train=dict(compile="inductor")),
    "plain attention": dict(train=dict(attention="math")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_seconds_that_add_up_to_the_step(layout: str) -> None:
    found = recipe(**LAYOUTS[layout])
    prediction = predict(found, H100)
    assert [term.name for term in prediction.terms] == list(PARTS)
    assert all(term.seconds >= 0 and term.rate_from for term in prediction.terms)
    assert sum(term.seconds for term in prediction.terms) == pytest.approx(prediction.step_seconds)
    assert prediction.low_seconds < prediction.step_seconds < prediction.high_seconds
    tokens = found.train.global_batch * found.train.seq_len
    assert prediction.tokens_per_s == pytest.approx(tokens / prediction.step_seconds)
    assert prediction.mfu is not None and prediction.mfu_causal is not None and prediction.hfu is not None
    assert prediction.mfu_causal < prediction.mfu < 0.8 and prediction.mfu_causal < prediction.hfu < 0.8
    assert prediction.mfu * prediction.step_seconds * 989e12 * found.world_size / tokens == pytest.approx(
        model_flops_per_token(found.model, seq_len=4096).full
    )


def test_many_layouts_at_once_are_what_each_is_alone() -> None:
    works = [of_recipe(recipe(**layout)) for layout in LAYOUTS.values()]
    together = parts_of(stacked(works), H100, "bfloat16")
    for i, work in enumerate(works):
        for name, seconds in parts_of(work, H100, "bfloat16").items():
            assert np.broadcast_to(together[name], len(works))[i] == pytest.approx(float(seconds)), name
    assert peak_bytes(stacked(works)) == pytest.approx([float(peak_bytes(work)) for work in works])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_of_anything_takes_no_less(layout: str) -> None:
    """Monotone in FLOPs, in bytes, in each rate and in each constant of a cost."""
    work, rates, constants = of_recipe(recipe(**LAYOUTS[layout])), H100.rates("bfloat16"), values_of("hopper")

    def seconds(work: Workload = work, constants: dict[str, float] = constants, **changes: float) -> float:
        return float(sum(price(work, dataclasses.replace(rates, **changes), constants).values()))

    before = seconds()
    for field in ("n_layers", "d_ff", "vocab_size", "n_microbatches", "seq_len", "weight_bytes", "gradient_bytes"):
        assert seconds(dataclasses.replace(work, **{field: 2 * getattr(work, field)})) >= before, field
    for rate in ("matmul_flops", "memory_bytes_per_s", "inside_bytes_per_s", "across_bytes_per_s", "attention_gain"):
        assert seconds(**{rate: getattr(rates, rate) / 2}) >= before, rate
    for cost in ("wave", "scores", "operators", "launch", "tensor_messages"):
        assert seconds(constants=constants | {cost: 2 * constants[cost]}) >= before, cost
    for gain in ("products", "attention", "inside", "across", "overlap"):
        assert seconds(constants=constants | {gain: constants[gain] / 2}) >= before, gain


def test_a_product_by_hand() -> None:
    """One layer on one device, nothing but large products: 6 FLOPs a weight and token over the rate they keep up."""
    found = recipe(model=dict(n_layers=1), train=dict(global_batch=16, micro_batch=16))
    rates = dataclasses.replace(H100.rates("bfloat16"), wave_elements=0.0)
    products = float(price(of_recipe(found), rates, values_of("hopper"))["products"])
    flops = 6 * found.model.block_matrices * 16 * 4096
    assert products == pytest.approx(flops / (794.5e12 * values_of("hopper")["products"]))


def test_messages_by_hand() -> None:
    """DDP on 16 ranks of two nodes, nothing hidden: 2·15/16 of 4 bytes a weight, over 8 cards of 50 GB/s; in smaller
    buckets, of a matrix at least, an empty all-reduce more for each of them."""

    def of(bucket_mib: int) -> Recipe:
        ddp = dict(overlap=False, bucket_mib=bucket_mib)
        return recipe(parallel=dict(dp_replicate=16), ddp=ddp, train=dict(global_batch=16))

    found = of(2**16)
    rates = dataclasses.replace(H100.rates("bfloat16"), across_seconds=0.0, inside_bytes_per_s=1e15)
    seconds = float(price(of_recipe(found), rates, values_of("hopper") | {"across": 1.0})["data_messages"])
    assert seconds == pytest.approx(2 * 15 / 16 * 4 * found.model.n_parameters / (8 * 50e9), rel=0.02)
    hops = 2 * 7 * LINK_HOP_SECONDS + 2 * rates.across_hop_seconds  # within a node, and of a tree of two
    for bucket_mib, n_buckets in ((1024, found.model.n_parameters * 4 / 2**30), (25, 7 * found.model.n_layers)):
        more = float(price(of_recipe(of(bucket_mib)), rates, values_of("hopper") | {"across": 1.0})["data_messages"])
        assert more - seconds == pytest.approx((n_buckets - 1) * hops, rel=0.02)
    assert parts(recipe())["data_messages"] == 0


def test_a_ring_goes_through_all_ranks_by_hand() -> None:
    """An all-gather of next to nothing: of 16 ranks of two nodes each passes on 15 times, and waits for the slowest."""
    link = Links(H100.rates("bfloat16"), values_of("hopper"))
    assert float(link.gather(0.0, ranks=16, stride=1)) == pytest.approx(60e-6 + 15 * 4e-6)
    assert float(link.gather(0.0, ranks=8, stride=1)) == pytest.approx(41e-6 + 7 * 2e-6)


def test_a_part_of_what_goes_to_the_next_stage_is_sent_by_each_rank_by_hand() -> None:
    """8 ranks of tp in a node: each sends an eighth over its card, and then all gather the rest within the node."""
    work = dataclasses.replace(SMALL, pp=2, tp=8, sequence_parallel=0)
    rates, constants = H100.rates("bfloat16"), values_of("hopper")
    stream, sent = 2 * TOKENS * 1024, rates.send_seconds
    across, inside = 50e9 * constants["across"], 444e9 * constants["inside"]
    whole = float(hop_seconds(work, rates, Links(rates, constants)))
    assert whole == pytest.approx(sent + stream / across)
    split = float(hop_seconds(work, dataclasses.replace(rates, pipeline_split=1), Links(rates, constants)))
    assert split == pytest.approx(sent + stream / 8 / across + stream * 7 / 8 / inside + 41e-6 + 7 * 2e-6)


@pytest.mark.parametrize(
    "layout",
    [
        dict(parallel=dict(dp_replicate=8)),
        dict(parallel=dict(dp_shard=8), recompute=dict(mode="full")),
        dict(parallel=dict(dp_shard=8), sharding=dict(reshard_after_forward=False)),
        dict(parallel=dict(dp_replicate=2, dp_shard=4)),
        dict(parallel=dict(tp=8)),
        dict(parallel=dict(tp=8), tensor=dict(sequence_parallel=False)),
        dict(parallel=dict(cp=4)),
        dict(parallel=dict(cp=4), context=dict(method="all-gather")),
        dict(parallel=dict(cp=4), context=dict(method="ulysses"), recompute=dict(mode="full")),
        dict(parallel=dict(pp=2, dp_shard=4), sharding=dict(reshard_after_forward=False)),
    ],
)
def test_messages_have_the_bytes_that_a_dry_run_counts(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Priced by links of a byte a second, where nothing else takes time or hides anything, seconds are bytes."""
    monkeypatch.setattr("parallel.foresight.price.LINK_HOP_SECONDS", 0.0)
    rates = dataclasses.replace(
        H100.rates("bfloat16"),
        **dict.fromkeys(("matmul_flops", "memory_bytes_per_s"), 1e30),
        **dict.fromkeys(("inside_bytes_per_s", "across_bytes_per_s"), 1.0),
        **dict.fromkeys(("inside_seconds", "across_seconds", "across_hop_seconds"), 0.0),
        **dict.fromkeys(("data_hidden", "launch_seconds"), 0.0),
        node_ranks=8,
    )
    found = recipe(model=dict(n_layers=2, vocab_size=1024), train=dict(global_batch=16), **layout)
    constants = values_of("hopper") | dict(inside=1.0, tensor_messages=1.0)
    priced = price(of_recipe(found), rates, constants)
    counted = sum(row["bytes_per_rank"] for row in dry_run_rank(found, rank=0).traffic if row["mesh_dim"] != "pp")
    expected = sum(float(priced[name]) for name in ("tensor_messages", "context_messages", "data_messages"))
    assert expected == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_that_of_the_schedule(schedule: Schedule) -> None:
    """tests/test_timeline.py simulates the same fractions from torch's own orders."""
    ideal = {"gpipe": 3 / 11, "1f1b": 3 / 11, "interleaved-1f1b": 3 / 19, "looped-bfs": 3 / 19}.get(schedule, 1 / 17)
    found = recipe(
        parallel=dict(pp=4), pipeline=dict(schedule=schedule), train=dict(global_batch=8), model=dict(vocab_size=256)
    )
    of = parts(found)
    running = sum(of.values()) - of["optimizer"] - of["pipeline_messages"]
    assert of["bubble"] / running == pytest.approx(ideal, rel=0.05)


@pytest.mark.parametrize(
    ("schedule", "v", "m", "simulated"),
    [
        ("interleaved-1f1b", 2, 1, 0.750),
        ("interleaved-1f1b", 4, 3, 0.333),
        ("looped-bfs", 2, 2, 0.556),
        ("zbv", 2, 1, 0.667),
        ("zbv", 2, 4, 0.200),
        ("dualpipev", 2, 8, 0.059),
    ],
)
def test_the_bubble_of_few_microbatches(schedule: str, v: int, m: int, simulated: float) -> None:
    """On 4 ranks, as measure.timeline.ideal_bubble finds it in torch's orders."""
    idle = 3 * bubble(schedule, pp=4, stages_per_rank=v, m=m)
    assert idle / (m + idle) == pytest.approx(simulated, abs=0.001)


def test_hardware_flops_are_those_that_a_dry_run_counts() -> None:
    for layout in ({}, dict(recompute=dict(mode="full")), dict(recompute=dict(mode="selective", save=["attention"]))):
        found = recipe(model=dict(n_layers=2, vocab_size=512), train=dict(seq_len=512, global_batch=2), **layout)
        counted = dry_run_rank(found, rank=0).flops
        assert hardware_flops_per_token(of_recipe(found)) * 1024 == pytest.approx(counted, rel=1e-6)


def test_ranks_of_a_cpu_share_its_cores() -> None:
    cpu = load_cluster("cpu")
    tiny = load_recipe(ROOT / "recipes/tiny.toml")
    one = predict(tiny, cpu).step_seconds
    four = dataclasses.replace(tiny, parallel=dataclasses.replace(tiny.parallel, dp_replicate=4))
    assert one / 2 < predict(four, cpu).step_seconds < one


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        dict(train=dict(global_batch=4, micro_batch=4)),
        dict(train=dict(global_batch=4, micro_batch=4), recompute=dict(mode="selective"), parallel=dict(tp=4)),
        dict(parallel=dict(dp_shard=8), train=dict(global_batch=32), recompute=dict(mode="full")),
        dict(parallel=dict(dp_replicate=2, tp=4), train=dict(global_batch=4)),
        dict(parallel=dict(cp=4), train=dict(global_batch=2, seq_len=16384)),
        dict(parallel=dict(pp=4, dp_shard=2), train=dict(global_batch=16), sharding=dict(reshard_after_forward=False)),
        dict(parallel=dict(pp=2), train=dict(global_batch=4), pipeline=dict(schedule="zbv")),
    ],
)
@pytest.mark.parametrize(("cluster", "keeping"), [("h100", LAB), ("cpu", ON_CPU)])
def test_memory_is_near_a_dry_run(layout: dict[str, dict[str, Any]], cluster: str, keeping: Keeping) -> None:
    found = load_cluster(cluster).would_run(recipe(model=dict(n_layers=4), **layout))
    counted = max(dry_run_rank(found, rank=rank).memory["peak_bytes"] for rank in (0, found.world_size - 1))
    assert float(peak_bytes(of_recipe(found), keeping)) == pytest.approx(counted, rel=0.06)


ZERO_1 = Keeping(
    weight=2, gradient=4, optimizer=12, shards_weights=False, holds_gradients=True, residual=10, in_float32=0,
    gathers_again=True, score=5, logit=6, earlier_logit=4, base_gib=1,
)  # fmt: skip
BLOCK, MATRIX, TOKENS = 4 * 1024**2 + 3 * 1024 * 4096, 32000 * 1024, 2048  # of SMALL
KEPT = TOKENS * 2 * (10 * 1024 + 2 * 1024 + 4 * 4096)  # residual, keys and values, the gate's four
SMALL = Workload(
    n_layers=4, d_model=1024, n_heads=8, n_kv_heads=8, head_dim=128, d_ff=4096, vocab_size=32000, seq_len=TOKENS,
    micro_batch=1, n_microbatches=8, dp_shard=4, shards_state=1, reduce_scatters=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "keeping", "expected"),
    [
        # 16-bit weights and float32 gradients whole, 12 bytes of a parameter over 4 ranks; logits of two microbatches
        ({}, {}, (2 + 4 + 12 / 4) * (4 * BLOCK + 2 * MATRIX) + 4 * KEPT + 10 * TOKENS * 32000),
        ({"n_microbatches": 1}, {}, 9 * (4 * BLOCK + 2 * MATRIX) + 4 * KEPT + 6 * TOKENS * 32000),
        # over tp a quarter of all; and, kept, the inputs of two products whole, and not a quarter of them
        ({"tp": 4}, {}, (9 * (4 * BLOCK + 2 * MATRIX) + 4 * KEPT + 10 * TOKENS * 32000) / 4),
        (
            {"tp": 4},
            {"gathers_again": False},
            (9 * (4 * BLOCK + 2 * MATRIX) + 4 * KEPT + 10 * TOKENS * 32000) / 4 + 4 * TOKENS * 4 * 1024 * 3 / 4,
        ),
        # the first of two stages keeps two microbatches, the last one and its logits
        ({"pp": 2, "in_flight": 2, "vocab_size": 1024}, {}, 9 * (2 * BLOCK + 1024**2) + 2 * 2 * KEPT),
        ({"pp": 2, "in_flight": 2}, {}, 9 * (2 * BLOCK + MATRIX) + 2 * KEPT + 10 * TOKENS * 32000),
        # an output of 1.95 layers: three layers on the first stage, one on the last
        (
            {"pp": 2, "in_flight": 8, "even_stages": 0},
            {},
            9 * (3 * BLOCK + MATRIX) + 8 * 3 * KEPT,
        ),
        # scores in full, 5 bytes each; two matrices without a gate
        (
            {"flash": 0, "n_mlp_matrices": 2, "vocab_size": 1},
            {},
            9 * (4 * (BLOCK - 1024 * 4096) + 2 * 1024)
            + 4 * (KEPT - TOKENS * 4 * 4096 + 5 * 8 * TOKENS**2)
            + 10 * TOKENS,
        ),
    ],
)
def test_memory_of_another_program_by_hand(changes: dict[str, float], keeping: dict[str, Any], expected: float) -> None:
    work, keeps = dataclasses.replace(SMALL, **changes), dataclasses.replace(ZERO_1, **keeping)
    assert float(peak_bytes(work, keeps)) == pytest.approx(expected + 2**30, rel=1e-9)


# ---- trust ---------------------------------------------------------------------------------------------------------


def test_what_was_measured_corrects_what_was_not_and_narrows_it() -> None:
    sensitive, doubts = np.array([[0.1, 0.0], [0.1, 0.0], [0.0, 0.3]]), [{}, {}, {"recompute": 0.1}]
    common = covariance(sensitive, doubts)
    assert np.sqrt(common[0, 0]) == pytest.approx(math.hypot(PROGRAM_DEVIATION, 0.1))
    before = corrected(common, {})
    assert np.all(before[0] == 0) and before[1][2] == pytest.approx(math.sqrt(common[2, 2] + RUN_DEVIATION**2))
    mean, deviation = corrected(common, {0: 0.2})
    assert 0 < mean[2] < mean[1] == pytest.approx(mean[0])  # the likest is corrected most
    assert mean[0] < 0.2 and deviation[1] < before[1][1]
    odd, wide = corrected(common, {0: 5.0})
    assert odd[1] < 0.2 and wide[1] > 0.5  # one run that is off by a factor of 150


def test_runs_that_contradict_each_other_say_little_of_others() -> None:
    common = covariance(np.zeros((4, 1)), [{}] * 4)
    agreed, narrow = corrected(common, {0: 0.2, 1: 0.19, 2: 0.21})
    mixed, wide = corrected(common, {0: 0.7, 1: -0.3, 2: 0.2})
    assert agreed[3] == pytest.approx(0.18, abs=0.01) and narrow[3] < 0.08
    assert 0 < mixed[3] < 0.08 and wide[3] > 0.3  # their mean is 0.2, too


def test_another_program_is_corrected_half_as_much() -> None:
    mean, deviation = corrected(covariance(np.zeros((3, 1)), [{}] * 3, ["eager", "eager", "fused"]), {0: 0.2})
    assert mean[2] == pytest.approx(mean[1] / 2) and deviation[1] < deviation[2]


def published(tmp_path: Path, *rows: dict[str, str], options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "runs.csv"
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    command = [sys.executable, str(ROOT / "benchmarks" / "published.py"), str(file), *options]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)


# Llama 3 team 2024 (arXiv:2407.21783), table 4; Narayanan et al. 2021 (arXiv:2104.04473), table 1.
LLAMA = dict(
    source="Llama 3", hardware="H100-80GB-SXM", gpus_per_node="8", interconnect="RoCE 400 Gb/s per GPU", n_layers="126",
    d_model="16384", n_heads="128", n_kv_heads="8", d_ff="53248", mlp_kind="swiglu", vocab="128256", seq_len="8192",
    attention="causal flash", precision="bf16", tp="8", sp="yes", pp="16", vpp="8", pp_schedule="interleaved-1f1b",
    dp_kind="zero1", cp="1", micro_batch="1", recompute="none", compile="no", global_batch="2048",
    tflops_definition="model flops causal halved",
)  # fmt: skip
NARAYANAN = dict(
    source="Megatron", hardware="A100-80GB-SXM", gpus_per_node="8", interconnect="8x HDR IB 200 Gb/s per node",
    mlp_kind="gelu", vocab="51200", seq_len="2048", attention="standard", precision="fp16", tp="8", cp="1", sp="no",
    dp_kind="ddp", recompute="full", compile="no",
    tflops_definition="hardware flops incl. full recompute; causal NOT halved",
)  # fmt: skip


def test_published_runs_are_foretold_from_their_configurations(tmp_path: Path) -> None:
    """Within a fifth, and within their intervals; to those of Llama 3 nothing was fitted."""
    runs = [
        LLAMA | dict(id="8192", n_gpus="8192", measured_tflops_per_gpu="430"),
        LLAMA | dict(id="16384", n_gpus="16384", measured_tflops_per_gpu="400"),
        NARAYANAN
        | dict(id="18B", n_gpus="256", n_layers="40", d_model="6144", n_heads="48", d_ff="24576", pp="1")
        | dict(micro_batch="8", global_batch="1024", measured_tflops_per_gpu="135"),
        NARAYANAN
        | dict(id="39B", n_gpus="512", n_layers="48", d_model="8192", n_heads="64", d_ff="32768", pp="2")
        | dict(micro_batch="4", global_batch="1536", pp_schedule="1f1b", measured_tflops_per_gpu="138"),
    ]
    out = tmp_path / "predictions.csv"
    done = published(tmp_path, *runs, options=("--predictions", str(out)))
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in out.read_text().splitlines()[1:]]
    for row in rows:
        predicted, low, high, measured = map(float, row[2:6])
        assert predicted == pytest.approx(measured, rel=0.2), row
        assert low < measured < high, row
    assert "mean of sources" in done.stdout


def test_unnamed_a_row_says_nothing_of_its_program(tmp_path: Path) -> None:
    rows = [
        LLAMA | dict(n_gpus="8192", source=source, notes=notes) for source, notes in (("x", ""), ("nanotron", "of x"))
    ]
    out, seconds = tmp_path / "predictions.csv", []
    for options in ((), ("--unnamed",)):
        done = published(tmp_path, *rows, options=("--predictions", str(out), *options))
        assert done.returncode == 0, done.stderr
        with out.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        seconds.append([float(line["predicted_step_s"]) for line in lines])
    assert [line["source"] for line in lines] == ["1", "2"]
    (of_any, of_nanotron), unnamed = seconds
    assert of_nanotron > 1.05 * of_any and unnamed == [of_any] * 2


def test_what_a_row_leaves_open_widens_it_and_what_it_must_say_is_asked_for(tmp_path: Path) -> None:
    open_rows = [
        LLAMA | dict(id="whole", n_gpus="8192"),
        LLAMA | dict(id="less", n_gpus="8192", recompute="", attention="unknown", micro_batch="", vpp="3 (one)"),
        {"source": "?", "id": "least", "hardware": "h100", "n_layers": "32", "d_model": "4096", "seq_len": "4096",
         "n_gpus": "64", "vocab": "-5", "tp": "nan", "n_heads": "x"},
    ]  # fmt: skip
    refused = [
        {"source": "tpu", "hardware": "TPU-v9", "n_layers": "1"},
        {"source": "short", "hardware": "H100", "n_layers": "32", "d_model": "4096", "n_gpus": "8"},
        {"source": "moe", "hardware": "H100", "moe": "8 experts"},
        LLAMA | dict(source="few", n_gpus="8"),
    ]
    out = tmp_path / "predictions.csv"
    done = published(tmp_path, *open_rows, *refused, options=("--predictions", str(out)))
    assert done.returncode == 0, done.stderr
    widths = {}
    for line in out.read_text().splitlines()[1:]:
        cells = line.split(",")
        widths[cells[0]] = float(cells[4]) / float(cells[3])
    assert widths["whole"] < widths["less"] < widths["least"]
    for reason in ("nothing is known of hardware 'TPU-v9'", "seq_len is not given", "experts", "fewer than tp 8"):
        assert reason in done.stdout
    assert "no row has a measurement" in done.stdout


def test_a_program_is_known_by_what_a_row_says_of_it(tmp_path: Path) -> None:
    zero_3 = NARAYANAN | dict(
        n_layers="96", d_model="12288", n_heads="96", d_ff="49152", n_gpus="768", tp="1", pp="1", dp_kind="zero3",
        micro_batch="2", global_batch="1536",
    )  # fmt: skip
    small = LLAMA | dict(n_gpus="128", pp="2", vpp="1", n_layers="16", d_model="2048", n_heads="32", global_batch="64")
    rows = [
        zero_3 | dict(id="zero"),
        zero_3 | dict(id="deepspeed", notes="DeepSpeed ZeRO-3"),  # gathers again what it computes again
        small | dict(id="one"),
        small | dict(id="nanotron", source="a sweep of nanotron"),  # hosts are late
        LLAMA | dict(id="said", n_gpus="8192"),
        LLAMA | dict(id="taken", n_gpus="8192", public_cfg_fields="recompute (of its script)"),
    ]
    out = tmp_path / "predictions.csv"
    published(tmp_path, *rows, options=("--predictions", str(out)))
    found = {cells[0]: cells for cells in (line.split(",") for line in out.read_text().splitlines()[1:])}
    seconds = {name: float(cells[2]) for name, cells in found.items()}
    width = {name: float(cells[4]) / float(cells[3]) for name, cells in found.items()}
    assert seconds["deepspeed"] > 1.1 * seconds["zero"]
    assert seconds["nanotron"] > 3 * seconds["one"]
    assert seconds["taken"] == seconds["said"] and width["taken"] > width["said"]


def test_one_configuration_in_other_words(tmp_path: Path) -> None:
    usual = LLAMA | dict(id="a", n_gpus="8192", recompute="full")
    words = dict(
        hardware="NVIDIA H100 SXM5", interconnect="8x ConnectX-7 NDR 400 Gbps", mlp_kind="SiLU, gated", vpp="8 chunks",
        pp_schedule="Interleaved 1F1B", dp_kind="ZeRO-1", recompute="True", precision="BF16", moe="", tp="8.0",
    )  # fmt: skip
    out = tmp_path / "predictions.csv"
    done = published(tmp_path, usual, usual | words | dict(id="b"), options=("--predictions", str(out)))
    first, second = (line.split(",")[2:5] for line in out.read_text().splitlines()[1:])
    assert first == second, done.stdout


def test_memory_of_published_runs_is_foretold_from_their_configurations(tmp_path: Path) -> None:
    """39 billion parameters on 512 A100s of 80 GB, as they were trained; ten times the sequences at once do not fit."""
    fits = NARAYANAN | dict(
        id="39B", n_gpus="512", n_layers="48", d_model="8192", n_heads="64", d_ff="32768", pp="2", micro_batch="4",
        global_batch="1536", pp_schedule="1f1b", measured_tflops_per_gpu="138", measured_mem_gib="60",  # made up
    )  # fmt: skip
    failed = tmp_path / "failed"
    failed.mkdir()
    published(failed, *(fits | dict(micro_batch=n, global_batch="15360") for n in ("4", "40")))
    out = published(tmp_path, fits, options=("--failed", str(failed / "runs.csv"))).stdout
    (row,) = (line.split()[1:] for line in out.split("predicted memory")[1].splitlines() if line.startswith("Megatron"))
    assert row[0] == "1" and row[1] == row[5] and row[4] == row[7] == "0"  # no tokens are split: one way to keep them
    assert "failed: 1 are too large, inputs gathered again" in out and "failed: 0 need less than half" in out


def test_the_regret_of_a_choice_is_counted_among_rows_that_differ_in_their_layout_alone(tmp_path: Path) -> None:
    """Of three layouts foresight takes the one with the least bubble, which here was measured a tenth too slow."""
    layout = LLAMA | dict(n_gpus="8192", measured_tflops_per_gpu="")
    rows = [
        layout | dict(id="a", vpp="8", measured_step_s="33"),
        layout | dict(id="b", vpp="1", pp_schedule="1f1b", measured_step_s="30"),
        layout | dict(id="c", vpp="1", pp_schedule="1f1b", micro_batch="4", measured_step_s="36"),
        layout | dict(id="another program", compile="yes", measured_step_s="20"),
        layout | dict(id="another batch", global_batch="4096", measured_step_s="20"),
    ]
    out = published(tmp_path, *rows).stdout.split("layout alone")[1]
    (row,) = (line.split()[2:] for line in out.splitlines() if line.startswith("Llama 3"))
    assert row == ["1", "10.0", "10.0", "10.0"]  # one sweep; any of the three takes 33 s in the mean


def test_three_runs_of_a_source_correct_the_others(tmp_path: Path) -> None:
    """A program that takes 1.3 times as long as foretold, at seven scales."""
    scales = [str(128 * n) for n in (1, 2, 4, 8, 16, 32, 64)]
    rows = [LLAMA | dict(id=n, n_gpus=n, global_batch=str(int(n) // 4)) for n in scales]
    out = tmp_path / "predictions.csv"
    published(tmp_path, *rows, options=("--predictions", str(out)))
    predicted = [line.split(",")[2] for line in out.read_text().splitlines()[1:]]
    slower = [row | dict(measured_step_s=str(1.3 * float(s))) for row, s in zip(rows, predicted, strict=True)]

    def error(*options: str) -> float:
        last = published(tmp_path, *slower, options=options).stdout.split("mean of sources")[1].split()
        return float(last[1])

    assert error() == pytest.approx(100 * (1 - 1 / 1.3), rel=0.01)
    assert error("--calibrate-on", "3") < 5


def test_a_pipeline_with_a_stage_that_has_no_block_is_refused(tmp_path: Path) -> None:
    """16 layers and an output of four layers' size, by hand: 16 stages take two layers each now and then, the output
    is the thirteenth's, the cast and the loss have one each, and the sixteenth has nothing. Of eight each has some.
    """
    row = NARAYANAN | dict(
        source="nanotron", n_layers="16", d_model="2048", n_heads="32", d_ff="8192", mlp_kind="swiglu", vocab="131072",
        tp="1", micro_batch="1", global_batch="64", pp_schedule="1f1b", measured_step_s="1",
    )  # fmt: skip
    for source, stages, refused in (("nanotron", 8, 0), ("nanotron", 16, 1), ("other", 16, 0), ("other", 32, 1)):
        one = row | dict(source=source, pp=str(stages), n_gpus=str(stages))
        out = published(tmp_path, one, options=("--failed", str(tmp_path / "runs.csv"))).stdout
        assert f"{refused} others have a stage of the pipeline with no block" in out, (source, stages)


def test_failed_runs_of_a_sweep_may_say_their_layouts_alone(tmp_path: Path) -> None:
    """Model and machine are those of the runs that have the size, of the source that has more of them."""
    ran = LLAMA | dict(source="sweep", n_params_b="405.853", n_gpus="8192", measured_mem_gib="50", sp="")
    other = ran | dict(source="other", n_layers="1")
    layout = dict(tp="8", pp="4", micro_batch="1", vpp="", pp_schedule="1f1b")  # which does not fit
    whole = ran | layout | dict(n_gpus="64", dp_kind="zero1", global_batch="32", measured_mem_gib="")
    sweep = dict(model_label_b="405.85", nodes="8", dp="2", tp="8", pp="4", micro_batch="1", grad_accum="16", zero="1")
    found = []
    for kind, rows in (("whole", [whole]), ("sweep", [sweep, sweep | dict(model_label_b="8")])):
        (tmp_path / kind).mkdir()
        published(tmp_path / kind, *rows)
        out = published(tmp_path, other, ran, ran, options=("--failed", str(tmp_path / kind / "runs.csv"))).stdout
        found.append([line for line in out.splitlines() if line.startswith("failed: ")])
    assert found[0] == found[1] and "failed: 1 are too large, inputs kept" in found[0]
    assert "refused: 1 of no source: nothing is known of hardware ''" in out


def test_what_a_row_says_of_its_messages_and_8_bits_counts(tmp_path: Path) -> None:
    ours = LLAMA | dict(source="torchtitan", n_gpus="8192", precision="fp8", compile="yes", dp_kind="fsdp", pp="1")
    of = {
        "16 bits": ours | dict(precision="bf16"),
        "8 bits": ours,
        "by rows": ours | dict(notes="fp8-rowwise"),
        "async": ours | dict(notes="AsyncTP"),
        "hidden": LLAMA | dict(source="Megatron", compile="no (TransformerEngine)", n_gpus="8192"),
        "open": LLAMA
        | dict(source="Megatron", compile="no (TransformerEngine)", n_gpus="8192", notes="ALL overlap disabled"),
    }
    out = tmp_path / "predictions.csv"
    done = published(tmp_path, *(row | dict(id=name) for name, row in of.items()), options=("--predictions", str(out)))
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in out.read_text().splitlines()[1:]]
    seconds = {row[0]: float(row[2]) for row in rows}
    assert seconds["8 bits"] < seconds["by rows"] < seconds["16 bits"]
    assert seconds["async"] < seconds["8 bits"] and seconds["hidden"] < seconds["open"]


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "published.py")]
    for arguments, said in (([str(tmp_path / "no.csv")], "cannot be read"), ([__file__], "no column called hardware")):
        done = subprocess.run(
            [*command, *arguments], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
