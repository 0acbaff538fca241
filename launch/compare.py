"""A comparison: variants of one base recipe, run one after the other.

    name = "strategies"
    base = "../tiny.toml"                       # relative to this file
    [[variant]]
    name = "fsdp"
    set = { "parallel.dp_shard" = 4 }           # the keys of --set, with TOML values
    [[variant]]
    name = "ring-too-wide"
    set = { "parallel.cp" = 3 }
    expect = "refused"                          # a row with the reason, where it would be an error of the file

Every variant is validated before the first is started.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.folder import PREDICTED, prepare_comparison
from launch.starting import Starter
from launch.supervisor import supervise
from launch.table import progress_line, width_of
from launch.terminal import CommandError, Status
from parallel.foresight.clusters import Cluster
from parallel.foresight.prediction import Prediction
from parallel.foresight.prediction import predict as foretell_step
from parallel.measure.record import environment, new_record, read_record, write_record
from parallel.recipe import Recipe, RecipeError, check_name, did_you_mean
from parallel.recipe.reading import apply_overrides, read_toml, recipe_from_tables, refuse_unknown_keys


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    recipe: Recipe | None  # None: refused, as expected
    tables: Mapping[str, Any]
    reason: str | None = None  # of the refusal


@dataclass(frozen=True, kw_only=True)
class Comparison:
    name: str
    variants: tuple[Variant, ...]


def is_comparison(tables: Mapping[str, Any]) -> bool:
    return "variant" in tables or "base" in tables


# ---- reading -------------------------------------------------------------------------------------------------------


def load_comparison(
    path: str | Path, overrides: Sequence[str] = (), *, check: Callable[[Recipe], None] = lambda recipe: None
) -> Comparison:
    """Reads a comparison and validates every variant, with `overrides` on top of each; `check` may refuse it, too.

    Raises CommandError, which names the file, the variant and the key.
    """
    path, where = Path(path), str(path)
    try:
        tables = read_toml(path)
        if not is_comparison(tables):
            raise CommandError(f"{path}: has neither base nor [[variant]]: a recipe; use lab run")
        _refuse_unknown(tables, ("name", "base", "variant"))
        name = tables.get("name", path.stem)
        check_name("name", name)
        if not isinstance(tables.get("base"), str):
            raise RecipeError("base", tables.get("base"), "give the base recipe's file, relative to this one")
        entries = tables.get("variant")
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise RecipeError("variant", entries, "give at least one [[variant]] with name and set")
        base = read_toml(path.parent / tables["base"])
        if is_comparison(base):
            raise RecipeError("base", tables["base"], "is a comparison; give a recipe")
        variants: dict[str, Variant] = {}
        for number, entry in enumerate(entries, start=1):
            where = f"{path}: variant {number}"
            check_name("name", entry.get("name"))
            where = f"{path}: variant {entry['name']}"
            if entry["name"].lower() in variants:  # some file systems hold the two for one
                raise RecipeError("name", entry["name"], "is the name of an earlier variant; give each its own")
            variant = variants[entry["name"].lower()] = _variant(entry, base, overrides)
            if variant.recipe is not None:
                check(variant.recipe)
    except RecipeError as error:
        raise CommandError(f"{where}: {error}") from None
    return Comparison(name=name, variants=tuple(variants.values()))


def _variant(entry: Mapping[str, Any], base: Mapping[str, Any], overrides: Sequence[str]) -> Variant:
    _refuse_unknown(entry, ("name", "set", "expect"))
    if entry.get("expect", "refused") != "refused":
        raise RecipeError("expect", entry["expect"], 'the only thing to expect is "refused"')
    tables = apply_overrides(_with_settings(base, entry.get("set", {})), overrides) | {"name": entry["name"]}
    try:
        recipe = recipe_from_tables(tables)
    except RecipeError as error:
        if "expect" not in entry:
            raise
        refuse_unknown_keys(tables)  # those are never the refusal that was expected
        return Variant(name=entry["name"], recipe=None, tables=tables, reason=str(error))
    if "expect" in entry:
        raise RecipeError("expect", entry["expect"], "but this variant can be run; remove the key")
    return Variant(name=recipe.name, recipe=recipe, tables=tables)


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str]) -> None:
    for key, value in table.items():
        if key not in known:
            raise RecipeError(key, value, f"unknown key; {did_you_mean(key, known)}")


def _with_settings(base: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """`base` with each "section.key" of `settings` set; TOML reads the same written without quotes as a table."""
    if not isinstance(settings, dict):
        raise RecipeError("set", settings, 'give a table, as in { "parallel.tp" = 4 }')
    tables = dict(base)
    for name, value in settings.items():
        section, _, key = name.partition(".")
        old, new = tables.get(section, {}), {key: value} if key else value
        if not isinstance(old, dict) or not isinstance(new, dict):
            raise RecipeError(f"set.{name}", value, 'name a key of a section, as in { "parallel.tp" = 4 }')
        tables[section] = old | new
    return tables


# ---- running -------------------------------------------------------------------------------------------------------


def run_comparison(
    comparison: Comparison,
    *,
    out: Path,
    starter: Starter,
    status: Status,
    options: Sequence[str],
    resume: bool,
) -> list[dict[str, Any]]:
    """Runs every variant, each whatever came of the others; the records, in order.

    resume: takes the records of variants that an earlier, interrupted call has done as they are. Raises RecipeError
    before anything is started where a folder cannot be used, and Interrupted.
    """
    folder = out / comparison.name
    done = _done(comparison, folder) if resume else {}
    prepare_comparison(folder, comparison.name, [variant.name for variant in comparison.variants], keep=done)
    n, n_run, n_left = len(comparison.variants), 0, len(comparison.variants) - len(done)
    start = time.monotonic()
    records: list[dict[str, Any]] = []
    for number, variant in enumerate(comparison.variants, start=1):
        if variant.name in done:
            status.say(f"[{number}/{n}] {variant.name}  (done before)")
            records.append(done[variant.name])
        else:
            elapsed = time.monotonic() - start
            left = f", about {_clock(elapsed / n_run * (n_left - n_run))} left" if n_run else ""
            status.say(f"[{number}/{n}] {variant.name}  ({_clock(elapsed)} elapsed{left})")
            settled = _settled(options, [*done.values(), *records])
            records.append(_run_variant(variant, folder, starter, [*options, *settled], status))
            n_run += 1
        status.say(progress_line(records[-1], width=width_of(status.stream)))
    return records


def on_one_device(comparison: Comparison, *, n_gpus: int, say: Callable[[str], None]) -> Comparison:
    """With all variants that leave their device open on CPUs, where this host has too few GPUs for one of them.

    Some on GPUs beside others on CPUs, in one table, would be no comparison.
    """
    recipes = [variant.recipe for variant in comparison.variants if variant.recipe is not None]
    most = max((recipe.world_size for recipe in recipes if recipe.train.device == "auto"), default=0)
    if not 0 < n_gpus < most:
        return comparison
    has = f"this host has {n_gpus} GPU{'s' * (n_gpus > 1)}"
    say(f"all on the CPU: a variant has {most} ranks, and {has}; --set train.device=cuda refuses those that do not fit")
    return replace(comparison, variants=tuple(map(_on_cpu, comparison.variants)))


def _on_cpu(variant: Variant) -> Variant:
    recipe = variant.recipe
    if recipe is None or recipe.train.device != "auto":
        return variant
    return replace(variant, recipe=recipe.on("cpu"))


def visible_gpus() -> int:
    """Those of this host that torch sees. Asked in a process of its own: this one lives without torch."""
    if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd")):  # NVIDIA, AMD
        return 0
    command = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(answer.stdout)


def _settled(options: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a row has found out for all: float32 products of two kinds would make rows unlike."""
    if "--matmul" in options:
        return []
    found = (record["environment"].get("float32_matmul") for record in records)
    return next((["--matmul", precision] for precision in found if precision in ("highest", "medium")), [])


