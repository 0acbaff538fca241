"""The search for layouts: everything it proposes can be run, and nothing faster that fits was overlooked."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from parallel.foresight.clusters import load_cluster
from parallel.foresight.memory import peak_bytes
from parallel.foresight.plan import RECOMPUTES, ROOM, plan, rule_of_thumb
from parallel.foresight.prediction import predict
from parallel.foresight.workload import of_recipe
from parallel.measure.record import read_record
from parallel.recipe import SCHEDULES, RecipeError, load_recipe, recipe_from_tables

ROOT = Path(__file__).parents[1]
LARGE = ROOT / "recipes" / "large"
H100 = load_cluster("h100")


def test_what_is_proposed_is_what_the_recipe_says_it_is() -> None:
    """Each choice is a valid recipe of so many ranks, priced as that recipe alone would be, and fits."""
    base = load_recipe(LARGE / "llama3-70b.toml")
    found = plan(base, H100, ranks=128)
    assert len(found.best) == 8 and found.considered > found.fitting > 1000
    for choice in found.best:
        again = recipe_from_tables(choice.recipe.resolved())  # what lab check does
        assert again.world_size == 128 and again.model == base.model
        assert again.train.global_batch == base.train.global_batch
        assert choice.prediction == predict(again, H100)
        assert choice.peak_bytes == peak_bytes(of_recipe(again)) <= ROOM * 80 * 2**30
    seconds = [choice.prediction.step_seconds for choice in found.best]
    assert seconds == sorted(seconds) and not found.best[0].tied
    assert len({choice.recipe.parallel for choice in found.best}) == 8
    for choice in found.too_large:
        assert choice.prediction.step_seconds < seconds[0]
        assert choice.peak_bytes > ROOM * 80 * 2**30 and choice.state_bytes < choice.peak_bytes


def test_nothing_faster_that_fits_is_overlooked() -> None:
    """Against every recipe of a small space, made one by one."""
    tables: dict[str, Any] = {
        "model": {"preset": "llama3-8b", "n_layers": 8},
        "data": {"source": "synthetic"},
        "train": {"seq_len": 8192, "global_batch": 8, "dtype": "bfloat16"},
    }
    found = plan(recipe_from_tables(tables), H100, ranks=4)
    best = float("inf")
    meshes = [
        mesh for mesh in itertools.product((1, 2, 4), repeat=5) if mesh[0] * mesh[1] * mesh[2] * mesh[3] * mesh[4] == 4
    ]
    n = 0
    for mesh, schedule, recompute, keeps, batch in itertools.product(
        meshes, SCHEDULES, RECOMPUTES, (False, True), (1, 4)
    ):
        one = tables | {
            "parallel": dict(zip(("pp", "dp_replicate", "dp_shard", "cp", "tp"), mesh, strict=True)),
            "train": tables["train"] | {"micro_batch": batch},
            "pipeline": {"schedule": schedule},
            "recompute": {"mode": recompute.mode, "save": list(recompute.save)},
            "sharding": {"reshard_after_forward": not keeps},
        }
        try:
            recipe = recipe_from_tables(one)
        except RecipeError:
            continue
        n += 1
        if peak_bytes(of_recipe(recipe)) <= ROOM * 80 * 2**30:
            best = min(best, predict(recipe, H100).step_seconds)
    assert n > 300
    assert found.best[0].prediction.step_seconds <= best * (1 + 1e-9)


def test_a_search_at_the_scale_of_llama_3_has_every_kind_of_layout() -> None:
    found = plan(load_recipe(LARGE / "llama3-405b.toml"), H100, ranks=16384)
    assert found.considered > 500_000
    best = found.best[0].recipe
    assert best.parallel.pp > 1 and best.parallel.tp > 1 and best.replicas > 1


def test_a_closed_form_that_says_too_little_fills_less() -> None:
    base = load_recipe(LARGE / "llama3-70b.toml")
    found = plan(base, H100, ranks=128, filled=0.8)
    assert all(choice.peak_bytes <= 0.8 * ROOM * 80 * 2**30 for choice in found.best)
    assert found.best[0].prediction.step_seconds > plan(base, H100, ranks=128).best[0].prediction.step_seconds


@pytest.mark.parametrize(
    ("preset", "ranks", "says", "mesh"),
    [
        ("small", 8, "data parallel", dict(dp_replicate=8)),
        ("llama3-8b", 64, "FSDP with recompute", dict(dp_shard=64)),
        ("llama3-8b", 512, "HSDP", dict(dp_replicate=64, dp_shard=8)),
        ("llama3-405b", 2048, "all of them", dict(tp=8, pp=16, dp_shard=16)),
    ],
)
def test_a_rule_of_thumb(preset: str, ranks: int, says: str, mesh: dict[str, int]) -> None:
    tables = {
        "model": {"preset": preset},
        "data": {"source": "synthetic"},
        "train": {"seq_len": 8192, "global_batch": 4096, "dtype": "bfloat16"},
    }
    words, recipe = rule_of_thumb(recipe_from_tables(tables), H100, ranks=ranks, room=72 * 2**30)
    assert says in words and recipe is not None
    assert {key: value for key, value in vars(recipe.parallel).items() if value > 1} == mesh


# ---- the command ---------------------------------------------------------------------------------------------------

SMALL = ["--set", "model.n_layers=4", "--set", "train.global_batch=16"]


def test_lab_plan_writes_a_recipe_that_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "planned.toml"
    arguments = ["plan", str(LARGE / "llama3-8b-fsdp.toml"), "--cluster", "h100", "--ranks", "8", *SMALL]
    assert main([*arguments, "--write", str(file)]) == 0
    said = capsys.readouterr()
    for words in ("layouts", "By a dry run its rank", "A rule of thumb takes", "tied", "of the step is"):
        assert words in said.out
    written = load_recipe(file)
    assert written.world_size == 8 and written.name == "llama3-8b-fsdp-planned"
    assert main(["check", str(file)]) == 0
    assert main([*arguments, "--write", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_lab_plan_for_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(ROOT / "recipes/tiny.toml"), "--cluster", "cpu", "--ranks", "4", "--without-dry-run"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is None and found["considered"] >= found["fitting"] > 100
    assert recipe_from_tables(found["best"][0]["recipe"]).world_size == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "h1000", "--ranks", "8"], "--cluster = 'h1000': is no cluster of the catalogue"),
        (["--cluster", "h100", "--ranks", "0"], "--ranks = 0"),
        (["--cluster", "h100", "--ranks", "8", "--set", "model.preset=llama3-405b"], "the leanest needs"),
        (["--cluster", "h100", "--ranks", "8", "--set", "train.dtype=float64"], "has no rate for it"),
        (["--cluster", "h100", "--ranks", "37"], "no layout of llama3-8b"),
    ],
)
def test_lab_plan_refuses_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LARGE / "llama3-8b-fsdp.toml"), *arguments, "--without-dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_dry_run_for_a_cluster_has_a_step_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dry-run", str(LARGE / "llama3-8b-fsdp.toml"), *SMALL, "--out", str(tmp_path)]
    assert main([*arguments, "--cluster", "h100"]) == 0
    assert "foretold for h100" in capsys.readouterr().out
    record = read_record(tmp_path / "llama3-8b-fsdp" / "record.json")
    throughput, prediction = record["throughput"], record["prediction"]
    parts = throughput["step_parts"]
    assert main(["report", str(tmp_path)]) == 0
    assert "not run; step s, MFU and HFU are foretold for cluster h100" in " ".join(capsys.readouterr().out.split())
    assert sum(parts.values()) == pytest.approx(throughput["step_seconds"]["median"])
    assert prediction["low_seconds"] < throughput["step_seconds"]["median"] < prediction["high_seconds"]
    assert prediction["cluster"] == "h100" and all(term["rate_from"] for term in prediction["terms"])
    assert 0 < record["flops"]["mfu_causal"] < record["flops"]["mfu"] < 1 and record["kind"] == "dry-run"
    assert main([*arguments]) == 0
    assert read_record(tmp_path / "llama3-8b-fsdp" / "record.json")["prediction"] is None
