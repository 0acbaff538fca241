"""The terminal's table: a row per record, at most 100 columns wide, and what was compared below it."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from launch.terminal import printable

WIDTH = 100
LARGEST_REASON = 2000  # characters
SHORT = {"pp": "pp", "dp_replicate": "dp", "dp_shard": "fsdp", "cp": "cp", "tp": "tp"}

# head (two lines), key of `row`, alignment
COLUMNS = (
    ("", "name", "name", "<"),
    ("", "layout", "layout", "<"),
    ("", "loss", "loss", ">"),
    ("step", "s", "step_median", ">"),
    ("CPU s", "/step", "cpu_seconds_per_step", ">"),
    ("MFU", "%", "mfu", ">"),
    ("causal", "%", "mfu_causal", ">"),
    ("HFU", "%", "hfu", ">"),
    ("peak", "MiB", "peak_bytes", ">"),
    ("grad", "diff", "max_rel_grad_diff", ">"),
    ("loss", "diff", "max_abs_loss_diff", ">"),
    ("", "parity", "parity", "<"),
)
LEGEND = (
    "layout: ranks of the pipeline (pp), replicas (dp), weight shards (fsdp), context (cp) and tensor (tp)."
    " loss: of the last step. step s: median wall time of a step, warm-up excluded. CPU s: of all ranks together."
    " MFU: the model's FLOPs over the peak (on a CPU the fastest matrix product measured there, shared by the ranks),"
    " attention counted in full; causal: by half; HFU: the FLOPs that ran."
    " peak: live tensors of the fullest rank."
    " grad diff: the largest ‖g − g_ref‖ / ‖g_ref‖ of any parameter in step 1; loss diff: |loss − loss_ref| there;"
    " both in float64. passed: grad diff is at most 1e-10."
)


def row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a record, as plain numbers; None where there is none. The record may be anyone's."""
    last = record["steps"][-1] if record["steps"] else {}
    throughput, parity = record["throughput"], record["parity"]
    return {
        "name": str(record["recipe"].get("name"))[:200],
        "status": record["status"],
        "reason": record["reason"],
        "kind": record["kind"],
        "world_size": number_in(record["layout"]["world_size"]),
        "layout": short_layout(record["layout"]),
        "loss": number_in(last.get("loss")),
        "grad_norm": number_in(last.get("grad_norm")),
        "step_seconds": {key: number_in(throughput["step_seconds"][key]) for key in ("median", "p10", "p90")},
        "tokens_per_s": number_in(throughput["tokens_per_s"]),
        "cpu_seconds_per_step": number_in(throughput["cpu_seconds_per_step"]),
        **{key: number_in(record["flops"][key]) for key in ("mfu", "mfu_causal", "hfu")},
        "peak_bytes": number_in(record["memory"]["max_peak_bytes"]),
        "max_rel_grad_diff": number_in(parity["max_rel_grad_diff"]),
        "max_abs_loss_diff": number_in(parity["max_abs_loss_diff"]),
        "passed": parity["passed"] if isinstance(parity["passed"], bool) else None,
    }


def short_layout(layout: Mapping[str, Any]) -> str | None:
    """As "pp2·fsdp2·tp2": the mesh dimensions of more than one rank."""
    if not number_in(layout.get("world_size")):
        return None
    sizes = {short: number_in(layout.get(key)) for key, short in SHORT.items()}
    return "·".join(f"{short}{size:.0f}" for short, size in sizes.items() if size and size > 1) or "1 rank"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The whole text: head, rows, reasons of those that did not end well, and what was compared."""
    cells = [[top for top, *_ in COLUMNS], [bottom for _, bottom, *_ in COLUMNS]]
    cells += [_cells(row(record)) for record in records]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else 1
    for column in (0, 1):  # a long name gives way first, then a long layout
        too_wide = sum(widths) + gap * (len(widths) - 1) - WIDTH
        widths[column] -= max(0, min(too_wide, widths[column] - 10))
    lines = []
    for line in cells:
        fitted = (_fit(cell, width, align) for cell, width, (*_, align) in zip(line, widths, COLUMNS, strict=True))
        lines.append((" " * gap).join(fitted).rstrip())
    lines.insert(2, "-" * (sum(widths) + gap * (len(widths) - 1)))
    below = [text for record in records if (text := remark_on(record))] + _without_peak(records)
    return "\n".join([*lines, "", *below, *([""] if below else []), _wrapped(_compared(records)), _wrapped(LEGEND)])


def _without_peak(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows that were timed have no MFU, a reason at a time."""
    names: dict[str, list[str]] = {}
    for record in records:
        shown, flops = row(record), record["flops"]
        if shown["mfu"] is None and shown["step_seconds"]["median"] is not None and flops["peak_flops"] is None:
            names.setdefault(str(flops["peak_source"])[:LARGEST_REASON], []).append(_cell("name", shown["name"])[:60])
    return [_wrapped(f"{', '.join(of_reason)}: no MFU: {reason}") for reason, of_reason in names.items()]


