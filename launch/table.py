"""The terminal's table: a row per record, as wide as the terminal or a file, and what was compared below it."""

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from launch.terminal import coloured, columns_of, printable
from parallel.measure.record import Record
from parallel.recipe import MESH_DIMS

WIDTH = 100  # columns of a file, and at most those of a terminal
SPARE = (
    "max_abs_loss_diff",
    "mfu_causal",
    "cpu_seconds_per_step",
    "hfu",
)  # what a narrow terminal lacks, the first first
NAME_WIDTH, LEAST_NAME_WIDTH = 16, 10  # of a name, and of a layout: before a column is left out, and then
LARGEST_REASON = 2000  # characters
LONGEST_TEXT = 4000  # characters of one text in a record; a reason holds the end of a log

# head (two lines), key of `_cells`, alignment, what a number is multiplied with
COLUMNS = (
    ("", "name", "name", "<", 1),
    ("", "layout", "layout", "<", 1),
    ("", "loss", "loss", ">", 1),
    ("step", "s", "step_median", ">", 1),
    ("CPU s", "/step", "cpu_seconds_per_step", ">", 1),
    ("MFU", "%", "mfu", ">", 100),
    ("causal", "%", "mfu_causal", ">", 100),
    ("HFU", "%", "hfu", ">", 100),
    ("peak", "MiB", "peak_bytes", ">", 2**-20),
    ("grad", "diff", "max_rel_grad_diff", ">", 1),
    ("loss", "diff", "max_abs_loss_diff", ">", 1),
    ("", "parity", "parity", "<", 1),
)
# Beside what was measured, where some row was foretold.
FORETOLD_COLUMNS = (("fore-", "told s", "foretold_seconds", ">", 1), ("off", "%", "foretold_error", ">", 100))
LEGEND = (
    "layout: ranks of the pipeline (pp), replicas (dp), weight shards (fsdp), context (cp) and tensor (tp)."
    " loss: of the last step. step s: median wall time of a step, warm-up excluded. CPU s: of all ranks together."
    " MFU: the model's FLOPs over the peak (on a CPU the fastest matrix product measured there, shared by the ranks),"
    " attention counted in full; causal: by half; HFU: the FLOPs that ran."
    " peak: live tensors of the fullest rank."
    " grad diff: the largest ‖g − g_ref‖ / ‖g_ref‖ of any parameter in step 1; loss diff: |loss − loss_ref| there;"
    " both in float64, if nothing else is said. passed: grad diff is at most 1e-10."
)


def number_in(value: Any) -> float | None:
    """`value` where it is a number that can be shown; records may come from anywhere."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def text_in(value: Any) -> str | None:
    return None if value is None else str(value)[:LONGEST_TEXT]


def table_in(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def picked(values: Any, kind: Any) -> dict[str, Any]:
    """The fields of `kind`, Record or a section of it: None for all but the number, text or flag of its type."""

    def pick(value: Any, type_: Any) -> Any:
        if dataclasses.is_dataclass(type_):
            return picked(value, type_)
        if type_ == bool | None:
            return value if isinstance(value, bool) else None
        return text_in(value) if type_ == str | None else number_in(value)

    return {field.name: pick(table_in(values).get(field.name), field.type) for field in dataclasses.fields(kind)}


def row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a record, as plain numbers; None where there is none."""
    last = record["steps"][-1] if record["steps"] else {}
    measured, foretold = picked(record, Record), foretold_of(record)
    return {
        "name": str(record["recipe"].get("name"))[:200],
        **{key: record[key] for key in ("status", "reason", "kind")},
        "world_size": number_in(record["layout"]["world_size"]),
        "layout": short_layout(record["layout"]),
        **{key: number_in(last.get(key)) for key in ("loss", "grad_norm")},
        **{key: measured["throughput"][key] for key in ("step_seconds", "tokens_per_s", "cpu_seconds_per_step")},
        **{key: measured["flops"][key] for key in ("mfu", "mfu_causal", "hfu")},
        "foretold_seconds": foretold["foretold_seconds"],
        "foretold_error": foretold["error"],
        "peak_bytes": measured["memory"]["max_peak_bytes"],
        **{key: measured["parity"][key] for key in ("max_rel_grad_diff", "max_abs_loss_diff", "passed")},
    }


