"""The `lab` command. Exit codes: 0 done, 1 a run failed, 2 the recipe or the command line is wrong."""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.compare import Comparison, is_comparison, load_comparison, predict, run_comparison
from launch.folder import RUN_FILES, refuse_other_folder, variant_order
from launch.page import write_page
from launch.supervisor import Interrupted, refuse_too_many, supervise
from launch.table import remark_on, row, short_layout, table
from launch.terminal import CommandError, Parser, add_rank_options, did_you_mean, n_bytes, printable, rank_options
from parallel.corpus import open_corpus
from parallel.measure.record import read_record, read_records, record_json, version, write_record
from parallel.recipe import Data, Model, Recipe, RecipeError, load_recipe, read_toml

EXAMPLES = """examples:
  lab check recipes/strategies/*.toml                  is every recipe right? starts nothing
  lab run recipes/strategies/fsdp.toml                 4 processes on this machine
  lab run recipes/strategies/fsdp.toml --set train.steps=5 --set sharding.prefetch=2
  lab check recipes/large/llama3-8b-fsdp.toml --memory 80GiB
                                                       does every rank fit? dry-runs one of each kind
  lab dry-run recipes/large/llama3-8b-fsdp.toml --world-size 1024
                                                       memory and traffic of a rank, from this machine alone
  lab compare recipes/compare/first-look.toml          a table of four strategies in a minute
  lab report runs --html page.html                     a page of every result in a folder

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
    dry = command("dry-run", dry_run_recipe, "Memory, traffic and FLOPs of a recipe's ranks, starting none of them.")
    compare = command("compare", compare_variants, "Run every variant of a comparison, then print the table.")
    report = command("report", report_folder, "Print the table of result files.")
    check.add_argument("files", metavar="RECIPE|COMPARISON", nargs="+", help="TOML files")
    check.add_argument(
        "--memory",
        metavar="SIZE",
        help="of one accelerator, as 80GiB: refuse what a dry run of every rank does not fit",
    )
    run.add_argument("recipe", metavar="RECIPE", help="a TOML file")
    run.add_argument("--nproc", metavar="N", type=int, help="processes; must be the product of [parallel]")
    dry.add_argument("recipe", metavar="RECIPE", help="a TOML file")
    dry.add_argument(
        "--world-size", metavar="N", type=int, help="scale data-parallel ranks and batch to N ranks in all"
    )
    which = dry.add_mutually_exclusive_group()
    which.add_argument("--rank", metavar="R", type=int, default=0, help="which rank; default: 0")
    which.add_argument("--all-distinct-ranks", action="store_true", help="one rank of each kind")
    dry.add_argument("--out", metavar="DIR", type=Path, help="write DIR/<name>/record.json, too")
    compare.add_argument("comparison", metavar="COMPARISON", help="a TOML file; see recipes/compare/")
    compare.add_argument(
        "--resume", action="store_true", help="keep what an interrupted call has done with the same recipes and code"
    )
    compare.add_argument(
        "--predict", action="store_true", help="dry-run every variant, too: the page shows predicted beside measured"
    )
    report.add_argument("folder", metavar="DIR", type=Path, help="of a run, a comparison, or several of them")
    report.add_argument("--html", metavar="FILE", type=Path, help="write a page of all results in and below DIR, too")
    for parser_ in (check, run, dry, compare):
        parser_.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="over the file, as train.steps=5; repeat it"
        )
    for parser_ in (run, compare):
        add_rank_options(parser_)
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
                found = [(variant.name, variant.recipe) for variant in _comparison(file, arguments.set).variants]
            else:
                recipe = _recipe(file, arguments.set)
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


def _fullest_rank(recipe: Recipe, memory_bytes: int, given: str) -> dict[str, int]:
    from parallel.fit import refuse_too_large  # other commands live without torch

    def say(line: str) -> None:
        print(f"  {recipe.name}: dry run of {line}", file=sys.stderr, flush=True)

    return refuse_too_large(recipe, memory_bytes=memory_bytes, given=given, say=say)


def run_recipe(arguments: argparse.Namespace) -> int:
    if is_comparison(read_toml(arguments.recipe)):
        raise CommandError(f"{arguments.recipe} is a comparison; use lab compare")
    recipe = _recipe(arguments.recipe, arguments.set)
    if arguments.nproc not in (None, recipe.world_size):
        remedy = f"the product of [parallel] is {recipe.world_size}; give that, or leave --nproc out"
        raise RecipeError("--nproc", arguments.nproc, remedy)
    refuse_too_many(recipe)
    options = rank_options(arguments)
    say = _progress(arguments)
    record = supervise(recipe, out=arguments.out, echo=lambda line: say(printable(line)), options=options)
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


def dry_run_recipe(arguments: argparse.Namespace) -> int:
    if is_comparison(read_toml(arguments.recipe)):
        raise CommandError(f"{arguments.recipe} is a comparison; give one recipe")
    recipe = load_recipe(arguments.recipe, arguments.set)
    path = None if arguments.out is None else arguments.out / recipe.name / "record.json"
    if path is not None:
        refuse_other_folder(path.parent, RUN_FILES)
        if path.exists() and read_record(path)["kind"] != "dry-run":
            raise RecipeError("--out", str(arguments.out), f"{path} is of a measured run; give another folder")
    from parallel.dryrun import dry_run  # other commands live without torch
    from parallel.kinds import distinct_ranks, scaled

    if arguments.world_size is not None:
        recipe = scaled(recipe, arguments.world_size)
    ranks = list(distinct_ranks(recipe)) if arguments.all_distinct_ranks else [arguments.rank]
    record = dry_run(recipe, ranks=ranks, say=lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)
    print(record_json(record) if arguments.json else _dry_run_in_words(record))
    if path is not None:
        _progress(arguments)(f"\n{path}")
    return 0


def compare_variants(arguments: argparse.Namespace) -> int:
    comparison = _comparison(arguments.comparison, arguments.set)
    options = rank_options(arguments)
    say = _progress(arguments)
    try:
        records = run_comparison(comparison, out=arguments.out, say=say, options=options, resume=arguments.resume)
    except Interrupted as signal:
        raise Interrupted(f"{signal}; --resume goes on with what is left") from None
    if arguments.predict:
        predict(comparison, out=arguments.out, say=say)
    folder = arguments.out / comparison.name
    text = table(records)
    (folder / "table.txt").write_text(f"{text}\n", encoding="utf-8")
    write_page(folder, folder / "page.html")
    print(record_json([row(record) for record in records]) if arguments.json else f"\n{text}")
    say(f"\n{folder / 'table.txt'}\n{folder / 'page.html'}")
    runs = zip(comparison.variants, records, strict=True)
    return 1 if any(remark_on(record) and variant.recipe is not None for variant, record in runs) else 0


def report_folder(arguments: argparse.Namespace) -> int:
    records = read_records(arguments.folder)
    on_page = write_page(arguments.folder, arguments.html) if arguments.html else 0
    if not records and not on_page:
        raise CommandError(f"{arguments.folder} holds no record.json, nor do its folders; give a folder of results")
    order = {name: number for number, name in enumerate(variant_order(arguments.folder))}
    records.sort(key=lambda record: order.get(record["recipe"]["name"], len(order)))
    if records or arguments.json:  # the page looks deeper into the folder than the table
        print(record_json([row(record) for record in records]) if arguments.json else table(records))
    if on_page:
        _progress(arguments)(f"\n{printable(str(arguments.html))}: {on_page} records")
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
    words = (
        f"{summary['name']}: {ranks}, microbatches {summary['n_microbatches']}, stages {summary['n_stages']},"
        f" parameters {summary['parameters']:,}"
    )
    if fullest := summary["fullest_rank"]:
        words += f", at most {fullest['peak_bytes'] / 2**30:.4g} GiB (rank {fullest['rank']})"
    return words


def _dry_run_in_words(record: dict[str, Any]) -> str:
    layout, memory, flops = record["layout"], record["memory"], record["flops"]
    parts = ("peak", "parameters", "gradients", "optimizer", "activations", "other")
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
        memory["note"],
    ]
    return "\n".join(lines)


def n_parameters(model: Model) -> int:
    """Elements of all weights of the transformer, a tied matrix once."""
    attention = 2 * (model.n_heads + model.n_kv_heads) * model.head_dim * model.d_model  # q and out, k and v
    block = attention + 3 * model.d_model * model.d_ff + 2 * model.d_model  # the last: two norms
    ends = (1 if model.tied_embeddings else 2) * model.vocab_size * model.d_model + model.d_model
    return model.n_layers * block + ends


if __name__ == "__main__":
    sys.exit(main())
