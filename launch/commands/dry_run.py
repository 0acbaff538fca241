"""Memory, traffic and FLOPs of a recipe's ranks, starting none of them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.compare import is_comparison
from launch.folder import RUN_FILES, refuse_other_folder
from launch.table import short_layout
from launch.terminal import CommandError, add_settings, progress
from parallel.foresight.clusters import load_cluster
from parallel.foresight.prediction import Prediction, predict
from parallel.foresight.replay import Walk
from parallel.measure.record import CATEGORIES, read_record, record_json, write_record
from parallel.recipe import RecipeError, load_recipe, read_toml


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file")
    n_ranks = "scale data-parallel ranks and batch to N ranks in all"
    parser.add_argument("--world-size", metavar="N", type=int, help=n_ranks)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", metavar="R", type=int, default=0, help="which rank; default: 0")
    which.add_argument("--all-distinct-ranks", action="store_true", help="one rank of each kind")
    where = "foretell the step there: a name of the catalogue, as h100, or a .toml file (docs/foresight.md)"
    parser.add_argument("--cluster", metavar="CLUSTER", help=where)
    parser.add_argument("--out", metavar="DIR", type=Path, help="write DIR/<name>/record.json, too")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    if is_comparison(read_toml(arguments.recipe)):
        raise CommandError(f"{arguments.recipe} is a comparison; give one recipe")
    recipe = load_recipe(arguments.recipe, arguments.set)
    path = None if arguments.out is None else arguments.out / recipe.name / "record.json"
    if path is not None:
        refuse_other_folder(path.parent, RUN_FILES)
        if path.exists() and read_record(path)["kind"] != "dry-run":
            raise RecipeError("--out", str(arguments.out), f"{path} is of a measured run; give another folder")
    from parallel.dryrun import measure_each, record_of  # other commands live without torch
    from parallel.kinds import alike_in_pipeline, distinct_ranks, priced_ranks, scaled
    from parallel.strategies.pipeline import schedule_orders

    if arguments.world_size is not None:
        recipe = scaled(recipe, arguments.world_size)
    cluster = None if arguments.cluster is None else load_cluster(arguments.cluster)
    if cluster is not None:
        recipe = cluster.would_run(recipe)
    ranks = list(distinct_ranks(recipe)) if arguments.all_distinct_ranks else [arguments.rank]
    priced: dict[int, int] = {}  # rank of the pipeline -> rank
    if cluster is not None:
        cluster.rates(recipe.train.dtype)  # is refused now, if it is
        priced = priced_ranks(recipe)
    walked = [*ranks, *(rank for rank in priced.values() if rank not in ranks)]
    counted = dict(measure_each(recipe, walked, _say, taped=bool(priced)))
    record = record_of(recipe, {rank: counted[rank] for rank in ranks})
    prediction = None
    if cluster is not None:
        orders = schedule_orders(recipe) if recipe.parallel.pp > 1 else ()
        tapes = {place: counted[rank].tape for place, rank in priced.items()}
        prediction = predict(recipe, cluster, Walk(tapes, alike_in_pipeline(recipe), orders))
        prediction.fill_in(record)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)
    print(record_json(record) if arguments.json else "\n".join([_in_words(record), *_foretold(prediction)]))
    if path is not None:
        progress(arguments)(f"\n{path}")
    return 0


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _foretold(prediction: Prediction | None) -> list[str]:
    if prediction is None:
        return []
    it, shares = prediction, {"MFU": prediction.mfu, "causal": prediction.mfu_causal, "HFU": prediction.hfu}
    known = [f"{name} {100 * value:.1f} %" for name, value in shares.items() if value is not None]
    rates = ", ".join([f"{it.tokens_per_s:,.0f} tokens/s", *known])
    return [
        "",
        f"foretold for {it.cluster}, by {it.method}: {it.step_seconds:.4g} s a step"
        f" ({it.low_seconds:.3g} to {it.high_seconds:.3g} in 90 of 100), {rates}",
        *(
            f"{term.name.replace('_', ' '):<20}{term.seconds:>12.4g} s   {term.rate_from}"
            for term in it.terms
            if term.seconds
        ),
        it.bottleneck,
        f"closed form: {it.closed_form_seconds:.4g} s",
    ]


def _in_words(record: dict[str, Any]) -> str:
    layout, memory, flops = record["layout"], record["memory"], record["flops"]
    parts = ("peak", *CATEGORIES)
    lines = [
        f"{record['recipe']['name']}: one step on {layout['world_size']} ranks ({short_layout(layout)}), not run",
        "",
        f"{'MiB':<11}" + "".join(f"{part:>13}" for part in parts),
        *(
            f"{'rank ' + str(row['rank']):<11}" + "".join(f"{row[f'{part}_bytes'] / 2**20:>13.3f}" for part in parts)
            for row in memory["per_rank"]
        ),
        "",
        f"{'sent by a rank':<36}{'calls':>8}{'MiB':>14}",
        *(
            f"{row['mesh_dim'] + ' ' + row['collective']:<36}{row['calls']:>8}"
            + ("-" if row["bytes_per_rank"] is None else f"{row['bytes_per_rank'] / 2**20:.3f}").rjust(14)
            for row in record["traffic"]
        ),
        "",
        f"FLOPs per token: model {flops['model_flops_per_token']:,}, hardware "
        + (f"{executed:,.0f}" if (executed := flops["hardware_flops_per_token"]) else "- (see --all-distinct-ranks)"),
        *([f"ideal bubble: {100 * ideal:.1f} %"] if (ideal := record["pipeline"]["bubble_fraction_ideal"]) else []),
        memory["note"],
    ]
    return "\n".join(lines)
