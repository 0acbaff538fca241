"""Predicts published training runs from their configurations alone, and says how far off that is, source by source.

    python benchmarks/published.py RUNS.csv                            # every row, with the constants as they are
    python benchmarks/published.py RUNS.csv --calibrate-on 3           # after three runs of each source
    python benchmarks/published.py RUNS.csv --predictions FILE.csv     # row by row, too

RUNS.csv has a column for each thing a row may say (COLUMNS below; a missing or empty one is unknown) and what was
measured: measured_step_s, measured_tokens_per_s_per_gpu, measured_tflops_per_gpu, measured_mfu or measured_hfu. What a
row leaves open widens the interval of its prediction; where nothing can be said without it, the row is refused, with
the reason. docs/foresight.md has the results.
"""

import argparse
import csv
import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parallel.foresight.clusters import PROFILES, Cluster, Software, load_cluster
from parallel.foresight.constants import CONSTANTS
from parallel.foresight.price import Rates, price
from parallel.foresight.uncertainty import NINETY, Array, corrected, covariance, sensitivities
from parallel.foresight.workload import Workload, stacked
from parallel.recipe import RecipeError

COLUMNS = (
    *("id", "source", "hardware", "gpus_per_node", "interconnect", "n_gpus", "n_params_b", "n_layers", "d_model"),
    *("n_heads", "n_kv_heads", "d_ff", "mlp_kind", "vocab", "seq_len", "moe", "dp_kind", "tp", "sp", "pp", "vpp"),
    *("pp_schedule", "cp", "cp_kind", "micro_batch", "grad_accum", "global_batch", "recompute", "attention"),
    *("precision", "compile"),
)
# What a row's hardware is called -> cluster of the catalogue, the longest name first.
HARDWARE = (
    *(("GB300", "gb200"), ("GB200", "gb200"), ("B300", "b300"), ("B200", "b200"), ("GH200", "h200"), ("H200", "h200")),
    *(("H100", "h100"), ("H800", "h100"), ("A100", "a100"), ("A800", "a100"), ("V100", "v100")),
    *(("MI355", "mi355x"), ("MI325", "mi325x"), ("MI300", "mi300x")),
)
TDP_WATTS = {"h100": 700, "h200": 700, "a100": 400, "b200": 1000}  # of those above; a row may state a lower limit
DEFAULT_VOCABULARY = 51200  # of GPT-2's tokens, padded; a row that does not say is nearly always of these

# What an unknown of each kind adds to the standard deviation of log seconds: set by hand, by how much choices differ.
DOUBTS = {
    "layout": 0.15,
    "micro_batch": 0.08,
    "recompute": 0.10,
    "attention": 0.06,
    "global_batch": 0.05,
    "shape": 0.05,
    "precision": 0.25,
    "power": 0.08,
    "limited power": 0.4,
    "offload": 0.3,
    "schedule": 0.05,
}


class Refused(ValueError):
    """A row that says too little, or of hardware about which nothing is known; its text is the reason."""


@dataclass
class Run:
    """One row: what is to be predicted, and what was measured, if it says."""

    id: str
    source: str
    workload: Workload
    rates: Rates
    cluster: str
    generation: str
    doubts: list[str] = field(default_factory=list)
    measured_seconds: float | None = None
    model_flops: float = 0.0  # of a step, attention in full: for the constant MFU beside it
    peak_flops: float | None = None


def number(row: Mapping[str, str], key: str) -> float | None:
    """The number with which a cell begins; None where there is none, or none above 0."""
    match = re.match(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)", row.get(key) or "")
    value = float(match[1]) if match else 0.0
    return value if 0 < value < 1e15 else None


def run_of(row: Mapping[str, str]) -> Run:
    """Raises Refused."""
    try:
        return _run_of(row)
    except RecipeError as error:  # a figure that no cluster can have
        raise Refused(str(error)) from None


