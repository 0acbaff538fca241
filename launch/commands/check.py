"""Validate recipes and comparisons; starts nothing."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

from launch.compare import Comparison, is_comparison, load_comparison
from launch.supervisor import refuse_too_many
from launch.table import short_layout
from launch.terminal import CommandError, add_settings, n_bytes, printable
from parallel.corpus import open_corpus
from parallel.measure.record import record_json
from parallel.recipe import Data, Recipe, RecipeError, load_recipe, read_toml


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="RECIPE|COMPARISON", nargs="+", help="TOML files")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of one accelerator, as 80GiB: refuse what a dry run of every rank does not fit",
    )
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    memory_bytes = None if arguments.memory is None else n_bytes("--memory", arguments.memory)
    checked: list[dict[str, Any]] = []

    def note(file: str, name: str | None, recipe: Recipe | None) -> dict[str, Any]:
        checked.append({"file": file, "name": name, "error": None, **_summary(recipe), "fullest_rank": None})
        return checked[-1]

    def refuse(summary: dict[str, Any], error: Exception) -> None:
        summary["error"] = str(error)
        whose = "" if summary["file"] in str(error) else f"{summary['file']}: "
        print(f"lab: {printable(whose + str(error))}", file=sys.stderr)

    for file in arguments.files:
        try:
            if is_comparison(read_toml(file)):
                found = [
                    (variant.name, variant.recipe) for variant in comparison_with_data(file, arguments.set).variants
                ]
            else:
                recipe = recipe_with_data(file, arguments.set)
                found = [(recipe.name, recipe)]
        except (RecipeError, CommandError) as error:
            refuse(note(file, None, None), error)
            continue
        for name, one in found:
            summary = note(file, name, one)
            if memory_bytes is not None and one is not None:
                try:
                    summary["fullest_rank"] = _fullest_rank(one, memory_bytes, arguments.memory)
                except RecipeError as error:
                    refuse(summary, error)
    if arguments.json:
        print(record_json(checked))
    else:
        for summary in checked:
            if summary["error"] is None:
                print(printable(f"{summary['file']}: {_in_words(summary)}"))
    return 2 if any(summary["error"] for summary in checked) else 0


# ---- a recipe or comparison whose data can be opened, too ----------------------------------------------------------


def recipe_with_data(file: str, overrides: Sequence[str]) -> Recipe:
    recipe = load_recipe(file, overrides)
    _open_data(recipe.data, recipe.train.seq_len, recipe.model.vocab_size)
    return recipe


def comparison_with_data(file: str, overrides: Sequence[str]) -> Comparison:
    comparison = load_comparison(file, overrides)
    for variant in comparison.variants:
        if (recipe := variant.recipe) is not None:
            try:
                refuse_too_many(recipe)
                _open_data(recipe.data, recipe.train.seq_len, recipe.model.vocab_size)
            except RecipeError as error:
                raise CommandError(f"{file}: variant {variant.name}: {error}") from None
    return comparison


@functools.cache
def _open_data(data: Data, seq_len: int, vocab_size: int) -> None:
    open_corpus(data, seq_len=seq_len, vocab_size=vocab_size, seed=0)


# ---- what is said of one -------------------------------------------------------------------------------------------


def _fullest_rank(recipe: Recipe, memory_bytes: int, given: str) -> dict[str, int]:
    from parallel.fit import refuse_too_large  # other commands live without torch

    def say(line: str) -> None:
        print(f"  {recipe.name}: dry run of {line}", file=sys.stderr, flush=True)

    return refuse_too_large(recipe, memory_bytes=memory_bytes, given=given, say=say)


def _summary(recipe: Recipe | None) -> dict[str, Any]:
    keys = ("world_size", "layout", "n_microbatches", "n_stages", "parameters")
    if recipe is None:
        return dict.fromkeys(keys)
    layout = short_layout({**dataclasses.asdict(recipe.parallel), "world_size": recipe.world_size})
    values = (recipe.world_size, layout, recipe.n_microbatches, recipe.n_stages, recipe.model.n_parameters)
    return dict(zip(keys, values, strict=True))


def _in_words(summary: dict[str, Any]) -> str:
    if summary["world_size"] is None:
        return f"{summary['name']}: refused, as expected"
    ranks = f"{summary['world_size']} ranks ({summary['layout']})" if summary["world_size"] > 1 else "1 rank"
    words = (
        f"{summary['name']}: {ranks}, microbatches {summary['n_microbatches']}, stages {summary['n_stages']},"
        f" parameters {summary['parameters']:,}"
    )
    if fullest := summary["fullest_rank"]:
        words += f", at most {fullest['peak_bytes'] / 2**30:.4g} GiB (rank {fullest['rank']})"
    return words
