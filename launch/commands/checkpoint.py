"""Look at a run's checkpoints, check each byte, take weights out or bring some in."""

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.folder import recipe_toml
from launch.table import short_layout
from launch.terminal import CommandError, printable, progress
from parallel.checkpoint.files import MANIFEST, Checkpoint, Damaged, candidates, read_checkpoint, step_folders
from parallel.measure.record import record_json
from parallel.recipe import RecipeError, check_name, recipe_from_tables


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    actions = ("show", "verify", "export", "import")
    add("action", metavar="ACTION", choices=actions, help=f"what to do: {', '.join(actions)}")
    add("path", metavar="PATH", type=Path, help="of a run or one checkpoint; to import: folder of a Hugging Face Llama")
    to = "export: FILE.safetensors, or a folder for Hugging Face; import: folder of a run, to --resume-from"
    add("--to", metavar="PATH", type=Path, help=to)


def run(arguments: argparse.Namespace) -> int:
    needs_to = arguments.action in ("export", "import")
    if needs_to != (arguments.to is not None):
        raise CommandError(f"lab checkpoint {arguments.action} {'needs' if needs_to else 'takes no'} --to")
    if arguments.action == "import":
        return _import(arguments)
    folders = [arguments.path] if (arguments.path / MANIFEST).exists() else step_folders(arguments.path)
    if not folders:
        raise CommandError(f"{arguments.path} holds no checkpoint; give the folder of a run, or of one checkpoint")
    if arguments.action == "export":
        return _export(arguments)
    latest = candidates(arguments.path)[:1]
    rows = [_row(folder, arguments.action == "verify") | {"latest": [folder] == latest} for folder in folders]
    if arguments.json:
        print(record_json(rows))
    else:
        for row in rows:
            print(printable(_in_words(row)))
    return 1 if any(row["damage"] for row in rows) else 0


def _row(folder: Path, verify: bool) -> dict[str, Any]:
    """verify: reads every byte; else the manifest alone."""
    row: dict[str, Any] = dict.fromkeys(
        ("step", "name", "layout", "bytes", "files", "tensors", "sha256_checked", "damage")
    )
    row["folder"] = folder.name
    try:
        checkpoint = read_checkpoint(folder)
        recipe = recipe_from_tables(checkpoint.recipe)
    except (Damaged, RecipeError) as error:
        return row | {"damage": str(error)}
    row |= {"step": checkpoint.step, "name": recipe.name, "bytes": checkpoint.n_bytes}
    row["layout"] = short_layout(vars(recipe.parallel) | {"world_size": recipe.world_size})
    row |= {"files": len(checkpoint.files), "tensors": len(checkpoint.tensors), "sha256_checked": verify}
    return row | {"damage": _damage(checkpoint) if verify else None}


def _damage(checkpoint: Checkpoint) -> str | None:
    return next((found for file in sorted(checkpoint.files) if (found := checkpoint.damage(file))), None)


def _in_words(row: dict[str, Any]) -> str:
    if row["damage"]:
        return f"{row['folder']}: damaged: {row['damage']}"
    size = f"{row['tensors']} tensors, {row['bytes'] / 2**20:.1f} MiB in {row['files']} files"
    checked = "; every byte as it was written" if row["sha256_checked"] else ""
    return f"{row['folder']}: {row['name']} on {row['layout']}, {size}{checked}" + ("; latest" if row["latest"] else "")


def _export(arguments: argparse.Namespace) -> int:
    folder = arguments.path if (arguments.path / MANIFEST).exists() else candidates(arguments.path)[0]
    if arguments.to.exists():
        raise RecipeError("--to", str(arguments.to), "exists; give another")
    try:
        checkpoint = read_checkpoint(folder)
        damage = _damage(checkpoint)
    except Damaged as error:
        damage = str(error)
    if damage:
        print(f"lab: {printable(f'{folder}: damaged: {damage}')}", file=sys.stderr)
        return 1
    from parallel.checkpoint.huggingface import export  # other actions live without torch

    try:
        export(checkpoint, arguments.to)
    except OSError as error:
        raise RecipeError("--to", str(arguments.to), f"cannot be written ({error.strerror}); give another") from None
    progress(arguments)(printable(f"{arguments.to}: the weights of step {checkpoint.step}"))
    if arguments.json:
        print(record_json({"to": str(arguments.to), "step": checkpoint.step}))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    run = arguments.to
    check_name("--to", run.name)
    try:
        taken = run.exists() and (not run.is_dir() or any(run.iterdir()))
    except OSError as error:
        raise RecipeError("--to", str(run), f"cannot be read ({error.strerror}); give another") from None
    if taken:
        raise RecipeError("--to", str(run), "exists; give another")
    from parallel.checkpoint.huggingface import import_weights

    recipe = import_weights(arguments.path, run)
    (run / "recipe.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    progress(arguments)(printable(f"{run}: lab run RECIPE --resume-from {run} starts from these weights"))
    if arguments.json:
        print(record_json({"to": str(run), "model": recipe.resolved()["model"]}))
    return 0