def foretold_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """{foretold_seconds, measured_seconds, error, of_cpu, cluster} of a measured run: of a step, or its CPU seconds on
    CPUs, where wall time is other programs' too. None for what is not known; of a dry run nothing is.
    """
    prediction, speed = table_in(record["prediction"]), record["throughput"]
    on_cpu = number_in(prediction.get("cpu_seconds_per_step"))
    seconds = number_in(prediction.get("step_seconds")) if on_cpu is None else on_cpu
    measured = number_in(table_in(speed.get("step_seconds")).get("median"))
    measured = measured if on_cpu is None else number_in(speed.get("cpu_seconds_per_step"))
    if record["kind"] == "dry-run" or not seconds or seconds <= 0:
        return dict.fromkeys(("foretold_seconds", "measured_seconds", "error", "of_cpu", "cluster"))
    return {
        "foretold_seconds": seconds,
        "measured_seconds": measured,
        "error": seconds / measured - 1 if measured and measured > 0 else None,
        "of_cpu": on_cpu is not None,
        "cluster": text_in(prediction.get("cluster")),
    }


def short_layout(layout: Mapping[str, Any]) -> str | None:
    """As "pp2·fsdp2·tp2": the mesh dimensions of more than one rank."""
    if not number_in(layout.get("world_size")):
        return None
    sizes = {short: number_in(layout.get(dim)) for dim, short in MESH_DIMS.items()}
    return "·".join(f"{short}{size:.0f}" for short, size in sizes.items() if size and size > 1) or "1 rank"


def layout_kind(layout: Mapping[str, Any]) -> str | None:
    """As "pp2·fsdp·tp8": without the sizes of replicas and shards, which grow with the number of devices."""
    short = short_layout(layout)
    return short and re.sub(r"(dp)\d+", r"\1", short)


def table(records: Sequence[Mapping[str, Any]], *, width: int = WIDTH) -> str:
    """The whole text: head, rows, reasons of those that did not end well, and what was compared."""
    rows = [_cells(record) for record in records]
    columns, left_out, spared = list(COLUMNS), [], list(SPARE)
    if any(foretold_of(record)["foretold_seconds"] for record in records):
        place = next(i for i, column in enumerate(columns) if column[2] == "cpu_seconds_per_step") + 1
        columns[place:place] = FORETOLD_COLUMNS
        spared.remove("cpu_seconds_per_step")  # which is what is foretold on a CPU
    widths = _widths(columns, rows)
    for spare in spared:
        if sum(min(each, NAME_WIDTH) for each in widths[:2]) + sum(widths[2:]) + len(widths) - 1 <= width:
            break
        column = next(column for column in columns if column[2] == spare)
        columns.remove(column)
        left_out.append(" ".join(column[:2]).replace(" %", "").replace(" /", "/"))
        widths = _widths(columns, rows)
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    for place in (0, 1):  # a long name gives way first, then a long layout
        too_wide = sum(widths) + gap * (len(widths) - 1) - width
        widths[place] -= max(0, min(too_wide, widths[place] - LEAST_NAME_WIDTH))
    cells = [[top for top, *_ in columns], [bottom for _, bottom, *_ in columns]]
    cells += [[row[key] for _, _, key, *_ in columns] for row in rows]
    lines = []
    for line in cells:
        fitted = (_fit(cell, each, align) for cell, each, (*_, align, _) in zip(line, widths, columns, strict=True))
        lines.append((" " * gap).join(fitted).rstrip())
    lines.insert(2, "-" * (sum(widths) + gap * (len(widths) - 1)))
    below = [text for record in records if (text := remark_on(record, width=width))]
    notes = [*_without_peak(records), *_noted_proofs(records), *_foretold(records), *_how_well_foretold(records)]
    notes += map(goodput_in_words, records)
    below += [_wrapped(text, width=width) for text in notes if text]
    about = [_compared(records), LEGEND]
    if left_out:
        about.insert(0, f"Not in {width} columns: {', '.join(left_out)}.")
    return "\n".join([*lines, "", *below, *([""] if below else []), *(_wrapped(text, width=width) for text in about)])


