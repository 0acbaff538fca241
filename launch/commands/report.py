"""Print the table of result files."""

import argparse
from pathlib import Path

from launch.folder import abandoned, variant_order
from launch.page import write_page
from launch.table import row, table
from launch.terminal import CommandError, printable, progress
from parallel.measure.record import read_records, record_json


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="of a run, a comparison, or several of them")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page of all results in and below DIR, too")


def run(arguments: argparse.Namespace) -> int:
    records = read_records(arguments.folder)
    inner = sorted(arguments.folder.iterdir()) if arguments.folder.is_dir() else []
    records += [record for folder in (arguments.folder, *inner) if (record := abandoned(folder))]
    on_page = write_page(arguments.folder, arguments.html) if arguments.html else 0
    if not records and not on_page:
        raise CommandError(f"{arguments.folder} holds no record.json, nor do its folders; give a folder of results")
    order = variant_order(arguments.folder)
    records.sort(key=lambda record: order.get(record["recipe"]["name"], len(order)))
    if records or arguments.json:  # the page looks deeper into the folder than the table
        print(record_json([row(record) for record in records]) if arguments.json else table(records))
    if on_page:
        progress(arguments)(f"\n{printable(str(arguments.html))}: {on_page} records")
    return 0
