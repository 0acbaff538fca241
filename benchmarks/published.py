"""Predicts published training runs from their configurations alone, and says how far off that is, source by source.

    python benchmarks/published.py RUNS.csv                            # every row, with the constants as they are
    python benchmarks/published.py RUNS.csv --calibrate-on 3           # after three runs of each source
    python benchmarks/published.py RUNS.csv --unnamed                  # as if nothing were known of their programs
    python benchmarks/published.py RUNS.csv --predictions FILE.csv     # row by row, too
    python benchmarks/published.py RUNS.csv --failed FAILED.csv        # and how many of those did not fit

Where rows of a source differ in their layout alone, it also prints what foresight's choice among them would have cost.

RUNS.csv has a column for each thing a row may say (COLUMNS below; a missing or empty one is unknown) and what was
measured: measured_step_s, measured_tokens_per_s_per_gpu, measured_tflops_per_gpu, measured_mfu or measured_hfu; and
measured_mem_gib, of the fullest GPU. What a row leaves open widens the interval of its prediction; where nothing can be
said without it, the row is refused, with the reason. docs/foresight.md has the results.
"""

import argparse
import csv
import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel.foresight.clusters import PROFILES, Cluster, Software, load_cluster
from parallel.foresight.constants import CONSTANTS
from parallel.foresight.memory import LAB, Keeping, peak_bytes
from parallel.foresight.plan import ROOM
from parallel.foresight.price import Rates, price
from parallel.foresight.uncertainty import NINETY, Array, corrected, covariance, sensitivities
from parallel.foresight.workload import Workload, bubble, in_flight, stacked
from parallel.recipe import RecipeError

COLUMNS = (
    *("id", "source", "hardware", "gpus_per_node", "interconnect", "n_gpus", "n_params_b", "n_layers", "d_model"),
    *("n_heads", "n_kv_heads", "d_ff", "mlp_kind", "vocab", "seq_len", "moe", "dp_kind", "tp", "sp", "pp", "vpp"),
    *("pp_schedule", "cp", "cp_kind", "micro_batch", "grad_accum", "global_batch", "recompute", "attention"),
    *("precision", "compile", "notes"),
    "public_cfg_fields",  # which of these are not the row's own, but taken from a public configuration
)
# What a row's hardware is called -> cluster of the catalogue, the longest name first.
HARDWARE = (
    *(("GB300", "gb200"), ("GB200", "gb200"), ("B300", "b300"), ("B200", "b200"), ("GH200", "h200"), ("H200", "h200")),
    *(("H100", "h100"), ("H800", "h100"), ("A100", "a100"), ("A800", "a100"), ("V100", "v100")),
    *(("MI355", "mi355x"), ("MI325", "mi325x"), ("MI300", "mi300x")),
)
TDP_WATTS = {"h100": 700, "h200": 700, "a100": 400, "b200": 1000}  # of those above; a row may state a lower limit
# Ways in which some of these are built: of an H100's or A100's best product, and 10^9 bytes/s in a node.
PCIE_SHARE, PCIE_GB_PER_S = 0.8, 25.0
SXM3_SHARE = (350 / 300) ** 0.4  # V100s of 350 W, where those of the catalogue have 300
SLOWER_LINKS = {"H800": 180.0, "A800": 140.0}
EFA_HOP_US = 40.0  # by all-reduces of next to nothing on 2 and 4 nodes: 130 and 418 us (nccl-tests of p5 and p6)
DEFAULT_VOCABULARY = 51200  # of GPT-2's tokens, padded; a row that does not say is nearly always of these

# Programs that sum gradients as they come, in bfloat16: InternEvo's and Colossal-AI's ZeRO by their code, NeMo by its
# configurations' grad_sync_dtype.
GRADIENTS_IN_16_BITS = ("internevo", "colossal", "mlperf", "nemo")

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

# Programs that train 16-bit weights, as Megatron and nanotron do: gradients in float32 and a float32 copy of the
# weights, of which only the optimizer's part is sharded. Bytes of a parameter and of a score are theirs
# (arXiv:2205.05198, 4.1); residual, logits and base are of the nanotron runs of one model: docs/foresight.md.
MIXED = Keeping(
    weight=2,
    gradient=4,
    optimizer=12,
    shards_weights=False,
    holds_gradients=True,
    residual=11,
    in_float32=0,
    gathers_again=True,
    score=5,
    logit=5.5,
    earlier_logit=5.6,
    base_gib=0.4,
)


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
    program: tuple[str, ...]  # and its machine, as far as the row says: what `lab plan` leaves as it is
    doubts: list[str] = field(default_factory=list)
    measured_seconds: float | None = None
    keeping: Keeping = MIXED
    may_split_tokens: bool = False  # over tp: the row does not say
    memory_gib: float = 0.0  # of one accelerator
    measured_gib: float | None = None
    model_flops: float = 0.0  # of a step, attention in full: for the constant MFU beside it
    peak_flops: float | None = None


