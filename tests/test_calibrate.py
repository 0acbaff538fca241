"""Rates from micro-benchmarks and from runs: what was put in comes out, and an odd run moves little."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results import complete_record

from launch.cli import main
from launch.compare import foretell, lay_beside, load_comparison
from launch.starting import Starter
from launch.supervisor import run_program
from launch.table import foretold_of, row, table
from parallel.foresight.calibration import Run, calibrated_on, cluster_of, held_against, predicted_seconds
from parallel.foresight.clusters import Cluster, cluster_toml, load_cluster
from parallel.foresight.constants import values_of
from parallel.foresight.prediction import cpu_seconds_of, predict
from parallel.foresight.price import TILE, price
from parallel.foresight.uncertainty import learnt
from parallel.foresight.workload import of_recipe
from parallel.measure import microbenchmarks
from parallel.measure.record import read_record, write_record
from parallel.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[1]
CPU = load_cluster("cpu")
ROWS = ("ddp", "fsdp", "hsdp", "tp", "tp-sp", "pp-1f1b", "pp-zbv", "cp-ring", "cp-ulysses", "fsdp-recompute")
RECIPES = {name: load_recipe(ROOT / f"recipes/strategies/{name}.toml") for name in ROWS}

# A device whose every rate is known: FLOP/s, tiles at a time, bytes/s, seconds.
BEST, UNITS, STREAMS, LAUNCH = 800e12, 132, 2.4e12, 5e-6
GAIN, HALF = 1.5, 700.0


def synthetic() -> dict[str, Any]:
    """What micro-benchmarks of an H100 would find, were it as the closed form says, on four ranks."""
    k = values_of("hopper")

    def product(m: int, n: int, inner: int) -> tuple[float, ...]:
        return m, n, inner, 2 * m * n * inner / BEST * (1 + math.sqrt(UNITS * TILE * 2.0 * k["wave"] / (m * n)))

    def attention(b: int, h: int, t: int, e: int) -> list[float]:
        forward = 2 * b * h * t * t * e / (BEST * GAIN * k["attention"] * t / (t + HALF) * min(1, e / 128) ** 0.15)
        return [b, h, t, e, forward, 2.5 / 0.8 * forward]

    def message(start: float, per_byte: float) -> list[tuple[int, float]]:
        return [(n, start + per_byte * n) for n in (2**8, 2**20, 2**28)]

    sizes = (512, 1024, 4096, 16384, 65536)
    d, ff, tokens = 4096, 14336, 8192
    passed = tokens * (70 * d + 28 * ff + 88 * (32 + 8) * 128)  # the lab's own operators, in bfloat16
    return {
        "device": "NVIDIA H100 80GB HBM3",
        "gpus": 4,
        "ranks": 4,
        "cores": 64,
        "torch": "2.13.0",
        "element_bytes": 2,
        "float32_matmul": "highest",
        "memory_bytes": 80 * 2**30,
        "multiprocessors": UNITS,
        "capability": [9, 0],
        "products": {name: [product(m, 65536, 8192) for m in sizes] for name in ("float32", "bfloat16")},
        "attention": [attention(1, 32, t, e) for t in (1024, 4096, 32768) for e in (64, 128)],
        "copy": [2**31, 2**31 / STREAMS],
        "between": {"tokens": tokens, "d_model": d, "d_ff": ff, "n_heads": 32, "n_kv_heads": 8}
        | {"seconds": [share * 0.9 * k["operators"] * passed / STREAMS for share in (0.3, 0.7)]},
        "loss": {"logits": 2**30, "seconds": 2**30 * 40 / STREAMS},
        "launches": [operators * LAUNCH * k["launch"] for operators in (53, 98)],
        "collectives": {
            "all_reduce": message(30e-6, 1.5 / 400e9),
            "all_gather": message(15e-6, 0.75 / 200e9),
            "reduce_scatter": message(45e-6, 0.75 / 100e9),
            "all_to_all": message(60e-6, 0.75 / 400e9),
            "send": message(10e-6, 1 / 100e9),
        },
    }


# ---- micro-benchmarks ----------------------------------------------------------------------------------------------


def test_known_rates_come_out_of_what_was_measured() -> None:
    found = synthetic()
    cluster = cluster_of(found, name="mine", when="today")
    device, software, links, others = cluster.device, cluster.software, cluster.links, cluster.collectives
    assert device.generation == "hopper" and device.origin == links.origin == "measured"
    assert device.matmul_tflops == pytest.approx(800, rel=0.05)  # the largest product is not quite there
    assert device.memory_gb_per_s * 0.8e9 == pytest.approx(STREAMS)
    assert cluster.constants["wave"] == pytest.approx(2.0)
    assert software.attention_gain * device.matmul_tflops == pytest.approx(GAIN * 800, rel=1e-6)
    assert software.attention_tokens == pytest.approx(HALF)
    assert software.operator_share == pytest.approx(0.9)
    assert software.logit_bytes == pytest.approx(40)
    assert software.launch_us == pytest.approx(5)
    assert links.inside_us == pytest.approx(30) and links.inside_ranks == 0
    assert links.inside_gb_per_s * values_of("hopper")["inside"] == pytest.approx(400)
    assert (others.gather_bytes, others.gather_start) == (pytest.approx(2), pytest.approx(0.5))
    assert (others.scatter_bytes, others.scatter_start) == (pytest.approx(4), pytest.approx(1.5))
    assert (others.exchange_bytes, others.exchange_start) == (pytest.approx(1), pytest.approx(2))
    assert (others.send_bytes, others.send_us) == (pytest.approx(4), pytest.approx(10))
    assert "between nodes: assumed" in links.source


def test_the_file_is_read_back_and_foretells_the_same(tmp_path: Path) -> None:
    cluster = cluster_of(synthetic(), name="mine", when="today")
    (tmp_path / "mine.toml").write_text(cluster_toml(cluster, head="By hand."))
    again = load_cluster(str(tmp_path / "mine.toml"))
    recipe = load_recipe(ROOT / "recipes/large/llama3-8b-hsdp.toml")
    assert again.name == "mine" and again.device.source == cluster.device.source
    assert predict(recipe, again).step_seconds == pytest.approx(predict(recipe, cluster).step_seconds, rel=1e-4)


def test_one_rank_has_no_links_and_says_so() -> None:
    cluster = cluster_of(synthetic() | {"collectives": None, "ranks": 1}, name="mine", when="today")
    assert cluster.links.origin == "assumed" and "no link was measured" in cluster.links.source


@pytest.mark.parametrize(
    ("constants", "said"), [({"wafe": 1.0}, "did you mean wave?"), ({"wave": 0}, "as 1.1"), (3, "section")]
)
def test_wrong_factors_are_refused(constants: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = cluster_toml(dataclasses.replace(CPU, constants={}), head="By hand.")
    lines = "\n".join(f"{key} = {value}" for key, value in constants.items()) if isinstance(constants, dict) else ""
    file.write_text(text + lines if lines else f"constants = 3\n{text.partition('[constants]')[0]}")
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        load_cluster(str(file))


def test_a_clock_of_a_cpu_counts_the_seconds_of_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each call takes 2 ms of them, and 5 ms pass."""
    cpu, wall = 0.0, 0.0

    def call() -> None:
        nonlocal cpu, wall
        cpu, wall = cpu + 2e-3, wall + 5e-3

    monkeypatch.setattr(microbenchmarks.time, "process_time", lambda: cpu)
    monkeypatch.setattr(microbenchmarks.time, "perf_counter", lambda: wall)
    clock = microbenchmarks.Clock(torch.device("cpu"), seconds=1.0)
    assert clock.calls_within(call) == 40  # in a fifth of a second
    assert clock.median(call) == pytest.approx(2e-3)


