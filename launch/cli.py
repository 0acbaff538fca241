"""The `lab` command. Exit codes: 0 done, 1 a run failed, 2 the recipe or the command line is wrong."""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.compare import Comparison, is_comparison, load_comparison, run_comparison
from launch.folder import variant_order
from launch.supervisor import Interrupted, refuse_too_many, supervise
from launch.table import remark_on, row, short_layout, table
from launch.terminal import CommandError, Parser, did_you_mean, printable
from parallel.corpus import open_corpus
from parallel.measure.record import read_records, record_json, version
from parallel.recipe import Data, Model, Recipe, RecipeError, load_recipe, read_toml

EXAMPLES = """examples:
  lab check recipes/strategies/*.toml                  is every recipe right? starts nothing
  lab run recipes/strategies/fsdp.toml                 4 processes on this machine
  lab run recipes/strategies/fsdp.toml --set train.steps=5 --set sharding.prefetch=2
  lab compare recipes/compare/first-look.toml          a table of four strategies in a minute
  lab report runs/first-look                           that table again, from its files

exit codes: 0 done, 1 a run failed, 2 the recipe or the command line is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except (RecipeError, CommandError) as error:
        print(f"lab: {printable(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"lab: interrupted{f' by {error}' if str(error) else ''}; nothing is left running", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `lab report runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        return 1
    except OSError as error:
        print(f"lab: {printable(error)}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="lab", description="One transformer under every parallel strategy.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"parallel-lab {version('parallel-lab')}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def command(name: str, function: Callable[[argparse.Namespace], int], help: str) -> Parser:
        added: Parser = commands.add_parser(name, help=help, description=help)
        added.set_defaults(command=function, parser=added)
        added.add_argument("--json", action="store_true", help="machine-readable, alone on stdout")
        return added

    check = command("check", check_files, "Validate recipes and comparisons; starts nothing.")
    run = command("run", run_recipe, "Run one recipe on this machine.")
    compare = command("compare", compare_variants, "Run every variant of a comparison, then print the table.")
    report = command("report", report_folder, "Print the table of result files.")
    check.add_argument("files", metavar="RECIPE|COMPARISON", nargs="+", help="TOML files")
    run.add_argument("recipe", metavar="RECIPE", help="a TOML file")
    run.add_argument("--nproc", metavar="N", type=int, help="processes; must be the product of [parallel]")
    compare.add_argument("comparison", metavar="COMPARISON", help="a TOML file; see recipes/compare/")
    report.add_argument("folder", metavar="DIR", type=Path, help="of a run, a comparison, or several runs")
    for parser_ in (check, run, compare):
        parser_.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="over the file, as train.steps=5; repeat it"
        )
    for parser_ in (run, compare):
        parser_.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="results; default: runs")

    first = next((argument for argument in argv if not argument.startswith("-")), None)
    if first is not None and first not in commands.choices:
        raise CommandError(f"unknown command {first!r}; {did_you_mean(first, list(commands.choices))}")
    arguments = parser.parse(argv)
    if "command" not in arguments:
        raise CommandError(f"give a command: {', '.join(commands.choices)}; see lab --help")
    return arguments


# ---- commands ------------------------------------------------------------------------------------------------------


def check_files(arguments: argparse.Namespace) -> int:
    checked: list[dict[str, Any]] = []
    for file in arguments.files:
        try:
            if is_comparison(read_toml(file)):
                found = [(variant.name, variant.recipe) for variant in _comparison(file, arguments.set).variants]
            else:
                recipe = _recipe(file, arguments.set)
                found = [(recipe.name, recipe)]
            checked += [{"file": file, "name": name, "error": None, **_summary(recipe)} for name, recipe in found]
        except (RecipeError, CommandError) as error:
            checked.append({"file": file, "name": None, "error": str(error), **_summary(None)})
            whose = "" if file in str(error) else f"{file}: "
            print(f"lab: {printable(whose + str(error))}", file=sys.stderr)
    if arguments.json:
        print(record_json(checked))
    else:
        for summary in checked:
            if summary["error"] is None:
                print(printable(f"{summary['file']}: {_in_words(summary)}"))
    return 2 if any(summary["error"] for summary in checked) else 0


def run_recipe(arguments: argparse.Namespace) -> int:
    if is_comparison(read_toml(arguments.recipe)):
        raise CommandError(f"{arguments.recipe} is a comparison; use lab compare")
    recipe = _recipe(arguments.recipe, arguments.set)
    if arguments.nproc not in (None, recipe.world_size):
        remedy = f"the product of [parallel] is {recipe.world_size}; give that, or leave --nproc out"
        raise RecipeError("--nproc", arguments.nproc, remedy)
    refuse_too_many(recipe)
    say = _progress(arguments)
    record = supervise(recipe, out=arguments.out, echo=lambda line: say(printable(line)))
    if arguments.json:
        print(record_json(record))
    if record["status"] == "refused":
        raise CommandError(record["reason"])
    if remark := remark_on(record):
        print(f"lab: {remark}", file=sys.stderr)
    elif not arguments.json:
        print(f"\n{table([record])}")
    say(f"\n{arguments.out / recipe.name}/record.json")
    return 1 if remark else 0


def compare_variants(arguments: argparse.Namespace) -> int:
    comparison = _comparison(arguments.comparison, arguments.set)
    say = _progress(arguments)
    records = run_comparison(comparison, out=arguments.out, say=say)
    path = arguments.out / comparison.name / "table.txt"
    text = table(records)
    path.write_text(f"{text}\n", encoding="utf-8")
    print(record_json([row(record) for record in records]) if arguments.json else f"\n{text}")
    say(f"\n{path}")
    runs = zip(comparison.variants, records, strict=True)
    return 1 if any(remark_on(record) and variant.recipe is not None for variant, record in runs) else 0


def report_folder(arguments: argparse.Namespace) -> int:
    records = read_records(arguments.folder)
    if not records:
        raise CommandError(f"{arguments.folder} holds no record.json, nor do its folders; give a folder of results")
    order = {name: number for number, name in enumerate(variant_order(arguments.folder))}
    records.sort(key=lambda record: order.get(record["recipe"]["name"], len(order)))
    print(record_json([row(record) for record in records]) if arguments.json else table(records))
    return 0


# ---- what they share -----------------------------------------------------------------------------------------------


def _progress(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Prints lines at once; not to stdout where that is for a machine."""
    return functools.partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def _recipe(file: str, overrides: Sequence[str]) -> Recipe:
    """A recipe whose data can be opened, too."""
    recipe = load_recipe(file, overrides)
    _open_data(recipe.data, recipe.train.seq_len, recipe.model.vocab_size)
    return recipe


