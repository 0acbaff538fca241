"""Validate recipes and comparisons; starts nothing."""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from launch.compare import Comparison, is_comparison, load_comparison
from launch.supervisor import refuse_too_many
from launch.table import short_layout
from launch.terminal import CommandError, add_settings, n_bytes, printable
from parallel.corpus import open_corpus
from parallel.measure.record import record_json
from parallel.recipe import Data, Recipe, RecipeError, load_recipe, read_toml, refuse_missing_packages

SUMMARY = ("file", "name", "error", "world_size", "layout", "n_microbatches", "n_stages", "parameters", "fullest_rank")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="RECIPE|COMPARISON", nargs="+", help="TOML files")
    memory_help = "of one accelerator, as 80GiB: refuse what a dry run of every rank does not fit"
    parser.add_argument("--memory", metavar="SIZE", help=memory_help)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    memory_bytes = None if arguments.memory is None else n_bytes("--memory", arguments.memory)
    checked = []
    for file in arguments.files:
        for summary in _summaries(file, arguments, memory_bytes):
            checked.append(summary)
            if error := summary["error"]:
                whose = "" if file in error else f"{file}: "
                print(f"lab: {printable(whose + error)}", file=sys.stderr)
            elif not arguments.json:
                print(printable(f"{file}: {_in_words(summary)}"))
    if arguments.json:
        print(record_json(checked))
    return 2 if any(summary["error"] for summary in checked) else 0


def recipe_with_data(file: str, overrides: Sequence[str]) -> Recipe:
    """A recipe whose engine is installed, and whose data can be opened, too."""
    recipe = load_recipe(file, overrides)
    refuse_missing_packages(recipe)
    _open_data(recipe.data, recipe.train.seq_len, recipe.model.vocab_size)
    return recipe


def comparison_with_data(file: str, overrides: Sequence[str], *, here: bool = True) -> Comparison:
    """A comparison whose variants can be started, on this machine where `here`."""

    def check(recipe: Recipe) -> None:
        if here:
            refuse_too_many(recipe)
            refuse_missing_packages(recipe)
        _open_data(recipe.data, recipe.train.seq_len, recipe.model.vocab_size)

    return load_comparison(file, overrides, check=check)


@functools.cache
def _open_data(data: Data, seq_len: int, vocab_size: int) -> None:
    open_corpus(data, seq_len=seq_len, vocab_size=vocab_size, seed=0)


def _summaries(file: str, arguments: argparse.Namespace, memory_bytes: int | None) -> Iterator[dict[str, Any]]:
    """Of each recipe in `file`, as soon as it is checked: SUMMARY, with None for what is not known."""
    blank = dict.fromkeys(SUMMARY) | {"file": file}
    try:
        if is_comparison(read_toml(file)):
            comparison = comparison_with_data(file, arguments.set)
            found = [(variant.name, variant.recipe) for variant in comparison.variants]
        else:
            single = recipe_with_data(file, arguments.set)
            found = [(single.name, single)]
    except (RecipeError, CommandError) as error:
        yield blank | {"error": str(error)}
        return
    for name, recipe in found:
        summary: dict[str, Any] = blank | {"name": name}
        if recipe is not None:
            summary |= {key: getattr(recipe, key) for key in ("world_size", "n_microbatches", "n_stages")}
            summary["layout"] = short_layout(vars(recipe.parallel) | {"world_size": recipe.world_size})
            summary["parameters"] = recipe.model.n_parameters
            if memory_bytes is not None:
                from parallel.fit import refuse_too_large  # other commands live without torch

                say = functools.partial(print, f"  {name}: dry run of", file=sys.stderr, flush=True)
                try:
                    fullest = refuse_too_large(recipe, memory_bytes=memory_bytes, given=arguments.memory, say=say)
                    summary["fullest_rank"] = fullest
                except RecipeError as error:
                    summary["error"] = str(error)
        yield summary


def _in_words(summary: dict[str, Any]) -> str:
    if summary["world_size"] is None:
        return f"{summary['name']}: refused, as expected"
    ranks = f"{summary['world_size']} ranks ({summary['layout']})" if summary["world_size"] > 1 else "1 rank"
    stages = f"microbatches {summary['n_microbatches']}, stages {summary['n_stages']}"
    fullest = summary["fullest_rank"]
    most = f", at most {fullest['peak_bytes'] / 2**30:.4g} GiB (rank {fullest['rank']})" if fullest else ""
    return f"{summary['name']}: {ranks}, {stages}, parameters {summary['parameters']:,}{most}"
