"""The best layouts of a recipe's model on a cluster, foretold; starts nothing."""

import argparse
import dataclasses
import functools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.compare import is_comparison
from launch.folder import recipe_toml
from launch.table import WIDTH, short_layout
from launch.terminal import CommandError, add_settings, printable
from parallel.foresight.clusters import Cluster, load_cluster
from parallel.foresight.plan import Choice, Plan, plan
from parallel.foresight.prediction import WORDS
from parallel.measure.record import record_json
from parallel.recipe import Recipe, RecipeError, load_recipe, read_toml

DRY_RUNS = 3  # until the best layout fits by it, too


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file: model, batch and type; its layout is not used")
    where = "a name of the catalogue, as h100, or a .toml file (docs/foresight.md)"
    parser.add_argument("--cluster", metavar="CLUSTER", required=True, help=where)
    parser.add_argument("--ranks", metavar="N", type=int, required=True, help="accelerators")
    parser.add_argument("--write", metavar="FILE", type=Path, help="the best layout, as a recipe")
    parser.add_argument("--without-dry-run", action="store_true", help="memory by the closed form alone, in a second")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    if is_comparison(read_toml(arguments.recipe)):
        raise CommandError(f"{arguments.recipe} is a comparison; give one recipe")
    if not 1 <= arguments.ranks <= 2**20:
        raise RecipeError("--ranks", arguments.ranks, f"give how many accelerators, 1 to {2**20}")
    if arguments.write is not None and arguments.write.exists():
        raise RecipeError("--write", str(arguments.write), "is there already; give a new file")
    cluster = load_cluster(arguments.cluster)
    recipe = cluster.would_run(load_recipe(arguments.recipe, arguments.set))
    plan_again = functools.partial(plan, recipe, cluster, ranks=arguments.ranks)
    found = plan_again()
    counted = None
    if not arguments.without_dry_run:
        found, counted = _dry_run_until_it_fits(found, plan_again)
    if arguments.write is not None:
        best = dataclasses.replace(found.best[0].recipe, name=f"{recipe.name}-planned"[:100])
        head = f"# The fastest layout of {recipe.name} on {arguments.ranks} ranks of {cluster.name}, by lab plan."
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(f"{printable(head)}\n\n{recipe_toml(best)}", encoding="utf-8")
    if arguments.json:
        print(record_json(_as_json(found, counted)))
    else:
        print(_in_words(found, recipe, cluster, arguments.ranks, counted))
        if arguments.write is not None:
            print(f"\n{arguments.write}")
    return 0


def _dry_run_until_it_fits(found: Plan, plan_again: Callable[..., Plan]) -> tuple[Plan, dict[str, int]]:
    """A plan whose first layout fits by a dry run, and the memory of its fullest rank; the last one tried if none does.

    plan_again: with `filled` as the search takes it.
    """
    from parallel.dryrun import measure_each  # other commands live without torch
    from parallel.kinds import distinct_ranks

    filled = 1.0
    for tries in range(DRY_RUNS):
        choice = found.best[0]
        kinds = list(distinct_ranks(choice.recipe))
        ranks = sorted({kinds[0], kinds[-1]})  # the ends of a pipeline, one of which is fullest
        which = f"{_layout(choice.recipe)}, rank {' and '.join(map(str, ranks))}"
        print(f"  dry run of {which}", file=sys.stderr, flush=True)
        measured = dict(measure_each(_shorter(choice.recipe), ranks, lambda _: None))
        fullest = max(ranks, key=lambda rank: measured[rank].memory["peak_bytes"])
        memory = {"rank": fullest, **measured[fullest].memory}
        if memory["peak_bytes"] <= found.room_bytes or tries == DRY_RUNS - 1:
            break
        filled = min(filled, choice.peak_bytes / memory["peak_bytes"])
        found = plan_again(filled=filled)
    return found, memory


def _shorter(recipe: Recipe) -> Recipe:
    """With no more microbatches than it takes to fill memory: further ones find what the ones before have freed."""
    few = 2 * recipe.parallel.pp if recipe.parallel.pp > 1 else 3
    if recipe.n_microbatches <= few or recipe.pipeline.schedule in ("gpipe", "looped-bfs"):  # these keep them all
        return recipe
    batch = few * recipe.micro_batch * recipe.replicas
    train = dataclasses.replace(recipe.train, global_batch=batch, micro_batch=recipe.micro_batch)
    return dataclasses.replace(recipe, train=train)


def _in_words(found: Plan, recipe: Recipe, cluster: Cluster, ranks: int, counted: dict[str, int] | None) -> str:
    gib = 2**30
    room = f"{found.fitting:,} fit into {found.room_bytes / gib:.4g} GiB"
    what = f"{recipe.name} on {ranks} x {cluster.accelerator} (cluster {cluster.name}, {cluster.software.profile})"
    head = f"{what}: {found.considered:,} layouts, {room}"
    legend = (
        "batch: sequences of a microbatch x microbatches. selective: keeps these. 90 %: 90 of 100 steps are within."
        " tied: cannot be told from the first. GiB: of the fullest rank, by a closed form."
    )
    it = found.best[0].prediction
    parts = sorted((term for term in it.terms if term.seconds > 0.01 * it.step_seconds), key=lambda term: -term.seconds)
    spent = ", ".join(f"{WORDS[term.name][0]} {term.seconds:.3g} s" for term in parts)
    below = [f"Of the first: {spent}. {it.bottleneck[0].upper()}{it.bottleneck[1:]}."]
    if counted is not None:
        fits = counted["peak_bytes"] <= found.room_bytes
        no = "" if fits else " It does not fit, and neither did those tried before: take more ranks, or more recompute."
        below.append(f"By a dry run its rank {counted['rank']} needs {counted['peak_bytes'] / gib:.4g} GiB.{no}")
    below += [f"Faster, but too large: {_too_large(choice, found)}." for choice in found.too_large]
    below.append(_against_the_rule(found))
    return "\n".join([_wrapped(head), "", *_table(found), "", _wrapped(legend), "", *map(_wrapped, below)])