def number(row: Mapping[str, str], key: str) -> float | None:
    """The number with which a cell begins; None where there is none, or none above 0."""
    match = re.match(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)", row.get(key) or "")
    value = float(match[1]) if match else 0.0
    return value if 0 < value < 1e15 else None


def run_of(row: Mapping[str, str]) -> Run:
    """Raises Refused."""
    said = {key: (row.get(key) or "").strip().lower() for key in COLUMNS}
    doubts: list[str] = []
    if said["moe"] not in ("", "no", "none", "false", "0"):
        raise Refused("experts are not modelled")
    try:
        cluster = _cluster(row, doubts)
        shape = _shape(row, said, doubts)
        layout = _layout(row, said, shape, cluster, doubts)
        how = _kernels(said, shape, layout, cluster, doubts)
        if "recompute" in said["public_cfg_fields"] and "recompute" not in doubts:
            doubts.append("recompute")
        cluster = dataclasses.replace(cluster, software=_software(said, flash=how["flash"]))
        rates = _rates(said, cluster, doubts)
        if _gathers(said) and _any_of(said["source"] + said["notes"], "deepspeed"):
            # Its ZeRO-3 gathers again for what it computes again; and of parameters one at a time, at half the rate
            # of whole blocks: by both sources that have it.
            rates = replace(rates, gather_bytes=2.0, scatter_bytes=2.0)
            layout["backward_gathers"] *= 1 + how["again_products"]
    except RecipeError as error:  # a figure that no cluster can have
        raise Refused(str(error)) from None
    if said["sp"] == "" and cluster.software.profile in ("megatron-core", "nanotron"):  # their default
        layout["sequence_parallel"] = 1
    work = Workload(**shape, **layout, **how)
    generation = cluster.device.generation
    ways = [word for word in ("rowwise", "asynctp") if word in said["notes"]]
    program = (*(said[key] for key in ("hardware", "interconnect", "attention", "precision", "compile")), *ways)
    run = Run(row.get("id", ""), row.get("source", ""), work, rates, cluster.name, generation, program, doubts)
    run.model_flops = work.model_flops_per_token * work.tokens
    run.peak_flops = PEAKS.get(cluster.name) or cluster.peak("bfloat16").flops
    run.measured_seconds = measured_seconds(row, run)
    run.keeping = LAB if _gathers(said) else MIXED  # torch's FSDP shards float32 weights, as the lab does
    run.may_split_tokens = said["sp"] == ""
    run.memory_gib, run.measured_gib = cluster.memory_gib, number(row, "measured_mem_gib")
    return run


def _gathers(said: Mapping[str, str]) -> bool:
    """Weights are fetched before each use."""
    return _any_of(re.sub(r"[ _-]", "", said["dp_kind"]), "zero3", "fsdp", "hsdp", "fullysharded")


