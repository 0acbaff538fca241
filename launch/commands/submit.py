"""Check a recipe or a comparison, and give it to Slurm."""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.commands.check import comparison_with_data, recipe_with_data
from launch.compare import Comparison, is_comparison, refuse_variant
from launch.folder import (
    COMPARISON_FILES,
    RUN_FILES,
    SUBMITTED,
    held_alone,
    prepare_comparison,
    prepare_run,
    recipe_toml,
    refuse_other_folder,
    resumed_run,
)
from launch.slurm import (
    OVER,
    SCRIPTS,
    Placement,
    Site,
    Submission,
    dims_across,
    job_options,
    jobs,
    placement,
    read_site,
    report_options,
    submitted,
    variables,
)
from launch.table import number_in, short_layout
from launch.terminal import CommandError, add_rank_options, add_settings, n_bytes, printable, progress, rank_options
from parallel.measure.record import read_record, record_json
from parallel.recipe import Recipe, RecipeError, read_toml


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="RECIPE|COMPARISON", help="a TOML file")
    add("--nodes", metavar="N", type=int, help="of a job; default: as few as have room for the ranks")
    add("--time", metavar="LIMIT", help="of a job, as 30 (minutes) or 2:00:00")
    memory_help = "of one accelerator, as 80GiB: refuse what a dry run of every rank does not fit"
    add("--memory", metavar="SIZE", help=memory_help)
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add("--preflight", action="store_true", help="look over the nodes first; where they are not well, do not train")
    add("--site", metavar="FILE", type=Path, help="what the cluster needs; default: slurm/site.toml, if there is one")
    add("--dry-run", action="store_true", help="show the command and the scripts, and submit nothing")
    add_settings(parser)
    add_rank_options(parser)


def run(arguments: argparse.Namespace) -> int:
    file = arguments.site or SCRIPTS / "site.toml"
    site, environment = read_site(file) if arguments.site or file.exists() else (Site(), {})
    if not SCRIPTS.is_dir():
        raise CommandError(f"{SCRIPTS}: does not exist; install the lab from a checkout, as `make setup` does")
    comparison, recipes = _read(arguments)
    places = _places(site, recipes, arguments.nodes, one=comparison is None)
    say = progress(arguments)
    for recipe, place in zip(recipes, places, strict=True):
        say(printable(_in_words(recipe, place)))
    if memory := arguments.memory or site.accelerator_memory:
        _refuse_too_large(recipes, memory)

    out = arguments.out.absolute()
    folder = out / (comparison or recipes[0]).name
    largest = Placement(max(place.nodes for place in places), max(place.ranks_per_node for place in places))
    options = job_options(site, largest, name=folder.name, time=arguments.time)
    environment |= variables(site, largest) | ({"LAB_PREFLIGHT": "1"} if arguments.preflight else {})
    given = [*rank_options(arguments), "--out", str(out)]
    if comparison is None:
        if recipes[0].checkpoint.every or arguments.resume:
            given.append("--resume")  # for its later lives
        refuse_other_folder(folder, RUN_FILES)
        resumed_run(recipes[0], folder, resume=arguments.resume, resume_from=None)
        _refuse_late_warning(site, folder)
        train = Submission("train.sbatch", [str(folder / "recipe.toml"), *given], options, environment)
        if arguments.dry_run:
            return _show(train.as_shell(folder), "train.sbatch", "job.sh")
        noted = _submit_recipe(recipes[0], train, folder, resume=arguments.resume)
    else:
        tasks = {variant.name: i for i, variant in enumerate(comparison.variants) if variant.recipe is not None}
        settings = [word for text in arguments.set for word in ("--set", text)]
        given = [str(Path(arguments.file).absolute()), *settings, *given]
        options.append(f"--array={','.join(map(str, tasks.values()))}")
        train = Submission("compare.sbatch", given, options, environment)
        report = Submission("compare.sbatch", given, report_options(site, name=f"{folder.name}-report"), environment)
        if arguments.dry_run:
            after = report.as_shell(folder, "--dependency=afterany:<number of the job above>")
            return _show(f"{train.as_shell(folder)}\n\n{after}", "compare.sbatch", "train.sbatch", "job.sh")
        noted = _submit_comparison(comparison, train, report, folder, tasks)

    shown = arguments.out / folder.name
    say(f"\njob {noted['job']}" + (f", and {noted['report']} for the page" if comparison else ""))
    say(printable(f"logs     {shown}/logs/slurm-*.log"))
    say(printable(f"records  {shown}/{'*/' if comparison else ''}record.json"))
    say("\n" + printable(f"lab status {shlex.quote(str(shown))}"))
    if arguments.json:
        print(record_json(noted | {"folder": str(folder)}))
    return 0


# ---- checks --------------------------------------------------------------------------------------------------------


