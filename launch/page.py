"""The page: one HTML file that shows a folder of results, offline, with everything it needs inside.

A record is data from anywhere. What the page shows of it is picked, key by key, as numbers or as text; its script
inserts text as text, and the Content-Security-Policy lets no other script run and no request leave the page.
"""

import base64
import dataclasses
import hashlib
import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from launch.folder import abandoned, running, variant_order
from launch.history import cluster_of, cpu_of, engine_of, find_drops, hardware_of, model_of, shape_of, time_of
from launch.table import LONGEST_TEXT, foretold_of, layout_kind, number_in, picked, short_layout, table_in, text_in
from parallel.measure.record import CATEGORIES, Memory, Record, read_record

ASSETS = (
    "page.css",
    "template.html",
    "tools.js",
    "figures.js",
    "charts.js",
    "overview.js",
    "page.js",
)  # scripts in this order
DEEPEST = 4  # folders below the one that is given, as in machine / comparison / predicted / variant
MOST_STEPS = 500  # points of a loss curve; of a longer run, evenly spaced ones and the last
MOST_ACTIONS = 20_000  # of a pipeline's timeline
MOST_LANES = 16  # ranks of a timeline; of more, one for each of the pipeline's


def write_page(directory: Path, file: Path) -> int:
    """Writes the page of all results in and below `directory`, if there are any; how many records it shows."""
    if found := find_records(directory):
        file.write_text(page_html(directory.resolve().name or "results", found), encoding="utf-8")
    return len(found)


