"""What the scripts in slurm/ ask of the lab within a job.

    python -m launch.on_slurm variant INDEX COMPARISON    makes ready the folder of a variant, counted from 0; prints
                                                          nodes, ranks of each and launch.train's arguments, in lines
    python -m launch.on_slurm report COMPARISON           the table and the page
    python -m launch.on_slurm ended CODE RECIPE           a record for a run whose ranks could not write one; ends with
                                                          CODE, or with 75 where the run has saved itself

Options are those of launch.train, and so are the exit codes.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable

from launch.compare import load_comparison, refuse_variant
from launch.folder import list_variants, prepare_run, recipe_toml
from launch.page import write_page
from launch.slurm import jobs, placement, submitted
from launch.table import table
from launch.terminal import (
    CommandError,
    Parser,
    add_rank_options,
    add_resume_options,
    add_settings,
    printable,
    rank_options,
)
from launch.trackers import track_comparison
from launch.verdict import STOPPED, record_failure
from parallel.measure.record import read_record
from parallel.recipe import RecipeError, load_recipe


def main(argv: list[str]) -> int:
    parser = Parser(prog="launch.on_slurm", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, (operand, _) in VERBS.items():
        added = verbs.add_parser(verb)
        added.set_defaults(parser=added)
        if operand:
            added.add_argument(operand, type=int)
        added.add_argument("file")
        add_settings(added)
        add_rank_options(added)
        add_resume_options(added)
    try:
        arguments = parser.parse(argv)
        return VERBS[arguments.verb][1](arguments)
    except (RecipeError, CommandError, OSError) as error:
        print(f"launch.on_slurm: {printable(error)}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2


def _variant(arguments: argparse.Namespace) -> int:
    comparison = load_comparison(arguments.file, arguments.set)
    n = len(comparison.variants)
    if not 0 <= arguments.index < n:
        raise CommandError(f"{arguments.file}: there is no variant {arguments.index}; use --array=0-{n - 1}")
    variant, folder = comparison.variants[arguments.index], arguments.out.absolute() / comparison.name
    first_life = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if first_life:
        list_variants(folder, comparison.name, [variant.name for variant in comparison.variants])
        prepare_run(folder / variant.name)
    if variant.recipe is None:
        refuse_variant(variant, folder)
        return 0
    if first_life:
        (folder / variant.name / "recipe.toml").write_text(recipe_toml(variant.recipe), encoding="utf-8")
    capacity = os.environ.get("LAB_RANKS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or "1"
    place = placement(variant.recipe, capacity=int(capacity), nodes=None)
    file = folder / variant.name / "recipe.toml"
    # Rows that choose their float32 products each for itself would be unlike.
    matmul = [] if arguments.matmul else ["--matmul", "highest"]
    resume = ["--resume"] if variant.recipe.checkpoint.every else []
    given = [file, "--out", folder, *rank_options(arguments), *matmul, *resume]
    for line in (place.nodes, place.ranks_per_node, *given):
        print(line)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    comparison = load_comparison(arguments.file, arguments.set)
    folder = arguments.out / comparison.name
    tasks = (submitted(folder) or {"tasks": {}})["tasks"]
    try:
        known = jobs(list(tasks.values()))
    except CommandError:  # within a container, say
        known = {}
    for variant in comparison.variants:
        state = known.get(tasks.get(variant.name, ""), {}).get("State")
        reason = f"Slurm ended it as {state}" if state else "its job left no record"
        if variant.recipe is not None and not (folder / variant.name / "record.json").exists():
            (folder / variant.name).mkdir(parents=True, exist_ok=True)
            record_failure(variant.recipe, folder / variant.name, "failed", f"{reason}, and no rank could say why")
    records = {variant.name: read_record(folder / variant.name / "record.json") for variant in comparison.variants}
    text = table(list(records.values()))
    (folder / "table.txt").write_text(f"{text}\n", encoding="utf-8")
    write_page(folder, folder / "page.html")
    recipes = [variant.recipe for variant in comparison.variants if variant.recipe is not None]
    print(text, flush=True)
    track_comparison(folder, recipes, records, say=print)
    return 0


def _ended(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.file, arguments.set)
    status, how = "failed", ENDS.get(arguments.code, f"srun ended with exit code {arguments.code}")
    number = os.environ.get("SLURM_JOB_ID", "0")
    with contextlib.suppress(CommandError):  # within a container, say
        if any(job["Reason"] == "TimeLimit" for job in jobs([number]).values()):
            status, how = "timeout", "ended by Slurm at its time limit"
    folder = arguments.out / recipe.name
    told = f"{how}, and no rank could say more: see the log of job {number}"
    record_failure(recipe, folder, status, told)
    # torchrun does not hand on the exit code of its ranks.
    stopped = "--resume goes on" in (read_record(folder / "record.json")["reason"] or "")
    return STOPPED if stopped else int(arguments.code)


ENDS = {
    128 + signal.SIGTERM: "ended by SIGTERM, as scancel does",
    128 + signal.SIGKILL: "ended by SIGKILL, as the kernel does when memory runs out",
}
VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "variant": ("index", _variant),
    "report": ("", _report),
    "ended": ("code", _ended),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