def _read(arguments: argparse.Namespace) -> tuple[Comparison | None, list[Recipe]]:
    if not is_comparison(read_toml(arguments.file)):
        return None, [recipe_with_data(arguments.file, arguments.set)]
    if arguments.resume:
        raise RecipeError("--resume", arguments.file, "is a comparison, whose variants begin anew; leave it out")
    comparison = comparison_with_data(arguments.file, arguments.set, here=False)
    recipes = [variant.recipe for variant in comparison.variants if variant.recipe is not None]
    if not recipes:
        raise CommandError(f"{arguments.file}: every variant is to be refused; there is nothing to submit")
    return comparison, recipes


def _places(site: Site, recipes: Sequence[Recipe], nodes: int | None, *, one: bool) -> list[Placement]:
    """Of each recipe. Variants of a comparison take as few nodes as have room, and the job as many as the largest."""
    if one:
        return [placement(recipes[0], capacity=site.capacity, nodes=nodes)]
    largest = max(recipes, key=lambda recipe: recipe.world_size)
    capacity = placement(largest, capacity=site.capacity, nodes=nodes).ranks_per_node
    return [placement(recipe, capacity=site.capacity or capacity, nodes=None) for recipe in recipes]


def _in_words(recipe: Recipe, place: Placement) -> str:
    layout = short_layout(vars(recipe.parallel) | {"world_size": recipe.world_size})
    nodes = f"{place.nodes} nodes, {place.ranks_per_node} on each" if place.nodes > 1 else "1 node"
    across = dims_across(recipe, place)
    over = f"; across the network: {', '.join(across)}" if across else ""
    slow = " (tensor-parallel ranks send most: they are best within a node)" if "tp" in across else ""
    ranks = f"{recipe.world_size} ranks ({layout})" if recipe.world_size > 1 else "1 rank"
    return f"{recipe.name}: {ranks} on {nodes}{over}{slow}"


def _refuse_too_large(recipes: Sequence[Recipe], memory: str) -> None:
    from parallel.fit import refuse_too_large  # other commands live without torch

    memory_bytes = n_bytes("--memory", memory)
    for recipe in recipes:
        say = functools.partial(print, f"  {recipe.name}: dry run of", file=sys.stderr, flush=True)
        refuse_too_large(recipe, memory_bytes=memory_bytes, given=memory, say=say)


def _refuse_late_warning(site: Site, folder: Path) -> None:
    """RecipeError where an earlier run in `folder` shows that a step and a save take longer than Slurm warns before."""
    record = read_record(folder / "record.json")
    step, save = record["throughput"]["step_seconds"]["median"], record["checkpoint"]["waited_seconds"]
    if number_in(step) and number_in(save) and step + save > site.warning_seconds:
        remedy = f"a step took {step:.3g} s there and a save {save:.3g} s; give at least {2 * (step + save):.0f}"
        raise RecipeError("site.warning_seconds", site.warning_seconds, remedy)


def _show(commands: str, *scripts: str) -> int:
    texts = [f"# ---- slurm/{file} ----\n{(SCRIPTS / file).read_text(encoding='utf-8')}" for file in scripts]
    print("\n".join([commands, "", *texts]).rstrip())
    return 0


# ---- submission ----------------------------------------------------------------------------------------------------


def _submit_recipe(recipe: Recipe, train: Submission, folder: Path, *, resume: bool) -> dict[str, Any]:
    _refuse_while_jobs_use(folder, RUN_FILES)
    with train.held(folder) as job:
        prepare_run(folder, resume=resume)
        (folder / "recipe.toml").write_text(recipe_toml(recipe), encoding="utf-8")
        return _note(folder, job, None, {recipe.name: job})


def _submit_comparison(
    comparison: Comparison, train: Submission, report: Submission, folder: Path, tasks: dict[str, int]
) -> dict[str, Any]:
    _refuse_while_jobs_use(folder, COMPARISON_FILES)
    with held_alone(folder), train.held(folder) as job:
        prepare_comparison(folder, comparison.name, [variant.name for variant in comparison.variants])
        (folder / "logs").mkdir(exist_ok=True)
        for variant in comparison.variants:
            if variant.recipe is None:
                refuse_variant(variant, folder)
        after = report.submit(folder, f"--dependency=afterany:{job}")  # whether they end well or not
        return _note(folder, job, after, {name: f"{job}_{number}" for name, number in tasks.items()})


def _refuse_while_jobs_use(folder: Path, marks: tuple[str, ...]) -> None:
    refuse_other_folder(folder, marks)
    noted = submitted(folder)
    for number, job in (jobs([noted["job"]]) if noted else {}).items():
        if job["State"] not in OVER:
            remedy = f"job {number} is {job['State'].lower()} there: scancel {number}, or give another folder"
            raise RecipeError("--out", str(folder.parent), remedy)


def _note(folder: Path, job: str, report: str | None, tasks: dict[str, str]) -> dict[str, Any]:
    noted = {"job": job, "report": report, "tasks": tasks}
    (folder / SUBMITTED).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    return noted
