"""A run that this machine has no memory for is refused before it starts; one that it may have is not asked."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

import launch.room
import parallel.fit
from launch.cli import main
from launch.commands import run
from launch.room import MARGIN, available_bytes, estimated_bytes, refuse_without_room
from parallel.dryrun import dry_run_rank
from parallel.fit import bytes_of_all_ranks
from parallel.kinds import distinct_ranks
from parallel.measure.record import new_record
from parallel.recipe import Recipe, RecipeError, load_recipe

STRATEGIES = Path(__file__).parents[1] / "recipes" / "strategies"


def silent(line: str) -> None: ...


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(STRATEGIES / f"{name}.toml", overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("fsdp", ["train.attention=math"]),
        ("tp", []),
        ("pp-gpipe", ["parallel.pp=2", "train.global_batch=4"]),
        ("cp-ring", ["parallel.cp=2"]),
    ],
)
def test_the_estimate_is_never_so_low_that_a_dry_run_is_left_out_where_it_matters(
    name: str, overrides: list[str]
) -> None:
    recipe = recipe_of(name, "model.n_layers=2", *overrides)
    kinds = distinct_ranks(recipe)
    needed = sum(n * dry_run_rank(recipe, rank=rank).memory["peak_bytes"] for rank, n in kinds.items())
    assert needed < MARGIN * estimated_bytes(recipe) < 10 * needed


def test_what_does_not_fit_is_refused_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, said = recipe_of("fsdp", "model.n_layers=1"), []
    needed = bytes_of_all_ranks(recipe, enough=2**60, say=silent)
    monkeypatch.setattr(launch.room, "available_bytes", lambda: needed)
    refuse_without_room(recipe, n_gpus=lambda: 0, say=said.append)
    monkeypatch.setattr(launch.room, "available_bytes", lambda: needed - 1)
    with pytest.raises(RecipeError, match=f"parallel = 4: .* need at least {needed / 2**30:.4g} GiB together"):
        refuse_without_room(recipe, n_gpus=lambda: 3, say=said.append)
    assert said == ["fsdp: a dry run, as its ranks may need more memory than this machine has"] * 2
    refuse_without_room(recipe, n_gpus=lambda: 4, say=said.append)  # each rank has a GPU of its own
    assert len(said) == 2


def test_no_further_rank_is_asked_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure_each(recipe: Recipe, ranks: list[int], say: Any) -> Any:
        for rank in ranks:
            asked.append(rank)
            yield rank, type("Measures", (), {"memory": {"peak_bytes": 100}})

    monkeypatch.setattr(parallel.fit, "measure_each", measure_each)
    recipe = recipe_of("pp-1f1b", "parallel.dp_replicate=2")
    assert bytes_of_all_ranks(recipe, enough=2**60, say=silent) == 800 and len(asked) == 4
    asked.clear()
    assert bytes_of_all_ranks(recipe, enough=150, say=silent) == 200 and len(asked) == 1


def test_a_small_run_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.fit, "bytes_of_all_ranks", no_process)
    monkeypatch.setattr(launch.room, "available_bytes", lambda: 2**30)
    refuse_without_room(recipe_of("fsdp"), n_gpus=no_process, say=no_process)


def no_process(*arguments: Any, **settings: Any) -> Any:
    raise AssertionError("a process was started")


@pytest.mark.parametrize("command", ["run", "compare"])
def test_the_command_says_it_in_one_line_before_anything_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.room, "available_bytes", lambda: 10 * 2**20)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    Path("compare.toml").write_text(f'base = "{STRATEGIES / "fsdp.toml"}"\n[[variant]]\nname = "one"\n')
    file = "compare.toml" if command == "compare" else str(STRATEGIES / "fsdp.toml")
    small = ["--set", "model.n_layers=1", "--set", "data.source=synthetic"]
    assert main([command, file, *small]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "parallel = 4: is the world size, and these ranks need at least" in err
    assert "where this machine has 0.009766 GiB available" in err and "or --force" in err
    assert err.startswith("lab: compare.toml: variant one: " if command == "compare" else "lab: parallel = 4")
    assert not Path("runs").exists()


def test_who_knows_better_may_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.room, "available_bytes", lambda: 1)
    started: list[Recipe] = []

    def supervise(recipe: Recipe, **settings: Any) -> dict[str, Any]:
        started.append(recipe)
        return new_record(recipe) | {"status": "ok"}

    monkeypatch.setattr(run, "supervise", supervise)
    assert main(["run", str(STRATEGIES / "fsdp.toml"), "--set", "data.source=synthetic", "--force"]) == 0
    assert [recipe.name for recipe in started] == ["fsdp"]


def test_available_is_what_the_strictest_group_leaves(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    assert available_bytes(proc, cgroups) is None
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert available_bytes(proc, cgroups) == 4000 * 1024
    (proc / "self" / "cgroup").write_text("0::/slurm/job_7\n")
    for group, limit, used, cached in (("slurm", "1000000", 300000, 100000), ("slurm/job_7", "max", 300000, 0)):
        folder = cgroups / group
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 200000\ninactive_file {cached}\n")
    assert available_bytes(proc, cgroups) == 1000000 - 300000 + 100000
    (cgroups / "slurm" / "memory.max").write_text("max\n")
    assert available_bytes(proc, cgroups) == 4000 * 1024
