"""Run one recipe on this machine."""

import argparse
import sys

from launch.commands.check import recipe_with_data
from launch.compare import is_comparison, visible_gpus
from launch.folder import RUN_FILES, refuse_other_folder, resumed_run
from launch.room import refuse_without_room
from launch.starting import Starter
from launch.supervisor import refuse_too_many, supervise
from launch.table import remark_on, table_for, width_of
from launch.terminal import (
    CommandError,
    add_force_option,
    add_label_options,
    add_rank_options,
    add_resume_options,
    add_settings,
    coloured,
    printable,
    progress,
    rank_options,
    set_labels,
)
from parallel.measure.record import record_json
from parallel.recipe import RecipeError, read_toml


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file")
    parser.add_argument("--nproc", metavar="N", type=int, help="processes; must be the product of [parallel]")
    add_settings(parser)
    add_rank_options(parser)
    add_label_options(parser)
    add_resume_options(parser)
    add_force_option(parser)
    restarts = "when a rank dies, start all again from the last checkpoint, at most N times; default: 0"
    parser.add_argument("--max-restarts", metavar="N", type=int, default=0, help=restarts)


def run(arguments: argparse.Namespace) -> int:
    if is_comparison(read_toml(arguments.recipe)):
        raise CommandError(f"{arguments.recipe} is a comparison; use lab compare")
    recipe = recipe_with_data(arguments.recipe, arguments.set)
    if arguments.nproc not in (None, recipe.world_size):
        remedy = f"the product of [parallel] is {recipe.world_size}; give that, or leave --nproc out"
        raise RecipeError("--nproc", arguments.nproc, remedy)
    if arguments.max_restarts < 0:
        raise RecipeError("--max-restarts", arguments.max_restarts, "give 0, for none, or more")
    refuse_too_many(recipe)
    options = rank_options(arguments)
    set_labels(arguments)
    folder = arguments.out / recipe.name
    refuse_other_folder(folder, RUN_FILES)
    if resumed_run(recipe, folder, resume=arguments.resume, resume_from=arguments.resume_from):
        options += ["--resume"] if arguments.resume else ["--resume-from", str(arguments.resume_from)]
    say = progress(arguments)
    if not arguments.force:
        refuse_without_room(recipe, n_gpus=visible_gpus, say=say)
    with Starter() as starter:
        record = supervise(
            recipe,
            out=arguments.out,
            starter=starter,
            echo=lambda line: say(printable(line)),
            options=options,
            resume=arguments.resume,
            max_restarts=arguments.max_restarts,
        )
    if arguments.json:
        print(record_json(record))
    if record["status"] == "refused":
        raise CommandError(record["reason"])
    if remark := remark_on(record, width=width_of(sys.stderr)):
        print(coloured(f"lab: {remark}", sys.stderr), file=sys.stderr)
    elif not arguments.json:
        print(f"\n{table_for(sys.stdout, [record])}")
    say(f"\n{arguments.out / recipe.name}/record.json")
    return 1 if remark else 0
