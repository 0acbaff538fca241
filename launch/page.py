"""The page: one HTML file that shows a folder of results, offline, with everything it needs inside.

A record is data from anywhere. What the page shows of it is picked here, key by key, as numbers or as text; its
script inserts text as text, and the Content-Security-Policy lets no other script run and no request leave the page.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from launch.folder import variant_order
from launch.table import number_in, short_layout
from parallel.measure.record import read_record

SCRIPTS = ("tools.js", "figures.js", "charts.js", "page.js")  # one script in the page, in this order
DEEPEST = 4  # folders below the one that is given, as in machine / comparison / predicted / variant
MOST_STEPS = 500  # points of a loss curve; of a longer run, evenly spaced ones and the last
MOST_ACTIONS = 20_000  # of a pipeline's timeline
MOST_LANES = 16  # ranks of a timeline; of more, one for each of the pipeline's
LONGEST_TEXT = 4000  # characters of one text in a record; a reason holds the end of a log

MEMORY = ("parameters", "gradients", "optimizer", "activations", "other", "allocator_peak")  # <name>_bytes in a record
FLOPS = (
    *("model_flops_per_token", "model_flops_per_token_causal", "hardware_flops_per_token"),
    *("mfu", "mfu_causal", "hfu", "peak_flops", "matmul_ceiling_flops"),
)
STEP_PARTS = ("compute", "communication", "idle")  # <name>_seconds in a record


def write_page(directory: str | Path, file: str | Path) -> int:
    """Writes the page of all results in and below `directory` to `file`; the number of records that it shows.

    Where there are none it writes nothing. Raises OSError where the file cannot be written.
    """
    directory = Path(directory)
    found = find_records(directory)
    if found:
        text = page_html(directory.resolve().name or "results", found)
        Path(file).write_text(text, encoding="utf-8")
    return len(found)


def find_records(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """(folder below `directory` with "/" between, record), the variants of a comparison in its order."""
    found: list[tuple[str, dict[str, Any]]] = []

    def search(folder: Path, below: tuple[str, ...]) -> None:
        if (folder / "record.json").is_file():
            found.append(("/".join(below) or folder.resolve().name, read_record(folder / "record.json")))
        elif len(below) < DEEPEST and folder.is_dir():
            order = {name: number for number, name in enumerate(variant_order(folder))}
            inner = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
            for path in sorted(inner, key=lambda path: (order.get(path.name, len(order)), path.name)):
                search(path, (*below, path.name))

    search(directory, ())
    return found


def page_html(title: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The whole page. title: plain text; found: unique identifiers with "/" between folders, and their records."""
    assets = files("launch") / "page"
    style, text, *scripts = (
        (assets / name).read_text(encoding="utf-8") for name in ("page.css", "template.html", *SCRIPTS)
    )
    script = "\n".join(scripts)
    policy = (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    # The data last: a placeholder can hide in no record, for the data has no "<" ...
    data = json.dumps({"title": title, **page_data(found)}, separators=(",", ":"), allow_nan=False)
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


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- what the page knows of a record -------------------------------------------------------------------------------


def page_data(found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """{groups: [{comparison, hardware}], runs: [...]}: runs of one comparison on one kind of machine are a group."""
    runs = [_run(identifier, record) for identifier, record in found]
    machines: dict[str, set[str]] = {}  # of each comparison
    for run in runs:
        if run["hardware"]:
            machines.setdefault(run["comparison"], set()).add(run["hardware"])
    recipes = [json.dumps(record["recipe"], sort_keys=True, default=str) for _, record in found]
    dry_runs = [pair for pair in zip(runs, recipes, strict=True) if pair[0]["kind"] == "dry-run"]
    dry_runs.sort(key=lambda pair: str(pair[0]["environment"]["time_utc"]))  # the newest of a recipe predicts
    predictions = {recipe: {"memory": run["memory"], "traffic": run["traffic"]} for run, recipe in dry_runs}
    for run, recipe, (_, record) in zip(runs, recipes, found, strict=True):
        if not run["hardware"]:  # refused before it chose a device: it belongs with the rest of its comparison
            known = machines.get(run["comparison"], set())
            run["hardware"] = min(known) if len(known) == 1 else _cpu(record["environment"])
        run["predicted"] = predictions.get(recipe) if run["kind"] == "measured" else None
    # A dry run of what was also run is shown beside it, and is no row of its own.
    was_run = {recipe for run, recipe in zip(runs, recipes, strict=True) if run["kind"] == "measured"}
    runs = [
        run for run, recipe in zip(runs, recipes, strict=True) if run["kind"] == "measured" or recipe not in was_run
    ]
    groups: dict[tuple[str, str], int] = {}
    for run in sorted(runs, key=lambda run: run["kind"] == "dry-run"):  # groups of dry runs alone come last
        run["group"] = groups.setdefault((run["comparison"], run["hardware"]), len(groups))
    return {"groups": [{"comparison": c, "hardware": h} for c, h in groups], "runs": runs}


def _run(identifier: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a record: every number a finite number or None, every text a str or None."""
    recipe, flops, parity = record["recipe"], record["flops"], record["parity"]
    throughput, pipeline = record["throughput"], record["pipeline"]
    last = record["steps"][-1] if record["steps"] else {}
    passed = parity["passed"]
    return {
        "id": identifier,
        "comparison": identifier.rpartition("/")[0],
        "name": _text(recipe.get("name")) or identifier,
        "status": record["status"],
        "reason": _text(record["reason"]),
        "kind": record["kind"] or "measured",
        "layout": short_layout(record["layout"]),
        "world_size": number_in(record["layout"]["world_size"]),
        "shape": _shape(recipe),
        "hardware": _hardware(record["environment"]),
        "loss": number_in(last.get("loss")),
        "steps": _folded(_steps(record["steps"])),
        "parity": {
            "max_rel_grad_diff": number_in(parity["max_rel_grad_diff"]),
            "max_abs_loss_diff": number_in(parity["max_abs_loss_diff"]),
            "passed": passed if isinstance(passed, bool) else None,
            "reference": _text(parity["reference"]),
            "dtype": _text(parity["dtype"]),
        },
        "tokens_per_s": number_in(throughput["tokens_per_s"]),
        "tokens_per_s_per_rank": number_in(throughput["tokens_per_s_per_rank"]),
        "cpu_seconds_per_step": number_in(throughput["cpu_seconds_per_step"]),
        "step_seconds": {key: number_in(throughput["step_seconds"][key]) for key in ("median", "p10", "p90")},
        "step_parts": _step_parts(throughput.get("step_parts")),
        "steps_timed": number_in(throughput.get("steps_timed")),
        "steps_left_out": _numbers(throughput.get("steps_left_out")),
        "flops": {key: number_in(flops[key]) for key in FLOPS}
        | {key: _text(flops[key]) for key in ("definition", "peak_source")},
        "memory": _memory(record["memory"]),
        "traffic": _traffic(record["traffic"]),
        "bubble": number_in(pipeline["bubble_fraction"]),
        "bubble_ideal": number_in(pipeline["bubble_fraction_ideal"]),
        "timeline": _folded(_timeline(pipeline.get("timeline"))),
        "recipe": _plain(recipe),
        "environment": _plain(record["environment"]),
    }


def _folded(value: Any) -> str | None:
    """JSON as a text: what is long, and read of the few runs alone that are drawn."""
    return None if value is None else json.dumps(value, separators=(",", ":"))


def _numbers(value: Any) -> dict[str, float] | None:
    """The numbers of a table, by key; None where there is none."""
    table = value if isinstance(value, dict) else {}
    return {_text(key) or "": number for key, item in table.items() if (number := number_in(item)) is not None} or None


def _step_parts(value: Any) -> dict[str, float | None] | None:
    seconds = _numbers(value) or {}
    parts = {part: seconds.get(f"{part}_seconds") for part in STEP_PARTS}
    return None if None in (parts["compute"], parts["communication"]) else parts


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:LONGEST_TEXT]


def _plain(value: Any, depth: int = 0) -> Any:
    """Any JSON, with texts cut to a length and not nested deeper than a recipe is."""
    if isinstance(value, dict) and depth < 3:
        return {_text(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list) and depth < 3:
        return [_plain(item, depth + 1) for item in value[:1000]]
    number = number_in(value)
    return value if value is None or isinstance(value, bool) else _text(value) if number is None else number


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
    per_rank: list[dict[str, Any]] = [
        {
            "rank": number_in(row.get("rank")),
            "peak_bytes": peak,
            **{key: number_in(row.get(f"{key}_bytes")) for key in MEMORY},
        }
        for row in _rows(memory["per_rank"])
        if (peak := number_in(row.get("peak_bytes"))) is not None
    ]
    most, least = number_in(memory["max_peak_bytes"]), number_in(memory["min_peak_bytes"])
    told = {"all_known": most is not None, "step": number_in(memory.get("step")), "note": _text(memory.get("note"))}
    if per_rank:
        by_peak = sorted(per_rank, key=lambda row: row["peak_bytes"])
        return {"largest": by_peak[-1], "smallest": by_peak[0], "ranks": len(per_rank), **told}
    if most is None:
        return None
    unsplit = {"rank": None, **dict.fromkeys(MEMORY)}
    smallest = unsplit | {"peak_bytes": least} if least is not None else None
    return {"largest": unsplit | {"peak_bytes": most}, "smallest": smallest, "ranks": None, **told}


def _traffic(traffic: Any) -> list[dict[str, Any]] | None:
    """None where traffic was not measured; an empty list where nothing was sent."""
    if not isinstance(traffic, list):
        return None
    return [
        {key: _text(row.get(key)) or "unknown" for key in ("mesh_dim", "collective")}
        | {key: number_in(row.get(key)) for key in ("calls", "bytes_per_rank")}
        for row in _rows(traffic)
    ]


def _timeline(timeline: Any) -> dict[str, Any] | None:
    """{ranks: how many there were, kinds: names of actions, actions: rows}, seconds since the first action.

    A row is [rank, stage, microbatch, index of its kind, start, end]: thousands of them take little room so.
    """
    actions = []
    for row in _rows(timeline):
        rank, stage, microbatch = (number_in(row.get(key)) for key in ("rank", "stage", "microbatch"))
        start, end = number_in(row.get("start_seconds")), number_in(row.get("end_seconds"))
        if rank is not None and start is not None and end is not None:
            actions.append((rank, stage, microbatch, _text(row.get("action")) or "unknown", start, end))
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


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, dict) else {}


def _shape(recipe: Mapping[str, Any]) -> str:
    """Model, precision and batch, in words: what makes two runs' speeds comparable."""
    model, train = _section(recipe, "model"), _section(recipe, "train")
    name = model.get("preset", "tiny") if model.get("preset") != "none" else "own model"
    layers, width = model.get("n_layers"), model.get("d_model")
    shape = f" ({layers} layers, d_model {width})" if layers and width else ""
    batch, length = train.get("global_batch"), train.get("seq_len")
    tokens = f", {batch} × {length} tokens" if batch and length else ""
    return f"{name}{shape}, {train.get('dtype', 'float32')}{tokens}"[:200]


def _hardware(environment: Mapping[str, Any]) -> str | None:
    """As "8 × NVIDIA H200" or "AMD EPYC, 2 cores": of one host. None where the run had chosen no device yet."""
    device, accelerators = environment["device"], environment["accelerators"]
    if device is None:
        return None
    if str(device).startswith("cpu") or not isinstance(accelerators, list) or not accelerators:
        return _cpu(environment)
    names = [str(name)[:100] for name in accelerators]
    kinds = dict.fromkeys(names)
    return ", ".join(f"{names.count(kind)} × {kind}" if names.count(kind) > 1 else kind for kind in kinds)


def _cpu(environment: Mapping[str, Any]) -> str:
    cpu, cores = environment["cpu"], number_in(environment["cores"])
    name = str(cpu)[:100] if cpu else "unknown processor"
    return f"{name}, {cores:.0f} cores" if cores else name