def _comparison(file: str, overrides: Sequence[str]) -> Comparison:
    """A comparison of recipes whose data can be opened, too."""
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


def _summary(recipe: Recipe | None) -> dict[str, Any]:
    keys = ("world_size", "layout", "n_microbatches", "n_stages", "parameters")
    if recipe is None:
        return dict.fromkeys(keys)
    layout = short_layout({**dataclasses.asdict(recipe.parallel), "world_size": recipe.world_size})
    values = (recipe.world_size, layout, recipe.n_microbatches, recipe.n_stages, n_parameters(recipe.model))
    return dict(zip(keys, values, strict=True))


def _in_words(summary: dict[str, Any]) -> str:
    if summary["world_size"] is None:
        return f"{summary['name']}: refused, as expected"
    ranks = f"{summary['world_size']} ranks ({summary['layout']})" if summary["world_size"] > 1 else "1 rank"
    return (
        f"{summary['name']}: {ranks}, microbatches {summary['n_microbatches']}, stages {summary['n_stages']},"
        f" parameters {summary['parameters']:,}"
    )


def n_parameters(model: Model) -> int:
    """Elements of all weights of the transformer, a tied matrix once."""
    attention = 2 * (model.n_heads + model.n_kv_heads) * model.head_dim * model.d_model  # q and out, k and v
    block = attention + 3 * model.d_model * model.d_ff + 2 * model.d_model  # the last: two norms
    ends = (1 if model.tied_embeddings else 2) * model.vocab_size * model.d_model + model.d_model
    return model.n_layers * block + ends


if __name__ == "__main__":
    sys.exit(main())
