"""What is said of Slurm without one: sites, where ranks go, and what would be submitted."""

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.slurm import SCRIPTS, Placement, Site, dims_across, job_options, placement, read_site, submitted
from parallel.recipe import MESH_DIMS, Recipe, RecipeError, recipe_from_tables

RECIPES = Path(__file__).parents[1] / "recipes"


def _recipe(**parallel: int) -> Recipe:
    model = dict(preset="none", n_layers=8, d_model=64, n_heads=8, vocab_size=64)
    tables: dict[str, Any] = {"model": model, "data": {"source": "synthetic"}, "parallel": parallel}
    return recipe_from_tables(tables | {"train": {"seq_len": 64, "global_batch": 96, "micro_batch": 1}})


def _groups(recipe: Recipe, dim: str) -> Iterator[list[int]]:
    """The ranks that differ in `dim` alone, found by going through all."""
    sizes = dataclasses.astuple(recipe.parallel)
    place = list(MESH_DIMS).index(dim)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(recipe.world_size):
        rest, at = rank, []
        for size in reversed(sizes):
            rest, coordinate = divmod(rest, size)
            at.append(coordinate)
        at.reverse()
        groups.setdefault((*at[:place], *at[place + 1 :]), []).append(rank)
    yield from groups.values()


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize(
    "parallel",
    [
        dict(tp=2, dp_shard=12),
        dict(tp=8, dp_replicate=3),
        dict(pp=2, dp_shard=3, cp=2, tp=2),
        dict(pp=4, dp_replicate=3, cp=2),
        dict(dp_replicate=2, dp_shard=3, tp=4),
    ],
)
def test_a_dimension_is_across_nodes_where_a_group_of_it_is_on_two(nodes: int, parallel: dict[str, int]) -> None:
    recipe = _recipe(**parallel)
    place = placement(recipe, capacity=0, nodes=nodes)
    expected = [
        dim
        for dim in MESH_DIMS
        if any(len({rank // place.ranks_per_node for rank in group}) > 1 for group in _groups(recipe, dim))
    ]
    assert dims_across(recipe, place) == expected


def test_ranks_fill_nodes_or_are_refused() -> None:
    recipe = _recipe(dp_shard=6, tp=2)
    assert placement(recipe, capacity=4, nodes=None) == Placement(3, 4)
    assert placement(recipe, capacity=4, nodes=3) == Placement(3, 4)
    assert placement(recipe, capacity=16, nodes=None) == Placement(1, 12)  # a node may be filled in part
    assert placement(recipe, capacity=0, nodes=None) == Placement(1, 12)
    assert placement(recipe, capacity=0, nodes=6) == Placement(6, 2)
    for capacity, nodes, reason in (
        (8, None, "nodes of 8 ranks have 16, and the product of [parallel] of run is 12; make it a multiple of 8"),
        (4, 2, "nodes of 4 ranks have 8, and the product of [parallel] of run is 12; use --nodes 3"),
        (8, 3, "nodes of 8 ranks have 24, and the product of [parallel] of run is 12"),
        (0, 5, "does not divide the 12 ranks of run; use one of 1, 2, 3, 4, 6, 12"),
        (4, 7, "does not divide the 12 ranks of run; use one of 3, 4, 6, 12"),
        (0, 0, "does not divide the 12 ranks"),
        (0, -2, "does not divide the 12 ranks"),
    ):
        with pytest.raises(RecipeError, match=r"^--nodes = ") as error:
            placement(recipe, capacity=capacity, nodes=nodes)
        assert reason in str(error.value)


@pytest.mark.parametrize("name", ["cpu", "8-gpus", "gpu-per-task"])
def test_the_examples_of_sites_are_read(name: str) -> None:
    site, environment = read_site(SCRIPTS / "examples" / f"{name}.toml")
    assert site.capacity and site.partition and environment
    options = job_options(site, Placement(2, site.capacity), name="run", time="30")
    assert f"--partition={site.partition}" in options and "--nodes=2" in options and "--time=30" in options
    gpus = [option for option in options if option.startswith("--gpus")]
    expected = {"cpu": [], "8-gpus": ["--gpus-per-node=8"], "gpu-per-task": ["--gpus-per-task=a100:1"]}
    assert gpus == expected[name]
    assert ("--ntasks-per-node=4" in options) == (name == "gpu-per-task")


def test_the_docs_name_every_key_of_a_site() -> None:
    table = (SCRIPTS.parent / "docs" / "cluster.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in row.split("`")[1::2]}
    assert named == {*Site.__dataclass_fields__, "[environment]"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('partion = "gpu"', "partion = 'gpu': unknown key; did you mean partition?"),
        ("gpus_per_node = -1", "site.gpus_per_node = -1: give a whole number of at least 0"),
        ('gpus_per_node = "8"', "site.gpus_per_node = '8': give a whole number"),
        ('launcher = "mpirun"', "site.launcher = 'mpirun': choose torchrun, srun"),
        ("one_gpu_per_task = true", 'site.one_gpu_per_task = true: needs launcher = "srun" and gpus_per_node'),
        ("gpus_per_node = 8\nranks_per_node = 4", "site.ranks_per_node = 4: each of the 8 GPUs"),
        ('modules = ["a\\nb"]', "site.modules = 'a\\nb': give one in each string"),
        ('name = "a\\u0000"', "site.name = 'a\\x00': "),
        ("environment = 3", "environment = 3: is a section"),
        ('[environment]\n"A B" = "x"', "environment = 'A B': is no variable for ranks"),
        ('[environment]\n"A" = 1', "environment.A = 1: give text in quotes"),
        ('[environment]\nSBATCH_PARTITION = "x"', "environment = 'SBATCH_PARTITION': is no variable for ranks"),
        ("= 3", "is not valid TOML"),
    ],
)
def test_a_site_that_is_wrong_is_refused_in_a_line(
    tmp_path: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.toml").write_text(text)
    assert main(["submit", str(RECIPES / "tiny.toml"), "--site", str(tmp_path / "site.toml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_dry_run_shows_what_a_shell_would_submit_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = "a 'b' $(touch pwned) `touch pwned`\n; touch pwned"
    (tmp_path / "site.toml").write_text('name = """' + hostile + '"""\npartition = """' + hostile + '"""\n')
    recipe = str(RECIPES / "mixes" / "fsdp-tp.toml")
    out = hostile.replace("\n", "")
    assert main(["submit", recipe, "--site", "site.toml", "--nodes", "2", "--out", out, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "across the network: dp_shard\n" in shown and "srun --nodes=" in shown
    commands = shown[shown.index("export ") : shown.index("# ---- slurm/")]
    program = f'sbatch() {{ for word in "$@" "$PARALLEL_LAB_CLUSTER"; do printf \'%s\\0\' "$word"; done; }}\n{commands}'
    answer = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30)
    words = answer.stdout.split("\0")[:-1]
    assert words[-1] == hostile and f"--partition={hostile}" in words and "--nodes=2" in words
    assert words[-2] == str(tmp_path / out) and [path.name for path in tmp_path.iterdir()] == ["site.toml"]


def test_a_comparison_is_shown_with_its_array_and_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(RECIPES / "compare" / "first-look.toml"), "--nodes", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "single: 1 rank on 1 node\n" in shown and "tp-sp: 4 ranks (tp4) on 2 nodes, 2 on each; across" in shown
    assert "--array=0,1,2,3" in shown and "--dependency=afterany" in shown


def test_scripts_are_bash_that_its_own_parser_accepts() -> None:
    for script in ("train.sbatch", "compare.sbatch", "job.sh"):
        assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], capture_output=True).returncode == 0


def test_a_host_without_slurm_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(RECIPES / "tiny.toml"), "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == "lab: sbatch: not found; this is no host from which Slurm takes jobs\n"
    assert not (tmp_path / "runs").exists()
    assert main(["status", str(tmp_path)]) == 2
    assert "holds nothing that `lab submit` has noted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"job": 1}', '{"job": "1;x", "report": null, "tasks": {}}', '{"job": "1", "tasks": []}']
)
def test_notes_from_anywhere_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "slurm.json").write_text(text)
    assert submitted(tmp_path) is None