def find_records(folder: Path, below: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(folder below the first one with "/" between, record), the variants of a comparison in its order."""
    if os.path.lexists(folder / "record.json"):
        return [("/".join(below) or folder.resolve().name, read_record(folder / "record.json"))]
    if record := running(folder) or abandoned(folder):
        return [("/".join(below) or folder.resolve().name, record)]
    if len(below) == DEEPEST or not folder.is_dir():
        return []
    order = variant_order(folder)
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    inner.sort(key=lambda path: (order.get(path.name, len(order)), path.name))
    return [found for path in inner for found in find_records(path, (*below, path.name))]


def page_html(title: str, found: Sequence[tuple[str, Mapping[str, Any]]], *, live: bool = False) -> str:
    """The whole page. title: plain text; found: unique identifiers with "/" between folders, and their records.

    live: it asks where it came from, launch/live.py, for newer data again and again, and so may connect there.
    """
    style, text, *scripts = ((files("launch") / "page" / name).read_text(encoding="utf-8") for name in ASSETS)
    script = "\n".join(scripts)
    known = f"script-src '{_sha256(script)}'; style-src '{_sha256(style)}'"
    connect = " connect-src 'self';" if live else ""
    policy = f"default-src 'none'; {known};{connect} img-src data:; base-uri 'none'; form-action 'none'"
    # The data last: a placeholder can hide in no record, for the data has no "<" ...
    data = data_json(title, found, live=live)
    for placeholder, value in (
        ("<!-- TITLE -->", html.escape(title)),
        ("<!-- POLICY -->", policy),
        ("/* STYLE */", style),
        ("/* SCRIPT */", script),
        # ... and so closes no <script>. json.dumps writes other alphabets, and halves of characters, as \uXXXX.
        ("/* DATA */", data.replace("<", "\\u003c")),
    ):
        text = text.replace(placeholder, value)
    return text


def data_json(title: str, found: Sequence[tuple[str, Mapping[str, Any]]], *, live: bool) -> str:
    return json.dumps({"title": title, "live": live, **page_data(found)}, separators=(",", ":"), allow_nan=False)


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- what the page knows of a record -------------------------------------------------------------------------------


def page_data(found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """{groups: [{comparison, hardware}], runs: [...], drops: [...]}.

    Runs of one comparison on one kind of machine are a group.
    """
    recipes = {identifier: json.dumps(record["recipe"], sort_keys=True, default=str) for identifier, record in found}
    runs = [_run(identifier, record) for identifier, record in found]
    dry_runs = [run for run in runs if run["kind"] == "dry-run"]
    dry_runs.sort(key=lambda run: str(run["environment"]["time_utc"]))  # the newest of a recipe predicts
    predictions = {recipes[run["id"]]: {"memory": run["memory"], "traffic": run["traffic"]} for run in dry_runs}
    machines: dict[str, set[str]] = {}  # of each comparison
    for run in runs:
        if run["hardware"]:
            machines.setdefault(run["comparison"], set()).add(run["hardware"])
    for run in runs:
        if not run["hardware"]:  # refused before it chose a device: it belongs with the rest of its comparison
            known = machines.get(run["comparison"], set())
            unknown = "not known yet" if run["status"] == "running" else cpu_of(run["environment"])
            run["hardware"] = min(known) if len(known) == 1 else unknown
            run["cluster"] = run["cluster"] or run["hardware"]
        run["predicted"] = predictions.get(recipes[run["id"]]) if run["kind"] == "measured" else None
    # A dry run of what was also run is shown beside it, and is no row of its own.
    was_run = {recipes[run["id"]] for run in runs if run["kind"] == "measured"}
    shown = [run for run in runs if run["kind"] == "measured" or recipes[run["id"]] not in was_run]
    groups: dict[tuple[str, str], int] = {}
    for run in sorted(shown, key=lambda run: run["kind"] == "dry-run"):  # groups of dry runs alone come last
        run["group"] = groups.setdefault((run["comparison"], run["hardware"]), len(groups))
    drops = [{**dataclasses.asdict(drop), "share": drop.share} for drop in find_drops(found)]
    return {"groups": [{"comparison": c, "hardware": h} for c, h in groups], "runs": shown, "drops": drops}


def _run(identifier: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a record: every number a finite number or None, every text a str or None."""
    recipe, environment, measured = record["recipe"], record["environment"], picked(record, Record)
    return {
        "id": identifier,
        "key": base64.urlsafe_b64encode(hashlib.sha256(identifier.encode()).digest())[:6].decode(),  # short, for links
        "comparison": identifier.rpartition("/")[0],
        "name": text_in(recipe.get("name")) or identifier,
        "status": record["status"],
        "reason": measured["reason"],
        "kind": record["kind"] or "measured",
        "layout": short_layout(record["layout"]),
        "layout_kind": layout_kind(record["layout"]),
        "world_size": number_in(record["layout"]["world_size"]),
        "shape": shape_of(record),
        "model": model_of(record),
        "engine": engine_of(record),
        "hardware": hardware_of(environment),
        "cluster": cluster_of(record),
        "time": time.timestamp() * 1000 if (time := time_of(record)) else None,
        "loss": number_in(record["steps"][-1].get("loss")) if record["steps"] else None,
        "steps": _folded(_steps(record["steps"])),
        "parity": measured["parity"],
        **measured["throughput"],
        "step_parts": _step_parts(record["throughput"].get("step_parts")),
        "steps_left_out": _numbers(record["throughput"].get("steps_left_out")),
        "foretold": foretold_of(record),
        "flops": measured["flops"],
        "memory": _memory(record["memory"]),
        "traffic": _traffic(record["traffic"]),
        "bubble": measured["pipeline"]["bubble_fraction"],
        "bubble_ideal": measured["pipeline"]["bubble_fraction_ideal"],
        "timeline": _folded(_timeline(record["pipeline"].get("timeline"))),
        "checkpoint": _checkpoint(record["checkpoint"], measured["checkpoint"]),
        "labels": _plain(record["labels"]),
        "goodput": measured["goodput"],
        "recipe": _plain(recipe),
        "environment": _plain(environment),
    }


def _checkpoint(checkpoint: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any] | None:
    """{saves, bytes, waited_seconds, background_seconds, lives: how many}; None of one life without a save."""
    lives = len(_rows(checkpoint.get("lives"))) or None
    return {**measured, "lives": lives} if lives and (measured["saves"] or lives > 1) else None


def _folded(value: Any) -> str | None:
    """JSON as a text: what is long, and read of the few runs alone that are drawn."""
    return None if value is None else json.dumps(value, separators=(",", ":"))


def _numbers(value: Any) -> dict[str, float] | None:
    """The numbers of a table, by key; None where there is none."""
    items = table_in(value).items()
    return {key[:LONGEST_TEXT]: number for key, item in items if (number := number_in(item)) is not None} or None


def _step_parts(value: Any) -> dict[str, float | None] | None:
    parts = {part: number_in(table_in(value).get(f"{part}_seconds")) for part in ("compute", "communication", "idle")}
    return None if None in (parts["compute"], parts["communication"]) else parts


def _plain(value: Any, depth: int = 0) -> Any:
    """Any JSON, with texts cut to a length and not nested deeper than a recipe is."""
    if isinstance(value, dict) and depth < 3:
        return {text_in(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list) and depth < 3:
        return [_plain(item, depth + 1) for item in value[:1000]]
    return value if isinstance(value, bool) or number_in(value) is not None else text_in(value)


def _rows(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{step: [...], loss: [...]}, at most MOST_STEPS of them."""
    points = [(number_in(step.get("step")), number_in(step.get("loss"))) for step in steps]
    known = [point for point in points if None not in point]
    if len(known) > MOST_STEPS:
        known = known[:: -(-len(known) // MOST_STEPS)] + known[-1:]
    return {"step": [step for step, _ in known], "loss": [loss for _, loss in known]}


def _memory(memory: Mapping[str, Any]) -> dict[str, Any] | None:
    """{largest, smallest, ranks, all_known, step, note}: the ranks of the highest and the lowest peak.

    None where no peak was measured. A dry run that looked at some kinds of rank only does not know all.
    """
    known = picked(memory, Memory)
    by_peak = [rank for row in _rows(memory["per_rank"]) if (rank := _rank_memory(row))["peak_bytes"] is not None]
    by_peak.sort(key=lambda rank: rank["peak_bytes"])
    ends = by_peak or [_rank_memory({"peak_bytes": known[f"{end}_peak_bytes"]}) for end in ("min", "max")]
    if ends[-1]["peak_bytes"] is None:
        return None
    return {
        "largest": ends[-1],
        "smallest": None if ends[0]["peak_bytes"] is None else ends[0],
        "ranks": len(by_peak) or None,
        "all_known": known["max_peak_bytes"] is not None,
        **{key: known[key] for key in ("step", "note")},
    }


def _rank_memory(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: number_in(row.get(f"{name}_bytes")) for name in (*CATEGORIES, "allocator_peak")}
    return {"rank": number_in(row.get("rank")), "peak_bytes": number_in(row.get("peak_bytes")), **parts}


def _traffic(traffic: Any) -> list[dict[str, Any]] | None:
    """None where traffic was not measured; an empty list where nothing was sent."""
    if not isinstance(traffic, list):
        return None
    return [
        {key: text_in(row.get(key)) or "unknown" for key in ("mesh_dim", "collective")}
        | {key: number_in(row.get(key)) for key in ("calls", "bytes_per_rank", "bytes_across_hosts")}
        for row in _rows(traffic)
    ]


def _timeline(timeline: Any) -> dict[str, Any] | None:
    """{ranks: how many there were, kinds: names of actions, actions: rows, as thousands of them take little room}.

    A row is [rank, stage, microbatch, index of its kind, start, end], in seconds since the first action.
    """
    actions = []
    for row in _rows(timeline):
        rank, stage, microbatch = (number_in(row.get(key)) for key in ("rank", "stage", "microbatch"))
        start, end = number_in(row.get("start_seconds")), number_in(row.get("end_seconds"))
        if rank is not None and start is not None and end is not None:
            actions.append((rank, stage, microbatch, text_in(row.get("action")) or "unknown", start, end))
    if not actions:
        return None
    stages: dict[float, set[float | None]] = {}
    for rank, stage, *_ in actions:
        stages.setdefault(rank, set()).add(stage)
    lanes = set(stages)
    if len(stages) > MOST_LANES:  # those that hold the same stages do the same
        lanes = set({frozenset(stages[rank]): rank for rank in sorted(stages, reverse=True)}.values())
    first = min(start for *_, start, _ in actions)
    kinds: dict[str, int] = {}
    rows = [
        [rank, stage, microbatch, kinds.setdefault(kind, len(kinds)), round(start - first, 7), round(end - first, 7)]
        for rank, stage, microbatch, kind, start, end in sorted(actions, key=lambda action: action[4])
        if rank in lanes
    ]
    return {"ranks": len(stages), "kinds": list(kinds), "actions": rows[:MOST_ACTIONS]}