def foretell(comparison: Comparison, cluster: Cluster) -> dict[str, Prediction]:
    """By the closed form, of each variant of the native engine. Raises RecipeError, where the cluster lacks a rate."""
    variants = [variant for variant in comparison.variants if variant.recipe and variant.recipe.engine.name == "native"]
    return {variant.name: foretell_step(variant.recipe, cluster) for variant in variants if variant.recipe}


def lay_beside(
    records: Sequence[dict[str, Any]], foretold: Mapping[str, Prediction], *, accelerator: str, folder: Path
) -> list[str]:
    """Writes predictions into the records of a comparison in `folder`, those at hand and those there.

    accelerator: of the cluster. Returns the rows that ran on something else, beside which they would say nothing.
    """
    elsewhere = []
    for record in records:
        name = record["recipe"]["name"]
        if name in foretold and record["environment"]["device"] not in (None, accelerator):
            elsewhere.append(name)
        elif name in foretold:
            record["prediction"] = foretold[name].as_json()
            if (folder / name).is_dir():
                write_record(folder / name / "record.json", record)
    return elsewhere


def predict(
    comparison: Comparison, *, foretold: Mapping[str, Prediction], out: Path, say: Callable[[str], None]
) -> None:
    """Dry-runs every variant of the native engine, to out/<name>/predicted/<variant>/.

    The page shows it beside what was measured. foretold: speeds, where there is a cluster for them.
    """
    from parallel.dryrun import dry_run  # a comparison alone lives without torch
    from parallel.kinds import distinct_ranks

    folder = out / comparison.name / PREDICTED
    done = _done(comparison, folder)  # kept by --resume
    for variant in comparison.variants:
        if variant.recipe is not None and variant.recipe.engine.name == "native" and variant.name not in done:
            say(f"dry run of {variant.name}")
            (folder / variant.name).mkdir(parents=True, exist_ok=True)
            record = dry_run(variant.recipe, ranks=list(distinct_ranks(variant.recipe)))
            if variant.name in foretold:
                foretold[variant.name].fill_in(record)
            write_record(folder / variant.name / "record.json", record)


def _done(comparison: Comparison, folder: Path) -> dict[str, dict[str, Any]]:
    """The records in `folder` that another run of their variant would only repeat: of the same recipe and code."""
    here = vars(environment())
    done = {}
    for variant in comparison.variants:
        record = read_record(folder / variant.name / "record.json")  # one that failed, where there is none
        same_code = all(record["environment"][key] == here[key] for key in ("parallel_lab", "git_commit", "torch"))
        same_recipe = variant.recipe is not None and record["recipe"] == variant.recipe.resolved()
        if record["status"] in ("ok", "oom") and same_recipe and same_code:
            done[variant.name] = record
    return done


def _run_variant(
    variant: Variant, folder: Path, starter: Starter, options: Sequence[str], status: Status
) -> dict[str, Any]:
    if variant.recipe is None:
        return refuse_variant(variant, folder)
    try:
        return supervise(variant.recipe, out=folder, starter=starter, options=options, echo=status.now)
    except (OSError, subprocess.SubprocessError, RecipeError) as error:  # no more processes, disk or access
        return new_record(variant.recipe) | {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def refuse_variant(variant: Variant, folder: Path) -> dict[str, Any]:
    """The record of a variant that was to be refused, in its folder."""
    record = new_record(variant.tables) | {"status": "refused", "reason": variant.reason}
    (folder / variant.name).mkdir(exist_ok=True)
    write_record(folder / variant.name / "record.json", record)
    return record


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