def table_for(stream: TextIO, records: Sequence[Mapping[str, Any]]) -> str:
    """The same, as `stream` shows it best: no wider than its terminal, and in colour there."""
    return coloured(table(records, width=width_of(stream)), stream)


def width_of(stream: TextIO) -> int:
    return min(columns_of(stream) or WIDTH, WIDTH)


def _widths(columns: Sequence[tuple[str, str, str, str, float]], rows: Sequence[Mapping[str, str]]) -> list[int]:
    return [max(len(top), len(bottom), *(len(row[key]) for row in rows)) for top, bottom, key, *_ in columns]


def _without_peak(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows that were timed have no MFU, a reason at a time."""
    names: dict[str, list[str]] = {}
    for record in records:
        shown, flops = row(record), record["flops"]
        if shown["mfu"] is None and shown["step_seconds"]["median"] is not None and flops["peak_flops"] is None:
            names.setdefault(str(flops["peak_source"])[:LARGEST_REASON], []).append(_name(record)[:60])
    return [f"{', '.join(of_reason)}: no MFU: {reason}" for reason, of_reason in names.items()]


def _foretold(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows whose speed was not measured, by the cluster for which it is foretold."""
    names: dict[str, list[str]] = {}
    for record in records:
        if record["kind"] == "dry-run" and row(record)["step_seconds"]["median"] is not None:
            cluster = str(table_in(record["prediction"]).get("cluster"))[:60]
            names.setdefault(cluster, []).append(_name(record)[:60])
    note = "not run; step s, MFU and HFU are foretold for cluster"
    return [f"{', '.join(of_cluster)}: {note} {cluster}" for cluster, of_cluster in names.items()]


def _how_well_foretold(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of rows that were both foretold and measured: by how much the one is off the other, a cluster at a time."""
    errors: dict[tuple[str, bool], list[float]] = {}
    for record in records:
        if (of := foretold_of(record))["error"] is not None:
            errors.setdefault((str(of["cluster"])[:60], of["of_cpu"]), []).append(abs(of["error"]))
    return [
        f"foretold for cluster {cluster}: {'CPU seconds' if of_cpu else 'seconds'} of a step, off by"
        f" {100 * sum(each) / len(each):.1f} % in the mean of {len(each)} row{'s' * (len(each) > 1)},"
        f" at most {100 * max(each):.1f} %"
        for (cluster, of_cpu), each in errors.items()
    ]


def goodput_in_words(record: Mapping[str, Any]) -> str:
    """What a run's seconds were good for, where it saved itself or had more than one life; else ""."""
    measured, lives = picked(record, Record), record["checkpoint"]["lives"]
    seconds, n_lives = measured["goodput"], len(lives) if isinstance(lives, list) else 0
    if seconds["fraction"] is None or not (n_lives > 1 or measured["checkpoint"]["saves"]):
        return ""
    names = {"startup": "start-up", "parity": "parity", "save": "saves", "lost": "lost"}
    names |= {"between_lives": "between lives", "other": "other"}
    each = ((name, seconds[f"{key}_seconds"] or 0) for key, name in names.items())
    rest = [f"{name} {three_digits(value)} s" for name, value in each if value > 0]
    good = f"{100 * seconds['fraction']:.1f} % of {three_digits(seconds['total_seconds'] or 0)} s trained what counts"
    of_lives = f"in {n_lives} {'lives' if n_lives > 1 else 'life'}"
    return f"{_name(record)[:60]}: goodput: {good}, {of_lives}; {', '.join(rest)}"


def _noted_proofs(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is known to keep proofs from being exact, a note at a time."""
    names: dict[str, list[str]] = {}
    for record in records:
        if (note := record["parity"]["note"]) is not None:
            names.setdefault(str(note)[:LARGEST_REASON], []).append(_name(record)[:60])
    return [f"{', '.join(of_note)}: {note}" for note, of_note in names.items()]


def progress_line(record: Mapping[str, Any], *, width: int = WIDTH) -> str:
    """What came of one run, in short."""
    if record["status"] != "ok":
        return f"  {remark_on(record, width=width - 2)}"
    cells = _cells(record)
    step = f"loss {cells['loss']}, {cells['step_median']} s/step"
    return f"  ok: {step}, grad diff {cells['max_rel_grad_diff']}, parity {cells['parity']}"


def _name(record: Mapping[str, Any]) -> str:
    name: str = row(record)["name"]  # a folder's; any other comes from a file that no run of ours wrote
    return name if name.isascii() and name.isprintable() else ascii(name)


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    shown = row(record)
    parity = {True: "passed", False: "FAILED", None: "-"}[shown["passed"]]
    shown["name"], shown["step_median"] = _name(record), shown["step_seconds"]["median"]
    shown["parity"] = parity if shown["status"] == "ok" else shown["status"]  # the reason stands below the table
    return {key: _cell(key, shown[key], scale) for _, _, key, _, scale in (*COLUMNS, *FORETOLD_COLUMNS)}


def _cell(key: str, value: Any, scale: float) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if key in ("max_rel_grad_diff", "max_abs_loss_diff"):
        return f"{value:.1e}"
    if key == "foretold_error":
        return f"{scale * value:+.1f}"
    return f"{value:.4f}" if key == "loss" and abs(value) < 1e4 else three_digits(scale * value)


def three_digits(value: float) -> str:
    """Three significant digits, and every digit before the point."""
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}" if value else "0"
    decimals = next((n for n, limit in ((0, 100), (1, 10), (2, 1), (3, 0.1), (4, 0.01)) if abs(value) >= limit), 6)
    return f"{value:.{decimals}f}"


def _fit(cell: str, width: int, align: str) -> str:
    return f"{cell if len(cell) <= width else cell[: width - 1] + '…':{align}{width}}"


def remark_on(record: Mapping[str, Any], *, width: int = WIDTH) -> str:
    """Why a run is not as it should be, wrapped; "" where it is."""
    name = _name(record)[:60]
    if record["status"] != "ok":
        reason, *log = str(record["reason"] or "no reason given")[:LARGEST_REASON].splitlines()
        first = _wrapped(f"{name}: {record['status']}: {reason}", width=width)
        return "\n".join([first, *(_wrapped(line, "    ", width=width) for line in log)])
    if record["parity"]["passed"] is False:
        wrong = "parity FAILED: its gradients are not those of one process"
    elif record["parity"]["trained_passed"] is False:
        wrong = "parity FAILED in its own precision: the kernels that train are not those of the proof"
    else:
        return ""
    return _wrapped(f"{name}: {wrong}", width=width)


def _wrapped(text: str, indent: str = "", *, width: int) -> str:
    return textwrap.fill(
        printable(text), width, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )


def _compared(records: Sequence[Mapping[str, Any]]) -> str:
    """On what, with what: the hardware, batch, sequence and precision that every printed number belongs to."""

    def each(section: str, key: str) -> str:
        values = (table_in(part.get(section)).get(key) for part in parts)
        found = list(dict.fromkeys(str(value)[:80] for value in values if value is not None))
        return " / ".join(found[:4]) + (" / ..." if len(found) > 4 else "") if found else "?"

    parts = [record["recipe"] | {key: record[key] for key in ("environment", "parity")} for record in records]
    matmul, engines = each("environment", "float32_matmul"), each("environment", "engine")
    engine = "" if engines in ("?", "native") else f" Engines: {engines}."
    products = "" if matmul == "?" else f", float32 products {matmul}"
    return (
        f"Model {each('model', 'preset')} ({each('model', 'n_layers')} layers, d_model {each('model', 'd_model')}),"
        f" {each('train', 'dtype')}, global batch {each('train', 'global_batch')} sequences of"
        f" {each('train', 'seq_len')} tokens, {each('train', 'steps')} steps, on {each('environment', 'device')}"
        f" (host: {each('environment', 'cores')} cores of {each('environment', 'cpu')}),"
        f" torch {each('environment', 'torch')}{products}. Parity against {each('parity', 'reference')}.{engine}"
    )
