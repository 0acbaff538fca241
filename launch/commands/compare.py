"""Run every variant of a comparison, then print the table."""

import argparse
import sys
from collections.abc import Callable

from launch.commands.check import comparison_with_data
from launch.compare import Comparison, foretell, lay_beside, on_one_device, predict, run_comparison, visible_gpus
from launch.folder import held_alone
from launch.page import write_page
from launch.room import refuse_without_room
from launch.starting import Starter
from launch.supervisor import Interrupted
from launch.table import remark_on, row, table, table_for
from launch.terminal import (
    CommandError,
    Status,
    add_force_option,
    add_label_options,
    add_rank_options,
    add_settings,
    progress,
    progress_stream,
    rank_options,
    set_labels,
)
from launch.trackers import track_comparison
from parallel.foresight.clusters import load_cluster
from parallel.measure.record import record_json
from parallel.recipe import RecipeError


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("comparison", metavar="COMPARISON", help="a TOML file; see recipes/compare/")
    add("--resume", action="store_true", help="keep what an interrupted call has done with the same recipes and code")
    add("--predict", action="store_true", help="dry-run every variant, too: the page shows predicted beside measured")
    where = "foretell each step there, and show it beside the measured one: as here.toml of lab calibrate, or cpu"
    add("--cluster", metavar="CLUSTER", help=where)
    add_settings(parser)
    add_rank_options(parser)
    add_force_option(parser)
    add_label_options(parser)


def run(arguments: argparse.Namespace) -> int:
    options = rank_options(arguments)
    set_labels(arguments)
    say = progress(arguments)
    n_gpus = visible_gpus()
    comparison = on_one_device(comparison_with_data(arguments.comparison, arguments.set), n_gpus=n_gpus, say=say)
    if not arguments.force:
        _refuse_without_room(comparison, arguments.comparison, n_gpus=n_gpus, say=say)
    cluster = None if arguments.cluster is None else load_cluster(arguments.cluster)
    foretold = {} if cluster is None else foretell(comparison, cluster)
    folder = arguments.out / comparison.name
    with held_alone(folder):
        try:
            with Starter() as starter, Status(progress_stream(arguments)) as status:
                records = run_comparison(
                    comparison,
                    out=arguments.out,
                    starter=starter,
                    status=status,
                    options=options,
                    resume=arguments.resume,
                )
        except Interrupted as signal:
            raise Interrupted(f"{signal}; --resume goes on with what is left") from None
        if cluster is not None:
            accelerator = cluster.accelerator
            if elsewhere := lay_beside(records, foretold, accelerator=accelerator, folder=folder):
                say(f"nothing is foretold beside what did not run on {accelerator}: {', '.join(elsewhere)}")
        if arguments.predict:
            predict(comparison, foretold=foretold, out=arguments.out, say=say)
        (folder / "table.txt").write_text(f"{table(records)}\n", encoding="utf-8")
        write_page(folder, folder / "page.html")
    print(record_json([row(record) for record in records]) if arguments.json else f"\n{table_for(sys.stdout, records)}")
    say(f"\n{folder / 'table.txt'}\n{folder / 'page.html'}")
    recipes = [variant.recipe for variant in comparison.variants if variant.recipe is not None]
    track_comparison(folder, recipes, {record["recipe"]["name"]: record for record in records}, say=say)
    runs = zip(comparison.variants, records, strict=True)
    return 1 if any(remark_on(record) and variant.recipe is not None for variant, record in runs) else 0


def _refuse_without_room(comparison: Comparison, file: str, *, n_gpus: int, say: Callable[[str], None]) -> None:
    for variant in comparison.variants:
        if variant.recipe is not None:
            try:
                refuse_without_room(variant.recipe, n_gpus=lambda: n_gpus, say=say)
            except RecipeError as error:
                raise CommandError(f"{file}: variant {variant.name}: {error}") from None