def _shape(row: Mapping[str, str], said: Mapping[str, str], doubts: list[str]) -> dict[str, float]:
    layers, width, seq_len = (number(row, key) for key in ("n_layers", "d_model", "seq_len"))
    for key, value in (("n_layers", layers), ("d_model", width), ("seq_len", seq_len)):
        if value is None:
            raise Refused(f"{key} is not given")
    assert layers and width and seq_len
    heads = number(row, "n_heads") or max(1.0, width // 128)
    kv_heads = number(row, "n_kv_heads") or heads
    vocabulary = number(row, "vocab") or DEFAULT_VOCABULARY
    gated = _any_of(said["mlp_kind"], "swiglu", "geglu", "silu", "gated", "llama")
    d_ff = number(row, "d_ff")
    if d_ff is None:  # as many elements as the rest of the parameters, in two matrices
        doubts.append("shape")
        d_ff, gated = 4 * width, False
        if parameters := number(row, "n_params_b"):
            of_mlp = (parameters * 1e9 - 2 * vocabulary * width) / layers - 2 * (1 + kv_heads / heads) * width**2
            d_ff = max(width, of_mlp / (2 * width))
    return {
        "n_layers": layers,
        "d_model": width,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": width / heads,
        "d_ff": d_ff,
        "n_mlp_matrices": 3 if gated else 2,
        "vocab_size": vocabulary,
        "seq_len": seq_len,
    }


def _layout(
    row: Mapping[str, str], said: Mapping[str, str], shape: Mapping[str, float], cluster: Cluster, doubts: list[str]
) -> dict[str, float]:
    tp, pp, cp, n_gpus = number(row, "tp"), number(row, "pp"), number(row, "cp") or 1.0, number(row, "n_gpus")
    block = 2 * (1 + shape["n_kv_heads"] / shape["n_heads"]) * shape["d_model"] ** 2
    block += shape["n_mlp_matrices"] * shape["d_model"] * shape["d_ff"]
    if n_gpus is None:
        parts = [number(row, key) for key in ("dp", "tp", "pp")]
        if None in parts:
            raise Refused("n_gpus is not given")
        n_gpus = math.prod(part or 1 for part in parts) * cp
    if tp is None and pp is None and n_gpus > 1:
        tp, pp = _plausible_layout(shape["n_layers"] * block, n_gpus, cluster)
        doubts.append("layout")
    tp, pp = tp or 1.0, pp or 1.0
    dp = n_gpus / (tp * pp * cp)
    if dp < 1:
        raise Refused(f"{n_gpus:g} GPUs are fewer than tp {tp:g} x pp {pp:g} x cp {cp:g}")

    global_batch, micro_batch, steps = (number(row, key) for key in ("global_batch", "micro_batch", "grad_accum"))
    if micro_batch is None and global_batch is not None and steps is not None:
        micro_batch = max(1.0, global_batch / dp / steps)
    if micro_batch is None and global_batch is not None and pp > 1 and "torchtitan" in said["source"]:
        # "The default value will be the number of pipeline stages", its configuration said until 2025.
        chunks = number(row, "vpp") or (2.0 if "interleaved" in said["pp_schedule"] else 1.0)
        micro_batch = max(1.0, global_batch / (dp * pp * chunks))
        doubts.append("micro_batch")
    if micro_batch is None:
        tokens = 16384 if cluster.memory_gib > 100 or said["recompute"] == "full" else 8192
        micro_batch = min(
            max(1.0, tokens // shape["seq_len"] if pp == 1 else 1.0), max(1.0, (global_batch or 1e9) / dp)
        )
        doubts.append("micro_batch")
    if global_batch is None and steps is None:
        steps = 8.0 * pp if pp > 1 else 1.0
        doubts.append("global_batch")
    if global_batch is not None:
        micro_batch = min(micro_batch, global_batch / dp)
    m = max(1.0, global_batch / (dp * micro_batch)) if global_batch else steps or 1.0

    kind = re.sub(r"[ _-]", "", said["dp_kind"])
    gathers = _gathers(said)
    sharded = gathers or _any_of(kind, "zero", "distributedoptimizer")
    if "offload" in kind:
        doubts.append("offload")
    replicas = max(1.0, dp / cluster.ranks_per_node) if "hsdp" in kind else 1.0
    chunks, idle, flies = _pipeline(row, said, pp=pp, m=m, doubts=doubts) if pp > 1 else (1.0, 1.0, 1.0)
    in_16_bits = said["precision"] in ("fp16", "float16") or _any_of(said["source"], *GRADIENTS_IN_16_BITS)
    each = gathers and pp == 1  # a pipeline gathers weights once, and reduces gradients once
    return {
        "pp": pp,
        "dp_replicate": replicas if sharded else dp,
        "dp_shard": dp / replicas if sharded else 1.0,
        "cp": cp,
        "tp": tp,
        "stages_per_rank": chunks,
        "micro_batch": micro_batch,
        "n_microbatches": m,
        "sequence_parallel": int(said["sp"] in TRUE),
        # An output that costs more than a layer and a half is not put on top of as many layers as others have.
        "even_stages": int(
            shape["n_layers"] % (pp * chunks) == 0
            and (not _any_of(said["source"], "nanotron") or shape["vocab_size"] * shape["d_model"] < 1.5 * block)
        ),
        "bubble": idle,
        "in_flight": flies,
        "shards_state": int(sharded),
        "forward_gathers": m if each else int(sharded),
        "backward_gathers": m if each else 0,
        "reduce_scatters": m if each else int(sharded),
        "all_reduces": int(replicas > 1 or (not sharded and dp * cp > 1)),
        "overlaps_data": int(gathers or not sharded or not _any_of(said["source"], "nanotron")),  # ZeRO-1 after a step
        "gradient_bytes": 2 if in_16_bits else 4,
        "weight_bytes": 1 if gathers and _travels_in_8_bits(said) else 2,
        "ring": int(not _any_of(said["cp_kind"], "a2a", "ulysses", "all-to-all")),
        "all_to_all": int(_any_of(said["cp_kind"], "a2a", "ulysses", "all-to-all")),
    }


def _travels_in_8_bits(said: Mapping[str, str]) -> bool:
    """Weights that torch's FSDP gathers, where products take them in 8 bits; not those that are scaled by rows."""
    return (
        "torchtitan" in said["source"]
        and _any_of(said["precision"], "fp8", "float8")
        and not _any_of(said["notes"], "rowwise")
    )


def _pipeline(
    row: Mapping[str, str], said: Mapping[str, str], *, pp: float, m: float, doubts: list[str]
) -> tuple[float, float, float]:
    """Stages a rank; the bubble, and microbatches in flight on the first rank, as Workload has them."""
    schedule, chunks = said["pp_schedule"].replace("zero bubble", "zb"), number(row, "vpp") or 1.0
    if schedule.startswith(("zb-1p", "zb-h1")):
        return chunks, 1 / 3, pp
    if schedule.startswith(("zb", "dualpipe")):
        return chunks, 0.05, 2 * pp if schedule.startswith("zb-2p") else pp  # arXiv:2401.10241, table 2
    if "interleaved" in schedule or chunks > 1:
        chunks = chunks if chunks > 1 else 2.0
        of = dict(pp=pp, stages_per_rank=chunks, m=m)
        return chunks, float(bubble("interleaved-1f1b", **of)), float(in_flight("interleaved-1f1b", **of))
    if not schedule.startswith(("1f1b", "gpipe")):
        doubts.append("schedule")
    return 1.0, 1.0, m if schedule.startswith("gpipe") else pp


def _kernels(
    said: Mapping[str, str],
    shape: Mapping[str, float],
    layout: Mapping[str, float],
    cluster: Cluster,
    doubts: list[str],
) -> dict[str, float]:
    attention = said["attention"]
    flash = 0.0 if _any_of(attention, "standard", "unfused", "eager") else 1.0
    if attention == "" or "unknown" in attention:
        doubts.append("attention")
        flash = 0.5 if cluster.device.generation == "ampere" else 1.0
    kept = 34 * layout["micro_batch"] * shape["seq_len"] * shape["d_model"] * shape["n_layers"]  # bytes, kept whole
    fits = kept / (layout["tp"] * layout["cp"]) < 0.6 * cluster.memory_gib * 2**30
    how = dict(flash=flash > 0, fits=fits, per_op=_gathers(said), doubts=doubts)
    products, of_attention, rest = _recompute(said["recompute"], **how)
    return {
        "flash": flash,
        "again_products": products,
        "again_attention": of_attention,
        "again_rest": rest,
        "recomputes": rest,
        "saves_products": 1 - products / rest if rest > 0 and of_attention == 0 else 0,
        "saves_attention": int(rest > 0 and of_attention == 0),
        "fp8": int(_any_of(said["precision"], "fp8", "float8")),
        "compiled": int(said["compile"].startswith(("yes", "true", "torch.compile", "inductor"))),
    }


def _recompute(said: str, *, flash: bool, fits: bool, per_op: bool, doubts: list[str]) -> tuple[float, float, float]:
    """Of products, attention and the rest, as in Workload. per_op: `selective` is by operators, as with FSDP."""
    if said.startswith("none") or said in ("no", "off", "false"):
        return 0.0, 0.0, 0.0
    if said.startswith("full") or said in TRUE:
        return 1.0, 1.0, 1.0
    if said.startswith("selective"):
        if _any_of(said, "minimal", "dot", "context"):
            return 0.0, 0.0, 0.7
        if _any_of(said, "layer", "2nd", "every"):
            return 0.5, 0.5, 0.5
        if per_op or "per-op" in said:
            return 0.4, 0.0, 1.0  # torchtitan keeps attention and every other product
        return (0.0, 0.0, 0.5) if flash else (0.0, 1.0, 0.0)
    doubts.append("recompute")
    if said.startswith("custom"):
        return 0.3, 0.3, 0.5
    return (0.05, 0.05, 0.1) if fits else (0.6, 0.6, 0.7)


def _software(said: Mapping[str, str], *, flash: float) -> Software:
    """No column names the program: what does is how it compiles, and who published it."""
    if "xla" in said["compile"] or _any_of(said["source"], "maxtext", "jax", "pax ", "tpu"):
        profile = "xla"
    elif not flash:
        profile = "megatron-2021"
    elif "torchtitan" in said["source"]:
        profile = "torch"
    elif (
        _any_of(said["source"], "megatron", "nemo", "mlperf", "primus")
        or "transformerengine" in said["compile"].replace(" ", "")
        or (_any_of(said["precision"], "fp8", "float8") and not said["compile"].startswith("yes"))
    ):
        profile = "megatron-core"
    elif _any_of(said["source"], "llm-foundry", "internevo"):
        profile = "torch-2023"
    else:
        profile = "nanotron" if _any_of(said["source"], "nanotron", "ultra-scale") else "torch"
    return Software(profile=profile, **PROFILES[profile])


def _rates(said: Mapping[str, str], cluster: Cluster, doubts: list[str]) -> Rates:
    precision = said["precision"]
    if "fp4" in precision:
        raise Refused("4-bit products are not modelled")
    if _any_of(precision, "fp32", "float32", "tf32"):
        raise Refused("float32 products are not modelled")
    in_8_bits = _any_of(precision, "fp8", "float8")
    rates = cluster.rates("float8" if in_8_bits else "bfloat16")
    if in_8_bits and "rowwise" in said["notes"]:
        rates = dataclasses.replace(rates, matmul_flops=_between(rates.matmul_flops, cluster))
    if "overlap disabled" in said["notes"]:
        rates = dataclasses.replace(rates, tensor_hidden=0.0, pipeline_hidden=0.0, data_hidden=0.0)
    elif _any_of(said["notes"], "asynctp"):
        rates = dataclasses.replace(rates, tensor_hidden=PROFILES["megatron-core"]["tensor_hidden"])
    if precision == "":
        doubts.append("precision")
        if possible := cluster.matmul_flops("float8"):
            return dataclasses.replace(rates, matmul_flops=math.sqrt(rates.matmul_flops * possible))
    return rates


def _between(flops: float, cluster: Cluster) -> float:
    """Of 8-bit products scaled by rows: they save half of the time that those scaled as a whole save (torchtitan's
    commit 7a04053: 6,412 tokens/s, beside 7,186 and 5,760 in 16 bits)."""
    return 2 / (1 / flops + 1 / (cluster.matmul_flops("bfloat16") or flops))


def _any_of(text: str, *words: str) -> bool:
    return any(word in text for word in words)


TRUE = ("yes", "true", "on", "1")
PEAKS = {"v100": 125e12}  # in float16, which accelerators.toml does not have


def _cluster(row: Mapping[str, str], doubts: list[str]) -> Cluster:
    hardware = row.get("hardware") or ""
    name = next((cluster for word, cluster in HARDWARE if word in hardware.upper()), None)
    if name is None:
        raise Refused(f"nothing is known of hardware {hardware!r}")
    cluster = load_cluster(name if name != "a100" else "a100-40gb" if "40GB" in hardware.upper() else "a100-80gb")
    device, links, share = cluster.device, cluster.links, 1.0
    if watts := re.search(r"([0-9]{3,4}) ?W\b", hardware):
        share = min(1.0, float(watts[1]) / TDP_WATTS.get(name, float(watts[1]))) ** 0.4
        doubts.append("power")
    elif "power" in hardware.lower():
        share = 0.5**0.4  # a limit that is not told, but slows: as if it were half
        doubts.append("limited power")
    if "SXM3" in hardware.upper():
        share = SXM3_SHARE
    if "PCIE" in hardware.upper():
        share, links = share * PCIE_SHARE, dataclasses.replace(links, inside_gb_per_s=PCIE_GB_PER_S)
        doubts.append("power")
    for word, gb_per_s in SLOWER_LINKS.items():
        if word in hardware.upper():
            links = dataclasses.replace(links, inside_gb_per_s=gb_per_s)
    if memory := re.search(r"([0-9.]{1,5}) ?TB/s", hardware):
        device = dataclasses.replace(device, memory_gb_per_s=float(memory[1]) * 1e3)
    device = dataclasses.replace(
        device, matmul_tflops=device.matmul_tflops * share, matmul_float8_tflops=device.matmul_float8_tflops * share
    )
    node = max(1, int(number(row, "gpus_per_node") or cluster.ranks_per_node))
    if (network := _network(row.get("interconnect") or "", node)) is not None:
        links = dataclasses.replace(links, across_gb_per_s=network)
    if "EFA" in (row.get("interconnect") or ""):
        links = dataclasses.replace(links, across_hop_us=EFA_HOP_US)
    return dataclasses.replace(cluster, device=device, links=links, ranks_per_node=node)


def _network(text: str, ranks: float) -> float | None:
    """10^9 bytes/s of one rank's share of a node's network, where the words say it in Gb/s."""
    text = re.sub(r"Gbps|Gbit/s", "Gb/s", text)
    if match := re.search(r"([0-9]{1,2}) ?x ?(?:[A-Za-z][A-Za-z0-9]* ){0,2}?([0-9]{2,4}) ?Gb/s", text):
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


def measured_seconds(row: Mapping[str, str], run: Run) -> float | None:
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
    if not rows or not {"hardware", "model_label_b"} & rows[0].keys():
        sys.exit(f"{path}: has no row, or no column called hardware; the columns are {', '.join(COLUMNS)}")
    return [{key: value for key, value in row.items() if key and isinstance(value, str)} for row in rows]


def like_those_that_ran(failed: Iterable[dict[str, str]], ran: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of a sweep, rows that say of their model its size alone (model_label_b), and of their GPUs the layout.

    All else is as in the runs of that size, of the source that has the most. Other rows stay as they are.
    """
    most = Counter(run.get("source", "") for run in ran)
    by_size: dict[str, Mapping[str, str]] = {}  # the first of each
    for run in sorted(ran, key=lambda run: -most[run.get("source", "")]):
        by_size.setdefault(f"{number(run, 'n_params_b') or 0:.2f}", run)
    completed = []
    for row in failed:
        like = by_size.get(f"{number(row, 'model_label_b') or -1:.2f}")
        if like and "hardware" not in row:
            model = {key: value for key, value in like.items() if not key.startswith("measured")}
            said = {key: row.get(key, "") for key in ("micro_batch", "grad_accum", "dp", "tp", "pp")}
            said["n_gpus"] = said["global_batch"] = ""  # follow
            said["dp_kind"] = "zero1" if row.get("zero") == "1" else "ddp"
            said["sp"] = model.get("sp", "") if said["tp"] == model.get("tp") else ""
            said["pp_schedule"] = "" if said["pp"] == "1" else "1f1b"
            row = model | said
        completed.append(row)
    return completed


def without_names(rows: Iterable[dict[str, str]]) -> None:
    """Sources become numbers, and notes empty, in place."""
    numbers: dict[str, str] = {}
    for row in rows:
        row |= {"source": numbers.setdefault(row.get("source", ""), f"{len(numbers) + 1}"), "notes": ""}


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


# A run, its predicted log seconds, their deviation, and whether the others were calibrated on it.
Prediction = tuple[Run, float, float, bool]


def scores(runs: Sequence[Run], n_calibrate: int) -> tuple[list[Score], list[Prediction]]:
    """By source; and each run's own."""
    found, predictions = [], []
    for source in dict.fromkeys(run.source for run in runs):
        table = Table([run for run in runs if run.source == source])
        log_seconds, sensitive = table.predicted()
        doubts = [{doubt: DOUBTS[doubt] for doubt in run.doubts} for run in table.runs]
        common = covariance(sensitive, doubts, [run.program for run in table.runs])
        errors = table.log_measured - log_seconds  # nan where nothing was measured
        measured = np.flatnonzero(np.isfinite(errors))
        seen = (
            measured[np.linspace(0, len(measured) - 1, n_calibrate).astype(int)] if n_calibrate < len(measured) else []
        )
        mean, deviation = corrected(common, {int(i): float(errors[i]) for i in seen})
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
    return aligned(heads, lines, markdown=markdown)


def aligned(heads: Sequence[str], lines: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """A table of words, the first column to the left."""
    if markdown:
        rows = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
        return "\n".join([rows[0], "|---|" + "--:|" * (len(heads) - 1), *rows[1:]])
    width = max(len(line[0]) for line in lines)
    widths = [max(9, len(head) + 2) for head in heads[1:]]
    return "\n".join(
        line[0].ljust(width) + "".join(cell.rjust(n) for cell, n in zip(line[1:], widths, strict=True))
        for line in (heads, *lines)
    )


# ---- the best layout -----------------------------------------------------------------------------------------------

SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "n_mlp_matrices", "vocab_size", "seq_len")


def sweeps(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of measured runs that differ in their layout alone: of one source, program, model, batch and size."""
    of: dict[tuple[Any, ...], list[int]] = {}
    for i, run in enumerate(runs):
        w = run.workload
        if run.measured_seconds is not None and not {"layout", "global_batch"} & set(run.doubts):
            key = (run.source, *run.program, *(getattr(w, name) for name in SHAPE), w.world_size, round(w.tokens))
            of.setdefault(key, []).append(i)
    return [rows for rows in of.values() if len({runs[i].workload for i in rows}) > 1]


def regret_in_words(predictions: Sequence[Prediction], *, markdown: bool = False) -> str:
    """By source: by how much the layout foretold to be fastest was slower than the fastest measured, in %."""
    by_source: dict[str, list[tuple[float, float]]] = {}
    for rows in sweeps([run for run, *_ in predictions]):
        foretold = np.array([predictions[i][1] for i in rows])
        measured = np.array([predictions[i][0].measured_seconds for i in rows], dtype=float)
        chosen = measured[foretold == foretold.min()].mean()  # of rows that foresight cannot tell apart, any
        costs = (chosen / measured.min() - 1, measured.mean() / measured.min() - 1)
        by_source.setdefault(predictions[rows[0]][0].source, []).append(costs)
    heads, lines = ("source", "sweeps", "regret: mean", "worst", "any layout: mean"), []
    for source, found in by_source.items():
        regret, random = np.array(found).T
        lines.append((source, f"{len(found)}", *_percent(regret.mean(), regret.max(), random.mean())))
    means = [np.array(found).mean(0) for found in by_source.values()]
    worst = max(cost for found in by_source.values() for cost, _ in found)
    n = sum(len(found) for found in by_source.values())
    regret, random = np.mean(means, axis=0)
    lines.append(("mean of sources", f"{n}", *_percent(regret, worst, random)))
    return aligned(heads, lines, markdown=markdown)


def print_regret(predictions: Sequence[Prediction], *, markdown: bool = False) -> None:
    """Nothing, where no two rows differ in their layout alone."""
    if sweeps([run for run, *_ in predictions]):
        print("\nRows that differ in their layout alone: by how much the one foretold to be fastest took longer than")
        print("the fastest measured, in %; and any of them, taken by chance.\n")
        print(regret_in_words(predictions, markdown=markdown))


# ---- memory --------------------------------------------------------------------------------------------------------


def foretold_gib(runs: Sequence[Run]) -> dict[str, Array]:
    """Of the fullest GPU of each, if backward gathers the inputs of split products again, and if they are kept.

    No row says which; without tp it is the same. Where a row does not say that tp splits tokens, it is taken to.
    """
    work = [replace(r.workload, sequence_parallel=1) if r.may_split_tokens else r.workload for r in runs]
    both = {
        way: [peak_bytes(w, replace(r.keeping, gathers_again=again)) for w, r in zip(work, runs, strict=True)]
        for way, again in (("gathered again", True), ("kept", False))
    }
    return {way: np.array(values) / 2**30 for way, values in both.items()}


def memory_in_words(runs: Sequence[Run]) -> str:
    """A row for each source: errors, and how many are foretold not to fit."""
    groups = ("rows", "again: mean", "median", "bias", "too large", "kept: mean", "median", "too large")
    groups += ("nearer: mean", "median")
    lines = ["source".ljust(40) + "".join(head.rjust(13) for head in groups)]
    measured = [run for run in runs if run.measured_gib]
    for source in dict.fromkeys(run.source for run in measured):
        of_source = [run for run in measured if run.source == source]
        gib, actual = foretold_gib(of_source), np.array([run.measured_gib for run in of_source])
        again, kept = (gib[way] / actual - 1 for way in ("gathered again", "kept"))
        nearer = np.minimum(np.abs(again), np.abs(kept))
        cells = [f"{len(of_source)}", *_percent(np.abs(again).mean(), np.median(np.abs(again)), np.median(again))]
        cells += [f"{_too_large(of_source, gib['gathered again'])}", *_percent(np.abs(kept).mean())]
        cells += [*_percent(np.median(np.abs(kept))), f"{_too_large(of_source, gib['kept'])}"]
        cells += _percent(nearer.mean(), np.median(nearer))
        lines.append(source[:39].ljust(40) + "".join(cell.rjust(13) for cell in cells))
    return "\n".join(lines)


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def _too_large(runs: Sequence[Run], gib: Array, *, part: float = ROOM) -> int:
    """How many of these need more than a part of their accelerator's memory: by default, as `lab plan` judges it."""
    return int(_are_too_large(runs, gib, part=part).sum())


def _are_too_large(runs: Sequence[Run], gib: Array, *, part: float = ROOM) -> Any:
    return gib > part * np.array([run.memory_gib for run in runs])


def has_an_empty_stage(run: Run) -> bool:
    """A stage of its pipeline would have no block, at which the program ends.

    Nanotron gives each stage blocks until their products are more than an equal share of all. Behind the output come
    two blocks without any, a cast and the loss, which may have a stage each. Other programs want a layer for each.
    """
    w = run.workload
    stages = w.pp * w.stages_per_rank
    if "nanotron" not in run.source.lower():
        return bool(stages > w.n_layers)
    done = np.cumsum([*[w.block_parameters] * int(w.n_layers), w.vocab_size * w.d_model, 0, 0])
    full = 0
    for products in done[:-1]:  # the last block is wherever it comes
        full += int(products > done[-1] * (full + 1) / stages)
    return bool(full + 1 < stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUNS.csv")
    how_many = "runs of each source that correct the others, as evenly spaced in the file as can be; default: 0"
    parser.add_argument("--calibrate-on", metavar="N", type=int, default=0, help=how_many)
    parser.add_argument("--predictions", metavar="FILE.csv", type=Path, help="each row's, written there")
    not_run = "runs that did not come to their end: how many are foretold not to fit; with the same columns, or with"
    not_run += " model_label_b and a layout alone, all else as in RUNS.csv's runs of that size"
    parser.add_argument("--failed", metavar="FILE.csv", help=not_run)
    hidden = "sources are numbers, and notes empty: what to expect of a program of which nothing is known"
    parser.add_argument("--unnamed", action="store_true", help=hidden)
    parser.add_argument("--markdown", action="store_true", help="the table as the docs have it")
    arguments = parser.parse_args()
    if not 0 <= arguments.calibrate_on <= 1000:
        sys.exit(f"--calibrate-on = {arguments.calibrate_on}: give how many runs of each source, as 3")
    rows = read_rows(arguments.runs)
    failed_rows = [] if arguments.failed is None else like_those_that_ran(read_rows(arguments.failed), rows)
    if arguments.unnamed:
        without_names([*rows, *failed_rows])
    runs, refused = read_runs(rows)
    if not runs:
        sys.exit("no row could be predicted: " + "; ".join(sorted({reason for _, reason in refused})))
    found, predictions = scores(runs, arguments.calibrate_on)
    print("Errors of predicted step seconds, in %. in 90 %: measured ones within the 90 % interval.")
    print("MFU 40 %: what a constant MFU would be off by; own MFU: the source's own median, known afterwards.\n")
    print(in_words(found, markdown=arguments.markdown) if found else "no row has a measurement")
    print_regret(predictions, markdown=arguments.markdown)
    if any(run.measured_gib for run in runs):
        print("\nErrors of predicted memory, in %: if backward gathers again what tp has split, if that is kept, and")
        print(
            f"of the nearer of both. too large: runs that need over {ROOM:.0%} of the memory; each of these did fit.\n"
        )
        print(memory_in_words(runs))
    if arguments.failed is not None:
        failed, not_read = read_runs(failed_rows)
        needs = foretold_gib(failed)
        print(f"\nfailed: of {len(failed)} runs, of which nobody says why they failed,")
        for way, gib in needs.items():
            print(f"failed: {_too_large(failed, gib)} are too large, inputs {way}")
        small = len(failed) - _too_large(failed, needs["kept"], part=0.5)
        print(f"failed: {small} need less than half of the memory either way")
        sources = {run.source for run in failed}
        for name, group in (("failed", failed), ("ran", [run for run in runs if run.source in sources])):
            large = _are_too_large(group, foretold_gib(group)["kept"])
            empty = ~large & np.array([has_an_empty_stage(run) for run in group])
            print(f"{name}: {large.sum() + empty.sum()} of {len(group)} would be refused: {large.sum()} are too large,")
            print(f"{name}: inputs kept, and {empty.sum()} others have a stage of the pipeline with no block")
        refused.update(not_read)
    for (source, reason), n in sorted(refused.items()):
        print(f"refused: {n} of {source or 'no source'}: {reason}")
    if arguments.predictions is not None:
        try:
            file = arguments.predictions.open("w", encoding="utf-8", newline="")
        except OSError as error:
            sys.exit(f"--predictions = {arguments.predictions}: cannot be written ({error.strerror})")
        with file:
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