def progress_line(record: Mapping[str, Any]) -> str:
    """What came of one run, in short."""
    shown = row(record)
    if record["status"] != "ok":
        return f"  {remark_on(record)}"
    cells = dict(zip((key for _, _, key, _ in COLUMNS), _cells(shown), strict=True))
    parts = [f"loss {cells['loss']}", f"{cells['step_median']} s/step", f"grad diff {cells['max_rel_grad_diff']}"]
    return f"  ok: {', '.join(parts)}, parity {cells['parity']}"


def _cells(shown: Mapping[str, Any]) -> list[str]:
    step = shown["step_seconds"]
    parity = {True: "passed", False: "FAILED", None: "-"}[shown["passed"]]
    extra = {
        "step_median": step["median"],
        "parity": parity if shown["status"] == "ok" else shown["status"],  # the reason stands below the table
        **{key: None if shown[key] is None else 100 * shown[key] for key in ("mfu", "mfu_causal", "hfu")},
        "peak_bytes": None if shown["peak_bytes"] is None else shown["peak_bytes"] / 2**20,
    }
    return [_cell(key, {**shown, **extra}[key]) for _, _, key, _ in COLUMNS]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        # A name is a folder's; any other comes from a file that no run of ours wrote.
        return value if key != "name" or re.fullmatch(r"[ -~]*", value) else ascii(value)
    if key in ("max_rel_grad_diff", "max_abs_loss_diff"):
        return f"{value:.1e}"
    return f"{value:.4f}" if key == "loss" and abs(value) < 1e4 else three_digits(value)


def three_digits(value: float) -> str:
    """Three significant digits, and every digit before the point."""
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}" if value else "0"
    decimals = next((n for n, limit in ((0, 100), (1, 10), (2, 1), (3, 0.1), (4, 0.01)) if abs(value) >= limit), 6)
    return f"{value:.{decimals}f}"


def number_in(value: Any) -> float | None:
    """`value` where it is a number that can be shown; records may come from anywhere."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def _fit(cell: str, width: int, align: str) -> str:
    return f"{cell if len(cell) <= width else cell[: width - 1] + '…':{align}{width}}"


def remark_on(record: Mapping[str, Any]) -> str:
    """Why a run is not as it should be, wrapped; "" where it is."""
    shown = row(record)
    name = _cell("name", shown["name"])[:60]
    if shown["status"] != "ok":
        reason, *log = str(shown["reason"] or "no reason given")[:LARGEST_REASON].splitlines()
        return "\n".join([_wrapped(f"{name}: {shown['status']}: {reason}"), *(_wrapped(line, "    ") for line in log)])
    if shown["passed"] is False:
        return _wrapped(f"{name}: parity FAILED: its gradients are not those of one process")
    return ""


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        printable(text), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )


def _compared(records: Sequence[Mapping[str, Any]]) -> str:
    """On what, with what: the hardware, batch, sequence and precision that every printed number belongs to."""

    def each(section: str, key: str) -> str:
        tables = [table if isinstance(table := part.get(section), dict) else {} for part in parts]
        found = list(dict.fromkeys(str(table[key])[:80] for table in tables if table.get(key) is not None))
        return " / ".join(found[:4]) + (" / ..." if len(found) > 4 else "") if found else "?"

    parts = [record["recipe"] | {key: record[key] for key in ("environment", "parity")} for record in records]
    return (
        f"Model {each('model', 'preset')} ({each('model', 'n_layers')} layers, d_model {each('model', 'd_model')}),"
        f" {each('train', 'dtype')}, global batch {each('train', 'global_batch')} sequences of"
        f" {each('train', 'seq_len')} tokens, {each('train', 'steps')} steps, on {each('environment', 'device')}"
        f" (host: {each('environment', 'cores')} cores of {each('environment', 'cpu')}),"
        f" torch {each('environment', 'torch')}. Parity against {each('parity', 'reference')}."
    )
