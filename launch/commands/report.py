"""Print the table of results, write or serve the page, follow runs as they go."""

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.folder import PREDICTED
from launch.history import find_drops, in_words
from launch.live import Server, going_on
from launch.page import find_records, page_html
from launch.table import row, table_for
from launch.terminal import CommandError, printable, progress, watch
from parallel.measure.record import record_json
from parallel.recipe import RecipeError


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="of a run, a comparison, or several of them, some folders deep")
    how = parser.add_mutually_exclusive_group().add_argument
    how("--html", metavar="FILE", type=Path, help="write a page of the same results, too")
    how("--watch", action="store_true", help="print it again as runs go on, until all have ended")
    how("--serve", action="store_true", help="serve the page on loopback; it follows runs as they go on")
    add("--port", metavar="N", type=int, default=0, help="of --serve; default: any that is free")
    fail = "exit with 1 where a series of runs has become slower by more than that, beyond its spread, and still is"
    add("--fail-on-regression", metavar="PERCENT", type=float, help=fail)


def run(arguments: argparse.Namespace) -> int:
    folder, most_percent = arguments.folder, arguments.fail_on_regression
    if most_percent is not None and not (0 <= most_percent < 100 and math.isfinite(most_percent)):
        raise RecipeError("--fail-on-regression", most_percent, "give percent, from 0 to below 100")
    if not folder.is_dir():
        raise CommandError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; give a folder of results")
    if arguments.serve:
        return _serve(arguments)
    found: list[tuple[str, dict[str, Any]]] = []

    def look() -> tuple[str, bool]:
        ended = not (arguments.watch and going_on(folder))  # asked before: what ended since has left its record
        found[:] = find_records(folder)
        if ended and not found:
            raise CommandError(f"{folder} holds no record.json, nor do its folders; give a folder of results")
        rows = _without_predictions(found)
        if arguments.json:
            return record_json([{"run": identifier} | row(record) for identifier, record in rows]), ended
        return _tables(rows) if rows else "nothing has ended its first step yet", ended

    watch(look, clear=not arguments.json)
    say = progress(arguments)
    if arguments.html:
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(page_html(folder.resolve().name or "results", found), encoding="utf-8")
        say(f"\n{printable(str(arguments.html))}: {len(found)} records")
    return _judge(found, most_percent) if most_percent is not None else 0


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.json or arguments.fail_on_regression is not None:
        raise CommandError("--serve takes neither --json nor --fail-on-regression")
    with Server(arguments.folder, port=arguments.port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"{server.address}  the page of {printable(str(arguments.folder))}, until Ctrl-C", flush=True)
        server.serve_forever()
    return 0


def _judge(found: Sequence[tuple[str, Mapping[str, Any]]], most_percent: float) -> int:
    drops = find_drops(found)
    for drop in drops:
        print(f"lab: {printable(in_words(drop))}", file=sys.stderr)
    return 1 if any(drop.lasts and 100 * drop.share > most_percent for drop in drops) else 0


def _without_predictions(found: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Without the dry runs that `lab compare --predict` keeps beside what it measured, if that is there."""
    rows = [(name, record) for name, record in found if PREDICTED not in name.split("/")[:-1]]
    return rows or list(found)


def _tables(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """One for each folder that holds runs, under its name where there are several."""
    folders: dict[str, list[dict[str, Any]]] = {}
    for identifier, record in rows:
        folders.setdefault(identifier.rpartition("/")[0], []).append(record)
    if len(folders) == 1:
        return table_for(sys.stdout, next(iter(folders.values())))
    tables = {name: table_for(sys.stdout, records) for name, records in folders.items()}
    return "\n\n\n".join(f"{printable(name or 'runs')}\n\n{text}" for name, text in tables.items())