def test_this_machine_is_measured_by_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.toml"
    assert main(["calibrate", "--ranks", "2", "--seconds", "2", "--out", str(file), "--name", "desk"]) == 0
    out = capsys.readouterr().out
    assert "messages among 2 ranks" in out and "products in float32" in out
    cluster = load_cluster(str(file))
    assert cluster.name == "desk" and cluster.accelerator == "cpu" and cluster.links.inside_ranks == 2
    assert cluster.device.origin == cluster.links.origin == "measured"
    assert 1e9 < (cluster.matmul_flops("float32") or 0) < 1e13
    single = predict(load_recipe(ROOT / "recipes/tiny.toml"), cluster)
    assert single.cpu_seconds_per_step == pytest.approx(single.step_seconds)
    assert 0.02 < single.step_seconds < 20


def test_ranks_that_fail_are_told_of_and_leave_nothing(tmp_path: Path) -> None:
    with Starter() as starter:
        failure = run_program(
            "launch.calibration",
            ["--write", str(tmp_path / "measured.json"), "--seconds", "1", "--nonsense"],
            n_ranks=2,
            folder=tmp_path,
            limit_seconds=60,
            starter=starter,
            echo=lambda line: None,
        )
    assert failure is not None and failure[0] == "failed"
    assert "ended with exit code 2" in failure[1] and "--nonsense" in failure[1]


