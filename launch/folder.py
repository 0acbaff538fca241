"""The folders of results: DIR/<name>/ of a run, and of a comparison, whose variants are runs in it.

    run          recipe.toml  record.json  steps.jsonl  logs/rank-<r>.log  trace-rank-<r>.json.gz
    comparison   comparison.json (the variants, in order)  table.txt  page.html  <variant>/  predicted/<variant>/

A folder that holds something else is refused, and no file but these is ever removed.
"""

import contextlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from parallel.recipe import Recipe, RecipeError, check_name

RUN_FILES = ("recipe.toml", "record.json", "steps.jsonl")
COMPARISON_FILES = ("comparison.json", "table.txt", "page.html")
PREDICTED = "predicted"  # dry runs of a comparison's variants


def refuse_other_folder(folder: Path, marks: tuple[str, ...]) -> None:
    """RecipeError where `folder` holds something, but none of the files that mark it as a run or a comparison."""
    try:
        if folder.exists() and not folder.is_dir():
            raise RecipeError("--out", str(folder), "is a file; give another folder or another name")
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be read ({error.strerror}); give another folder") from None
    if held and not held & set(marks):
        kind = "run" if marks == RUN_FILES else "comparison"
        remedy = f"holds something that is no {kind}; give another folder or another name"
        raise RecipeError("--out", str(folder), remedy)


def prepare_run(folder: Path) -> None:
    """An empty folder for a run: what an earlier run of this name left is removed. Raises RecipeError."""
    refuse_other_folder(folder, RUN_FILES)
    try:
        remove_run(folder)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be written ({error.strerror}); give another folder") from None


def remove_run(folder: Path) -> None:
    """Removes the files of a run, those we know and nothing else, and its folders where that leaves them empty."""
    remove_results(folder)
    for path in (folder / "recipe.toml", *folder.glob("logs/rank-*.log")):
        path.unlink(missing_ok=True)
    for path in (folder / "logs", folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove_results(folder: Path) -> None:
    known = (folder / "record.json", folder / "steps.jsonl")
    for path in (*known, *folder.glob("record.json.*.partial"), *folder.glob("trace-rank-*.json.gz")):
        path.unlink(missing_ok=True)


def prepare_comparison(folder: Path, name: str, variants: Sequence[str], *, keep: Collection[str] = ()) -> None:
    """A folder for a comparison, without what an earlier one left, but for the variants to keep. Raises RecipeError."""
    refuse_other_folder(folder, COMPARISON_FILES)
    for variant in variants:
        refuse_other_folder(folder / variant, RUN_FILES)
    try:
        for variant in {*variants, *variant_order(folder)}.difference(keep):
            remove_run(folder / variant)
            remove_run(folder / PREDICTED / variant)
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("table.txt", "page.html"):
            (folder / file).unlink(missing_ok=True)
        listed = json.dumps({"name": name, "variants": list(variants)}, indent=1)
        (folder / "comparison.json").write_text(listed + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError("--out", str(folder), f"cannot be written ({error.strerror}); give another folder") from None


def variant_order(folder: Path) -> dict[str, int]:
    """The variants of the comparison in `folder` and the place of each; none where it is no comparison."""
    try:
        names = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["variants"]
        for name in names:
            check_name("variant", name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: place for place, name in enumerate(names)}


def rank_log(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank-{rank}.log"


def recipe_toml(recipe: Recipe) -> str:
    """The resolved recipe as a TOML file, which can be run again."""
    tables = recipe.resolved()
    lines = [f"name = {_toml(tables.pop('name'))}"]
    for section, table in tables.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON is TOML for numbers, booleans, strings and lists of them, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