def _run_of(row: Mapping[str, str]) -> Run:
    doubts: list[str] = []

    def known(key: str, doubt: str, default: float) -> float:
        value = number(row, key)
        if value is None:
            doubts.append(doubt)
            return default
        return value

    said = {key: (row.get(key) or "").lower() for key in row}
    if said.get("moe", "no") not in ("", "no"):
        raise Refused("experts are not modelled")
    cluster = _cluster(row, doubts)
    layers, width, seq_len, n_gpus = (number(row, key) for key in ("n_layers", "d_model", "seq_len", "n_gpus"))
    if n_gpus is None and (parts := [number(row, key) for key in ("dp", "tp", "pp")]) and all(parts):
        n_gpus = math.prod(part or 1 for part in parts) * (number(row, "cp") or 1)
    for key, value in (("n_layers", layers), ("d_model", width), ("seq_len", seq_len), ("n_gpus", n_gpus)):
        if value is None:
            raise Refused(f"{key} is not given")
    assert layers and width and seq_len and n_gpus
    heads = number(row, "n_heads") or max(1.0, width // 128)
    kv_heads = number(row, "n_kv_heads") or heads
    vocabulary = number(row, "vocab") or DEFAULT_VOCABULARY
    gated = said.get("mlp_kind", "").startswith(("swiglu", "geglu", "llama"))
    d_ff = number(row, "d_ff")
    if d_ff is None:
        parameters, attention = number(row, "n_params_b"), 2 * (1 + kv_heads / heads) * width**2
        d_ff = 4 * width
        if parameters is not None:
            d_ff = max(width, (parameters * 1e9 - 2 * vocabulary * width) / layers - attention) / (2 * width)
            gated = False  # as many elements, in two matrices
        doubts.append("shape")

    block = 2 * (1 + kv_heads / heads) * width**2 + (3 if gated else 2) * width * d_ff

    # ---- layout ----
    tp, pp, cp = number(row, "tp"), number(row, "pp"), number(row, "cp") or 1.0
    if tp is None and pp is None and n_gpus > 1:
        tp, pp = _plausible_layout(layers * (4 + 8 * 1) * width**2, n_gpus, cluster)
        doubts.append("layout")
    tp, pp = tp or 1.0, pp or 1.0
    dp = n_gpus / (tp * pp * cp)
    if dp < 1:
        raise Refused(f"{n_gpus:g} GPUs are fewer than tp {tp:g} x pp {pp:g} x cp {cp:g}")
    global_batch, micro_batch, steps = (number(row, key) for key in ("global_batch", "micro_batch", "grad_accum"))
    if micro_batch is None and global_batch is not None and steps is not None:
        micro_batch = max(1.0, global_batch / dp / steps)
    if micro_batch is None:
        tokens = 16384 if cluster.memory_gib > 100 or said.get("recompute") == "full" else 8192
        micro_batch = min(max(1.0, tokens // seq_len if pp == 1 else 1.0), max(1.0, (global_batch or 1e9) / dp))
        doubts.append("micro_batch")
    if global_batch is None and steps is None:
        steps = 8.0 * pp if pp > 1 else 1.0
        doubts.append("global_batch")
    m = max(1.0, (global_batch or 0) / (dp * micro_batch)) if global_batch else steps or 1.0
    if global_batch and global_batch / dp < micro_batch:
        micro_batch = global_batch / dp

    schedule, chunks = said.get("pp_schedule", ""), number(row, "vpp") or 1.0
    bubble = 1.0
    if pp > 1:
        if schedule.startswith("zb-1p") or schedule == "zb-h1":
            bubble = 1 / 3
        elif schedule.startswith(("zb-2p", "zb-h2", "zbv", "zb-v", "dualpipe")):
            bubble = 0.05
        elif "interleaved" in schedule or chunks > 1:
            chunks = chunks if chunks > 1 else 2.0
            bubble = 1 / chunks
        elif not schedule.startswith(("1f1b", "gpipe")):
            doubts.append("schedule")

    # ---- what is kept, sent and computed again ----
    kind = said.get("dp_kind", "")
    sharded = any(word in kind for word in ("zero", "fsdp", "hsdp"))
    gathers = any(word in kind for word in ("zero3", "fsdp", "hsdp"))
    if "offload" in kind:
        doubts.append("offload")
    replicas = 1.0
    if "hsdp" in kind and dp > cluster.ranks_per_node:
        replicas = dp / cluster.ranks_per_node
    precision = said.get("precision", "")
    if precision == "nvfp4" or "fp4" in precision:
        raise Refused("4-bit products are not modelled")
    if not precision:
        doubts.append("precision")
    fp8 = "fp8" in precision or "float8" in precision
    attention = said.get("attention", "")
    flash = 0.0 if "standard" in attention or "unfused" in attention else 1.0
    if "unknown" in attention or not attention:
        doubts.append("attention")
        flash = 0.5 if cluster.device.generation == "ampere" else 1.0
    kept = 34 * micro_batch * seq_len * width * layers / (tp * cp)  # bytes, without recompute, in a pipeline too
    fits = kept < 0.6 * cluster.memory_gib * 2**30
    again = _recompute(said.get("recompute", ""), flash=flash > 0, fits=fits, doubts=doubts)

    xla = "xla" in said.get("compile", "") or any(
        word in said.get("source", "") for word in ("maxtext", "jax", "pax ", "tpu")
    )
    megatron = any(word in said.get("source", "") for word in ("megatron", "nemo", "mlperf", "primus"))
    if xla:
        profile = "xla"
    elif not flash:
        profile = "megatron-2021"
    elif (
        megatron
        or "transformerengine" in said.get("compile", "").replace(" ", "")
        or (fp8 and not said.get("compile", "").startswith("yes"))
    ):
        profile = "megatron-core"
    else:
        profile = "torch"
    cluster = dataclasses.replace(cluster, software=Software(profile=profile, **PROFILES[profile]))
    rates = cluster.rates("float8" if fp8 else "bfloat16")
    if not precision and cluster.matmul_flops("float8"):
        flops = math.sqrt(rates.matmul_flops * cluster.rates("float8").matmul_flops)
        rates = dataclasses.replace(rates, matmul_flops=flops)

    workload = Workload(
        n_layers=layers,
        d_model=width,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=width / heads,
        d_ff=d_ff,
        n_mlp_matrices=3 if gated else 2,
        vocab_size=vocabulary,
        seq_len=seq_len,
        pp=pp,
        dp_replicate=replicas if sharded else dp,
        dp_shard=dp / replicas if sharded else 1.0,
        cp=cp,
        tp=tp,
        stages_per_rank=chunks if pp > 1 else 1.0,
        micro_batch=micro_batch,
        n_microbatches=m,
        sequence_parallel=int(said.get("sp", "") == "yes" or (not said.get("sp") and profile == "megatron-core")),
        # An output that costs more than a layer and a half is not put on top of as many layers as others have.
        even_stages=int(layers % (pp * chunks) == 0 and vocabulary * width < 1.5 * block),
        bubble=bubble,
        shards_state=int(sharded),
        # A pipeline gathers weights once, and reduces gradients once: each microbatch would be too much.
        forward_gathers=m if gathers and pp == 1 else int(sharded),
        backward_gathers=m if gathers and pp == 1 else 0,
        reduce_scatters=m if gathers and pp == 1 else int(sharded),
        all_reduces=int(replicas > 1 or (not sharded and dp * cp > 1)),
        gradient_bytes=2 if precision == "fp16" else 4,
        ring=int("a2a" not in said.get("cp_kind", "") and "ulysses" not in said.get("cp_kind", "")),
        all_to_all=int("a2a" in said.get("cp_kind", "") or "ulysses" in said.get("cp_kind", "")),
        again_products=again[0],
        again_attention=again[1],
        again_rest=again[2],
        fp8=int(fp8),
        flash=flash,
        compiled=int(said.get("compile", "").startswith("yes")),
    )
    run = Run(
        row.get("id", ""), row.get("source", ""), workload, rates, cluster.name, cluster.device.generation, doubts
    )
    run.model_flops = workload.model_flops_per_token * workload.tokens
    run.peak_flops = PEAKS.get(cluster.name) or cluster.peak("bfloat16").flops
    run.measured_seconds = measured_seconds(row, run, gated=gated)
    return run


PEAKS = {"v100": 125e12}  # in float16, which accelerators.toml does not have


def _cluster(row: Mapping[str, str], doubts: list[str]) -> Cluster:
    hardware = row.get("hardware") or ""
    name = next((cluster for word, cluster in HARDWARE if word in hardware.upper()), None)
    if name is None:
        raise Refused(f"nothing is known of hardware {hardware!r}")
    file = name if name != "a100" else "a100-40gb" if "40GB" in hardware.upper() else "a100-80gb"
    cluster = load_cluster(file)
    device, links = cluster.device, cluster.links
    if watts := re.search(r"([0-9]{3,4}) ?W\b", hardware):
        share = min(1.0, float(watts[1]) / TDP_WATTS.get(name, float(watts[1]))) ** 0.4
        device = dataclasses.replace(
            device, matmul_tflops=device.matmul_tflops * share, matmul_float8_tflops=device.matmul_float8_tflops * share
        )
        doubts.append("power")
    elif "power" in hardware.lower():
        doubts.append("limited power")
    if memory := re.search(r"([0-9.]{1,5}) ?TB/s", hardware):
        device = dataclasses.replace(device, memory_gb_per_s=float(memory[1]) * 1e3)
    node = number(row, "gpus_per_node")
    if (network := _network(row.get("interconnect") or "", node or cluster.ranks_per_node)) is not None:
        links = dataclasses.replace(links, across_gb_per_s=network)
    return dataclasses.replace(cluster, device=device, links=links, ranks_per_node=int(node or cluster.ranks_per_node))


def _network(text: str, ranks: float) -> float | None:
    """10^9 bytes/s of one rank's share of a node's network, where the words say it in Gb/s."""
    if match := re.search(r"([0-9]{1,2}) ?x (?:[A-Za-z0-9]+ ){0,2}?([0-9]{2,4}) ?Gb/s", text) or re.search(
        r"([0-9]{1,2})x([0-9]{2,4}) ?Gb/s", text
    ):
        return float(match[1]) * float(match[2]) / 8 / ranks
    if match := re.search(r"([0-9]{2,5}) ?Gb/s ?(?:/|per )(node|VM|GPU)", text):
        return float(match[1]) / 8 / (1 if match[2] == "GPU" else ranks)
    return None


def _plausible_layout(parameters: float, n_gpus: float, cluster: Cluster) -> tuple[float, float]:
    """The least tp, then pp, that leave room for 18 bytes a parameter in 60 % of the memory."""
    need = 18 * parameters / (0.6 * cluster.memory_gib * 2**30)
    tp = min(8.0, 2.0 ** max(0, math.ceil(math.log2(max(need, 1)))), n_gpus)
    pp = min(2.0 ** max(0, math.ceil(math.log2(max(need / tp, 1)))), max(1.0, n_gpus / tp))
    return tp, pp


def _recompute(said: str, *, flash: bool, fits: bool, doubts: list[str]) -> tuple[float, float, float]:
    """Of products, attention and the rest, as in Workload."""
    if said.startswith("none"):
        return 0.0, 0.0, 0.0
    if said.startswith("full"):
        return 1.0, 1.0, 1.0
    if said.startswith("selective"):
        if any(word in said for word in ("per-op", "layer", "2nd", "every")):
            return 0.4, 0.4, 0.5
        if any(word in said for word in ("minimal", "dot", "context")):
            return 0.0, 0.0, 0.7
        return (0.0, 0.0, 0.5) if flash else (0.0, 1.0, 0.0)
    if said.startswith("custom"):
        doubts.append("recompute")
        return 0.3, 0.3, 0.5
    doubts.append("recompute")
    return (0.05, 0.05, 0.1) if fits else (0.6, 0.6, 0.7)


def measured_seconds(row: Mapping[str, str], run: Run, *, gated: bool) -> float | None:
    """Of the run's step, as the workload counts it: by tokens/s, the step, or FLOPs as defined."""
    w = run.workload
    n_gpus = w.world_size
    if rate := number(row, "measured_tokens_per_s_per_gpu"):
        return w.tokens / (rate * n_gpus)
    if seconds := number(row, "measured_step_s"):
        return seconds
    flops, mfu, hfu = (number(row, f"measured_{key}") for key in ("tflops_per_gpu", "mfu", "hfu"))
    if not (flops or mfu or hfu):
        return None
    said = (row.get("tflops_definition") or "").lower()
    if said.startswith("unknown") and w.again_products:
        return None  # with what is computed again, or without?
    hardware = "hardware" in said or (not flops and not mfu)
    causal = "halved" in said and "not halved" not in said
    weights = w.n_layers * w.block_parameters + w.vocab_size * w.d_model
    if "n_all" in said or "n_total" in said or "all param" in said:
        weights += w.vocab_size * w.d_model
    blocks = 6 * w.n_layers * w.block_parameters + (6 if causal else 12) * w.n_layers * w.d_model * w.seq_len
    per_token = blocks + 6 * (weights - w.n_layers * w.block_parameters)
    if hardware:
        per_token += blocks / 3 * w.again_products
    rate = flops * 1e12 if flops else (mfu or hfu or 0) * (run.peak_flops or 0)
    return per_token * w.tokens / (rate * n_gpus) if rate else None


# ---- many runs -----------------------------------------------------------------------------------------------------


class Table:
    """Runs as arrays."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.workload = stacked([run.workload for run in runs])
        rates = {f.name: np.array([getattr(run.rates, f.name) for run in runs]) for f in dataclasses.fields(Rates)}
        self.rates = Rates(**rates)
        self.log_measured = np.log([run.measured_seconds or math.nan for run in runs])
        self.sources = np.array([run.source for run in runs])
        self.generations = np.array([run.generation for run in runs])

    def each(self, of: Mapping[tuple[str, str], float]) -> dict[str, Array]:
        """By constant, that of each run, given those by constant and generation."""
        chosen = {}
        for name, by in CONSTANTS.items():
            keys = ["all" if "all" in by else str(generation) for generation in self.generations]
            chosen[name] = np.array([of[name, key] for key in keys])
        return chosen

    def log_seconds(self, values: Mapping[str, Any]) -> Array:
        return np.log(sum(price(self.workload, self.rates, values).values()))

    def predicted(self) -> tuple[Array, Array]:
        """Log seconds with the constants as they are, and what they depend on (see uncertainty.sensitivities)."""
        values = self.each({(name, key): by[key].value for name, by in CONSTANTS.items() for key in by})
        spreads = self.each({(name, key): by[key].spread for name, by in CONSTANTS.items() for key in by})

        def scaled(factors: Mapping[str, float]) -> Array:
            return self.log_seconds({name: value * factors.get(name, 1.0) for name, value in values.items()})

        return scaled({}), sensitivities(scaled, spreads)


def read_rows(path: str) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        sys.exit(f"{path}: cannot be read ({error}); give a CSV file with a header")
    if not rows or "hardware" not in rows[0]:
        sys.exit(f"{path}: has no row, or no column called hardware; the columns are {', '.join(COLUMNS)}")
    return [{key: value for key, value in row.items() if key and isinstance(value, str)} for row in rows]


def read_runs(rows: Iterable[Mapping[str, str]]) -> tuple[list[Run], Counter[tuple[str, str]]]:
    """Those that can be predicted; and how many rows of each source were refused for each reason."""
    runs, refused = [], Counter[tuple[str, str]]()
    for row in rows:
        try:
            runs.append(run_of(row))
        except Refused as error:
            refused[row.get("source", ""), str(error)] += 1
    return runs, refused


@dataclass
class Score:
    source: str
    n: int
    mean_error: float
    median_error: float
    bias: float
    covered: float  # by the 90 % intervals
    constant_mfu_error: float  # of 40 % of the peak for every run
    oracle_error: float  # of the source's own median MFU


def scores(runs: Sequence[Run], n_calibrate: int) -> tuple[list[Score], list[tuple[Run, float, float, bool]]]:
    """By source; and of each run its predicted log seconds, their deviation, and whether it was calibrated on."""
    found, predictions = [], []
    for source in dict.fromkeys(run.source for run in runs):
        table = Table([run for run in runs if run.source == source])
        log_seconds, sensitive = table.predicted()
        covaries = covariance(sensitive, [{doubt: DOUBTS[doubt] for doubt in run.doubts} for run in table.runs])
        errors = table.log_measured - log_seconds  # nan where nothing was measured
        measured = np.flatnonzero(np.isfinite(errors))
        seen = (
            measured[np.linspace(0, len(measured) - 1, n_calibrate).astype(int)] if n_calibrate < len(measured) else []
        )
        mean, deviation = corrected(covaries, {int(i): float(errors[i]) for i in seen})
        log_seconds = log_seconds + mean
        predictions += [(run, log_seconds[i], deviation[i], i in seen) for i, run in enumerate(table.runs)]
        judged = np.setdiff1d(measured, seen)
        if not len(judged) or (n_calibrate and not len(seen)):
            continue
        ratio = np.exp(log_seconds - table.log_measured)[judged]
        inside = np.abs(np.log(ratio)) <= NINETY * deviation[judged]
        mfu = np.array(
            [
                run.model_flops / ((run.measured_seconds or 1) * run.workload.world_size * run.peak_flops)
                for run in (table.runs[i] for i in judged)
            ]
        )
        found.append(
            Score(
                source=source,
                n=len(judged),
                mean_error=np.abs(ratio - 1).mean(),
                median_error=float(np.median(np.abs(ratio - 1))),
                bias=math.expm1(np.log(ratio).mean()),
                covered=inside.mean(),
                constant_mfu_error=np.abs(mfu / 0.4 - 1).mean(),
                oracle_error=np.abs(mfu / np.median(mfu) - 1).mean(),
            )
        )
    return found, predictions


def in_words(found: Sequence[Score], *, markdown: bool = False) -> str:
    heads = ("source", "rows", "mean", "median", "bias", "in 90 %", "MFU 40 %", "own MFU")
    lines = []
    for score in found:
        numbers = [f"{score.n}", f"{100 * score.mean_error:.1f}", f"{100 * score.median_error:.1f}"]
        numbers += [f"{100 * score.bias:+.1f}", f"{100 * score.covered:.0f}"]
        numbers += [f"{100 * score.constant_mfu_error:.1f}", f"{100 * score.oracle_error:.1f}"]
        lines.append((score.source, *numbers))

    def mean(key: str) -> float:
        return 100 * float(np.mean([getattr(score, key) for score in found]))

    n = sum(score.n for score in found)
    last = (
        "mean of sources",
        f"{n}",
        f"{mean('mean_error'):.1f}",
        f"{mean('median_error'):.1f}",
        f"{mean('bias'):+.1f}",
    )
    lines.append((*last, f"{mean('covered'):.0f}", f"{mean('constant_mfu_error'):.1f}", f"{mean('oracle_error'):.1f}"))
    if markdown:
        rows = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
        return "\n".join([rows[0], "|---|" + "--:|" * (len(heads) - 1), *rows[1:]])
    width = max(len(line[0]) for line in lines)
    return "\n".join(line[0].ljust(width) + "".join(cell.rjust(9) for cell in line[1:]) for line in (heads, *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUNS.csv")
    how_many = "runs of each source that correct the others, as evenly spaced in the file as can be; default: 0"
    parser.add_argument("--calibrate-on", metavar="N", type=int, default=0, help=how_many)
    parser.add_argument("--predictions", metavar="FILE.csv", type=Path, help="each row's, written there")
    parser.add_argument("--markdown", action="store_true", help="the table as the docs have it")
    arguments = parser.parse_args()
    if not 0 <= arguments.calibrate_on <= 1000:
        sys.exit(f"--calibrate-on = {arguments.calibrate_on}: give how many runs of each source, as 3")
    runs, refused = read_runs(read_rows(arguments.runs))
    if not runs:
        sys.exit("no row could be predicted: " + "; ".join(sorted({reason for _, reason in refused})))
    found, predictions = scores(runs, arguments.calibrate_on)
    print("Errors of predicted step seconds, in %. in 90 %: measured ones within the 90 % interval.")
    print("MFU 40 %: what a constant MFU would be off by; own MFU: the source's own median, known afterwards.\n")
    print(in_words(found, markdown=arguments.markdown) if found else "no row has a measurement")
    for (source, reason), n in sorted(refused.items()):
        print(f"refused: {n} of {source or 'no source'}: {reason}")
    if arguments.predictions is not None:
        with arguments.predictions.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            names = ("low_step_s", "high_step_s", "measured_step_s", "calibrated_on", "unknown")
            writer.writerow(("id", "source", "predicted_step_s", *names))
            for run, log_seconds, deviation, seen in predictions:
                seconds = [math.exp(log_seconds + z * deviation) for z in (0, -NINETY, NINETY)]
                cells = [
                    f"{value:.6g}" for value in (*seconds, *([run.measured_seconds] if run.measured_seconds else []))
                ]
                cells += [""] * (4 - len(cells))
                writer.writerow((run.id, run.source, *cells, int(seen), " ".join(run.doubts)))


if __name__ == "__main__":
    main()