# ---- runs ----------------------------------------------------------------------------------------------------------


def as_if_on(cluster: Cluster) -> list[Run]:
    return [
        Run(name=name, recipe=recipe, seconds=predicted_seconds(recipe, cluster)) for name, recipe in RECIPES.items()
    ]


FACTORS = {"products": 1.15, "attention": 0.85, "launch": 1.4, "inside": 0.8, "tensor_messages": 1.5, "program": 1.1}


def test_factors_that_runs_were_made_with_are_found_again() -> None:
    runs = as_if_on(dataclasses.replace(CPU, constants=FACTORS))
    found = held_against(runs, CPU)
    before, after, without = (
        np.array([getattr(held, when) / held.run.seconds - 1 for held in found.runs])
        for when in ("before", "after", "without")
    )
    assert np.abs(before).mean() > 0.08
    assert np.abs(after).max() < 0.05 and np.abs(after).mean() < 0.025
    assert np.abs(without).mean() < 0.04  # none of them needed to see itself
    assert found.cluster.constants["launch"] > 1.1 > found.cluster.constants["attention"]


def test_factors_that_a_file_has_are_where_the_next_begin() -> None:
    true = dataclasses.replace(CPU, constants=FACTORS)
    again = calibrated_on(as_if_on(true), true)
    assert all(again.constants[name] == pytest.approx(FACTORS.get(name, 1.0)) for name in again.constants)


def test_one_odd_run_does_no_harm() -> None:
    runs = as_if_on(dataclasses.replace(CPU, constants=FACTORS))
    odd = [dataclasses.replace(run, seconds=5 * run.seconds) if run.name == "tp" else run for run in runs]
    good, bent = calibrated_on(runs, CPU), calibrated_on(odd, CPU)
    for run in runs:
        moved = predicted_seconds(run.recipe, bent) / predicted_seconds(run.recipe, good) - 1
        assert abs(moved) < (0.15 if run.name == "tp" else 0.05), run.name


def test_one_run_of_three_that_is_odd_is_outvoted() -> None:
    sensitive = np.full((3, 1), 0.2)
    usual, odd = learnt(sensitive, np.array([0.1, 0.1, 0.1])), learnt(sensitive, np.array([0.1, 0.1, math.log(5)]))
    assert 0.08 < 0.2 * usual[0] < 0.1
    assert 0.2 * odd[0] < 0.15


def test_what_all_ranks_do_is_the_mean_over_how_many_they_are() -> None:
    """Without a pipeline every rank does the same; with one, they share layers and the output."""
    constants = values_of("other")
    rates = CPU.rates("float32")
    for name in ("ddp", "fsdp", "tp", "cp-ring"):
        work = of_recipe(RECIPES[name])
        busiest, mean = price(work, rates, constants), price(work, rates, constants, mean=True)
        assert {part: float(seconds) for part, seconds in mean.items()} == pytest.approx(
            {part: float(seconds) for part, seconds in busiest.items()}
        )
    alone = of_recipe(dataclasses.replace(RECIPES["pp-1f1b"], parallel=RECIPES["ddp"].parallel))
    piped = price(of_recipe(RECIPES["pp-1f1b"]), rates, constants, mean=True)
    products = price(alone, rates, constants, mean=True)["products"]
    assert piped["products"] == pytest.approx(products, rel=0.01)


def test_who_waits_takes_no_cpu_seconds() -> None:
    work = of_recipe(RECIPES["pp-1f1b"])
    idle = dataclasses.replace(work, bubble=100.0)
    assert cpu_seconds_of(idle, CPU, "float32") == pytest.approx(cpu_seconds_of(work, CPU, "float32"))


def measured_runs(folder: Path) -> None:
    for name, recipe in RECIPES.items():
        record = complete_record(name)
        record["recipe"] = recipe.resolved()
        record["throughput"]["cpu_seconds_per_step"] = 1.3 * predicted_seconds(recipe, CPU)
        write(folder / name, record)


def write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    write_record(folder / "record.json", record)