def _table(found: Plan) -> list[str]:
    rows = [("", "layout", "schedule", "batch", "recompute", "step s", "90 %", "MFU %", "GiB", "")]
    for i, choice in enumerate(found.best, start=1):
        it = choice.prediction
        rows.append(
            (
                *(f"{i}", _layout(choice.recipe), _schedule(choice.recipe), _batch(choice.recipe)),
                *(_recompute(choice.recipe), f"{it.step_seconds:.3g}", f"{it.low_seconds:.3g}-{it.high_seconds:.3g}"),
                *("-" if it.mfu is None else f"{100 * it.mfu:.1f}", f"{choice.peak_bytes / 2**30:.1f}"),
                "tied" if choice.tied else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]


def _wrapped(text: str) -> str:
    return textwrap.fill(printable(text), WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _too_large(choice: Choice, found: Plan) -> str:
    gib, states, peak = 2**30, choice.state_bytes, choice.peak_bytes
    what = "weights, gradients and moments" if states > found.room_bytes else "activations"
    needs = f"needs {peak / gib:.4g} GiB, {states / gib:.4g} of them weights, gradients and moments"
    recipe, options = choice.recipe, _schedule(choice.recipe)
    names = f"{_layout(recipe)}{'' if options == '-' else f' ({options})'}, batch {_batch(recipe)}"
    names = f"{names}, recompute {_recompute(recipe)}"
    return f"{names}: {choice.prediction.step_seconds:.3g} s, but {needs}; its {what} are in the way"


def _against_the_rule(found: Plan) -> str:
    """What a rule of thumb takes, and why the first row differs: two sentences."""
    rule, best, gib = found.rule, found.best[0], 2**30
    if rule is None:
        return f"A rule of thumb takes {found.rule_says}. Of that no recipe can be made: something does not divide."
    seconds, ours = rule.prediction.step_seconds, best.prediction.step_seconds
    fits = "which fits" if rule.peak_bytes <= found.room_bytes else f"which needs {rule.peak_bytes / gib:.4g} GiB"
    takes = f"{_layout(rule.recipe)}, batch {_batch(rule.recipe)}, {seconds:.3g} s, {fits}"
    says = f"A rule of thumb takes {found.rule_says}: {takes}."
    saved = {term.name: term.seconds for term in rule.prediction.terms}
    for term in best.prediction.terms:
        saved[term.name] -= term.seconds
    most = max(saved, key=lambda name: saved[name])
    if saved[most] <= 0:
        return f"{says} It is what the first row does, or as fast."
    why = f"{saved[most]:.3g} s less of {WORDS[most][0]}"
    again = rule.recipe.recompute.mode != "none" and best.recipe.recompute.mode != rule.recipe.recompute.mode
    recompute = f", and computes {'less' if best.recipe.recompute.mode != 'none' else 'nothing'} again" if again else ""
    return f"{says} The first row takes {ours / seconds:.0%} of that time: it has {why}{recompute}."


def _layout(recipe: Recipe) -> str:
    return short_layout(vars(recipe.parallel) | {"world_size": recipe.world_size}) or ""


def _batch(recipe: Recipe) -> str:
    return f"{recipe.micro_batch}x{recipe.n_microbatches}"


def _schedule(recipe: Recipe) -> str:
    """With what else the layout leaves open: stages a rank, how cp attends, whether FSDP keeps its weights."""
    words = []
    if recipe.parallel.pp > 1:
        several = f" v{recipe.stages_per_rank}" if recipe.stages_per_rank > 1 else ""
        words.append(f"{recipe.pipeline.schedule}{several}")
    if recipe.parallel.cp > 1:
        words.append(recipe.context.method)
    if recipe.parallel.dp_shard > 1 and not recipe.sharding.reshard_after_forward:
        words.append("keeps weights")
    return ", ".join(words) or "-"


def _recompute(recipe: Recipe) -> str:
    mode = recipe.recompute.mode
    return f"selective: {', '.join(recipe.recompute.save)}" if mode == "selective" else mode


def _as_json(found: Plan, counted: dict[str, int] | None) -> dict[str, Any]:
    def choice(one: Choice | None) -> dict[str, Any] | None:
        if one is None:
            return None
        return {
            "recipe": one.recipe.resolved(),
            "prediction": dataclasses.asdict(one.prediction),
            "peak_bytes": one.peak_bytes,
            "state_bytes": one.state_bytes,
            "tied": one.tied,
        }

    return {
        "considered": found.considered,
        "fitting": found.fitting,
        "room_bytes": found.room_bytes,
        "best": [choice(one) for one in found.best],
        "too_large": [choice(one) for one in found.too_large],
        "rule_of_thumb": {"says": found.rule_says, "choice": choice(found.rule)},
        "dry_run": counted,
    }