def test_runs_of_ones_own_make_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured_runs(tmp_path / "runs")
    elsewhere = complete_record("elsewhere")
    elsewhere["environment"]["device"] = "NVIDIA A100-SXM4-80GB"
    write(tmp_path / "runs" / "elsewhere", elsewhere)
    write(tmp_path / "runs" / "refused", complete_record("refused") | {"status": "refused", "reason": "no"})
    file = tmp_path / "new" / "mine.toml"
    arguments = ["calibrate", "--from", str(tmp_path / "runs"), "--cluster", "cpu"]
    assert main([*arguments, "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert "measured" in out and "without it" in out and "mean of |error|" in out
    assert out.count("left out: ") == 2 and "ran on another device than cpu" in out
    cluster = load_cluster(str(file))
    assert cluster.name == "cpu-by-runs" and cluster.constants["program"] > 1.05
    assert cluster.device == CPU.device
    assert main([*arguments, "--out", str(tmp_path / "b.toml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {run["name"] for run in found["runs"]} == set(RECIPES)
    for run in found["runs"]:
        assert run["before_seconds"] / run["measured_seconds"] == pytest.approx(1 / 1.3)
        assert run["after_seconds"] / run["measured_seconds"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "runs"], "--from and --cluster go together"),
        (["--cluster", "cpu"], "--from and --cluster go together"),
        (["--from", "nowhere", "--cluster", "cpu"], "nowhere is no folder"),
        (["--from", ".", "--cluster", "h100"], "no run that ended well on NVIDIA H100"),
        (["--ranks", "0"], "--ranks = 0: give how many processes"),
        (["--seconds", "nan"], "--seconds = nan: give seconds"),
        (["--name", "a/b"], "--name = 'a/b'"),
        (["--out", "there.toml"], "--out = 'there.toml': is there already"),
    ],
)
def test_a_wrong_line_starts_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.toml").touch()
    assert main(["calibrate", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# ---- beside what was measured --------------------------------------------------------------------------------------

COMPARISON = """
name = "two"
base = "base.toml"
[[variant]]
name = "single"
set = {}
[[variant]]
name = "fsdp"
set = { "parallel.dp_shard" = 4 }
[[variant]]
name = "other"
set = { "engine.name" = "accelerate" }
"""


def test_a_comparison_is_foretold_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\n[model]\npreset = "tiny"\n')
    (tmp_path / "two.toml").write_text(COMPARISON)
    comparison = load_comparison(tmp_path / "two.toml")
    foretold = foretell(comparison, CPU)
    assert set(foretold) == {"single", "fsdp"}  # the closed form knows no other engine
    records = []
    for name, factor in (("single", 1.0), ("fsdp", 2.0), ("other", 1.0)):
        records.append(complete_record(name))
        seconds = foretold.get(name, foretold["single"]).cpu_seconds_per_step
        records[-1]["throughput"]["cpu_seconds_per_step"] = factor * (seconds or 0)
    write(tmp_path / "out" / "fsdp", copy.deepcopy(records[1]))
    assert lay_beside(records, foretold, accelerator="cpu", folder=tmp_path / "out") == []
    assert read_record(tmp_path / "out" / "fsdp" / "record.json")["prediction"] == records[1]["prediction"]
    assert [row(record)["foretold_error"] for record in records] == [pytest.approx(0), pytest.approx(-0.5), None]
    text = table(records)
    assert "+0.0" in text and "-50.0" in text
    assert "off by 25.0 % in the mean of 2 rows, at most 50.0 %" in " ".join(text.split())
    assert "told s" not in table([complete_record("alone")])
    for record in records:
        record["environment"]["device"], record["prediction"] = "NVIDIA H200", None
    assert lay_beside(records, foretold, accelerator="cpu", folder=tmp_path / "out") == ["single", "fsdp"]
    assert records[0]["prediction"] is None
    with pytest.raises(RecipeError, match="has no rate"):
        foretell(load_comparison(tmp_path / "two.toml", ["train.dtype=float64"]), CPU)


def test_gpus_are_held_against_the_seconds_of_a_step() -> None:
    record = complete_record("fsdp", dp_shard=4)
    record["prediction"] = predict(
        load_recipe(ROOT / "recipes/large/llama3-8b-fsdp.toml"), load_cluster("h100")
    ).as_json()
    found = foretold_of(record)
    assert found["of_cpu"] is False and found["measured_seconds"] == record["throughput"]["step_seconds"]["median"]
    record["kind"] = "dry-run"  # its seconds are the foretold ones
    assert foretold_of(record)["foretold_seconds"] is None
