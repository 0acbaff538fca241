"""Rates of a cluster from what was measured on it: by micro-benchmarks of its devices, and by one's own runs.

`cluster_of` makes a cluster of what parallel/measure/microbenchmarks.py found, so that the closed form, with its
constants as they are, gives back what was measured. `calibrated_on` holds a cluster against measured runs, and finds
factors of those constants, each within its spread, so that few runs do not bend much and an odd one hardly anything.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.foresight.clusters import PROFILES, PROGRAM, Cluster, Collectives, Device, Links, Software
from parallel.foresight.constants import Generation, constant, spreads_of
from parallel.foresight.operators import own_bytes, own_operators
from parallel.foresight.prediction import cpu_seconds_of, parts_of
from parallel.foresight.price import BACKWARD_LAUNCHES, STREAMS, TILE
from parallel.foresight.uncertainty import PROGRAM_DEVIATION, learnt, sensitivities
from parallel.foresight.workload import Workload, of_recipe
from parallel.recipe import Recipe

TORCH = Software(**PROFILES["torch"])  # what the lab runs
ACROSS = {True: (0.125, 300.0), False: (12.5, 60.0)}  # assumed, on CPUs and on GPUs: 10^9 bytes/s, microseconds
ITERATIONS = 10


# ---- by micro-benchmarks -------------------------------------------------------------------------------------------


def cluster_of(found: Mapping[str, Any], *, name: str, when: str) -> Cluster:
    """What was measured, as rates. when: the day, in words. Nothing between nodes is measured: that is assumed."""
    on_cpu = found["device"] == "cpu"
    generation = _generation(found)
    best = {dtype: max(map(_flops_per_s, rows)) for dtype, rows in found["products"].items()}
    trained_in = "float32" if on_cpu else "bfloat16"
    n_bytes, seconds = found["copy"]
    streams = n_bytes / seconds
    units = 1 if on_cpu else found["multiprocessors"]
    by = f"lab calibrate, {when}, torch {found['torch']}" + (", CPU seconds of one thread" if on_cpu else "")
    products = f"float32 products {found['float32_matmul']}, " if on_cpu else ""
    device = Device(
        matmul_tflops=best["bfloat16"] / 1e12,
        matmul_float32_tflops=best["float32"] / 1e12,
        memory_gb_per_s=streams / STREAMS / 1e9,
        multiprocessors=units,
        generation=generation,
        origin="measured",
        source=f"{by}; {products}a copy reaches {streams / 1e9:.3g} GB/s",
    )
    links, collectives = _links(found, on_cpu=on_cpu, by=by)
    return Cluster(
        name=name,
        accelerator=found["device"],
        ranks_per_node=found["cores"] if on_cpu else found["gpus"],
        memory_gib=found["memory_bytes"] / 2**30,
        device=device,
        links=links,
        collectives=collectives,
        software=_software(found, generation, streams, best[trained_in]),
        constants={"wave": _wave(found["products"][trained_in], generation, units=units)},
    )


def _generation(found: Mapping[str, Any]) -> Generation:
    if found["device"] == "cpu" or "NVIDIA" not in found["device"]:
        return "other"
    major, minor = found["capability"]
    names: dict[int, Generation] = {8: "ampere", 9: "hopper", 10: "blackwell"}
    return "other" if (major, minor) == (8, 9) else names.get(major, "other")  # 8.9 is Ada


def _flops_per_s(row: Sequence[float]) -> float:
    m, n, inner, seconds = row
    return 2 * m * n * inner / seconds


def _wave(rows: Sequence[Sequence[float]], generation: Generation, *, units: int) -> float:
    """Factor of the constant `wave`, for so many multiprocessors: how much slower products are, the smaller they are.

    Seconds a FLOP are a line over 1 / √(m · n), as price.product has it: 1 + √(units · TILE · wave / (m · n)).
    """
    root = np.array([1 / math.sqrt(m * n) for m, n, *_ in rows])
    rates = np.array([_flops_per_s(row) for row in rows])
    slope, at_largest = np.polyfit(root, 1 / rates, 1, w=rates)
    wave = max(float(slope / at_largest), 0.0) ** 2 / (units * TILE * constant("wave", generation).value)
    return min(max(wave, 0.01), 100.0)


def _software(found: Mapping[str, Any], generation: Generation, streams: float, best: float) -> Software:
    """What the lab runs, with those keys that were measured. streams: bytes/s of a copy; best: FLOP/s of a product."""

    def value(name: str) -> float:
        return constant(name, generation).value

    # price.fused_attention: seconds at the rate of long sequences, times 1 + tokens at half of it / length: a line.
    b, h, t, e, forward, backward = np.array(found["attention"], dtype=float).T
    rate = best * value("attention") * np.minimum(1, e / 128) ** 0.15
    at_gain_of_one = 2 * b * h * t**2 * e * (1 + 2.5 / 0.8) / rate
    slow, slower = _line(np.stack([1 / t, (forward + backward) / at_gain_of_one], axis=1), 1.0)
    between = found["between"]
    passed, launches = _of_a_block(found)
    return dataclasses.replace(
        TORCH,
        attention_gain=min(max(1 / slow, 0.01), 10.0),
        attention_tokens=slower / slow,
        operator_share=sum(between["seconds"]) * streams / passed / value("operators"),
        logit_bytes=found["loss"]["seconds"] * streams / found["loss"]["logits"],
        launch_us=sum(found["launches"]) / launches / value("launch") * 1e6,
    )


def _of_a_block(found: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes between its products that were timed, and launches, forward and backward, as price._block counts them."""
    between = found["between"]
    tokens, d, ff, heads = (between[key] for key in ("tokens", "d_model", "d_ff", "n_heads"))
    if found["device"] == "cpu":  # as of any program: see prediction._priced
        qkv = (heads + 2 * between["n_kv_heads"]) * d / heads
        passed = found["element_bytes"] / 2 * tokens * ((22 + 38) * d + (8 + 14) * ff + (6 + 8) * qkv)
        return passed, TORCH.launches * (1 + BACKWARD_LAUNCHES)
    shape = {key: between[key] for key in ("d_model", "n_heads", "n_kv_heads", "d_ff")}
    block = Workload(
        **shape,
        n_layers=1,
        head_dim=d / heads,
        vocab_size=1,
        seq_len=tokens,
        micro_batch=1,
        n_microbatches=1,
        element_bytes=found["element_bytes"],
        own=1,
    )
    one, two = (own_bytes(block, tokens=n) for n in (1, 2))  # what grows with tokens is no weight's
    # Its weights are of the type that it computes in, so that it casts none; and it repeats no keys.
    in_weights_type = own_operators(dataclasses.replace(block, element_bytes=4, n_kv_heads=block.n_heads))
    passed = tokens * (two.forward - one.forward + two.backward - one.backward)
    return float(passed), float(in_weights_type.forward + in_weights_type.backward)


def _links(found: Mapping[str, Any], *, on_cpu: bool, by: str) -> tuple[Links, Collectives]:
    across, across_us = ACROSS[on_cpu]
    between = "between nodes: assumed"
    if found["collectives"] is None:
        source = f"one rank, so that no link was measured; inside as {between}"
        assumed = Links(
            inside_gb_per_s=across,
            inside_us=across_us,
            across_gb_per_s=across,
            across_us=across_us,
            source=source,
        )
        return assumed, Collectives()
    n, measured = found["ranks"], found["collectives"]
    once = (n - 1) / n  # of a tensor's bytes, what a rank sends; twice in an all-reduce
    sent = {"all_reduce": 2 * once, "send": 1.0}
    lines = {name: _line(rows, sent.get(name, once)) for name, rows in measured.items()}
    start, per_byte = lines["all_reduce"]
    factor = constant("inside", "other").value
    links = Links(
        inside_gb_per_s=1e-9 / per_byte / factor,
        inside_us=start * 1e6,
        inside_ranks=n if on_cpu else 0,
        across_gb_per_s=across,
        across_us=across_us,
        origin="measured",
        source=f"{by}, {n} ranks; {between}",
    )
    names = {"gather": "all_gather", "scatter": "reduce_scatter", "exchange": "all_to_all"}
    starts = {f"{short}_start": lines[name][0] / start for short, name in names.items()}
    bytes_ = {f"{short}_bytes": lines[name][1] / per_byte for short, name in {**names, "send": "send"}.items()}
    return links, Collectives(**starts, **bytes_, send_us=lines["send"][0] * 1e6)


def _line(rows: Any, share: float) -> tuple[float, float]:
    """(seconds of an empty message, seconds a byte sent) by least squares of the relative error; both above zero.

    rows: (bytes of the tensor, seconds). share: of those bytes, what a rank sends.
    """
    n_bytes, seconds = np.array(rows, dtype=float).T
    sent = n_bytes * share
    weighted = np.stack([1 / seconds, sent / seconds], axis=1)
    (start, per_byte), *_ = np.linalg.lstsq(weighted, np.ones(len(seconds)), rcond=None)
    if start <= 0 or per_byte <= 0:  # noise: the ends of the curve
        return float(seconds.min()), float(seconds[-1] / sent[-1])
    return float(start), float(per_byte)


# ---- by runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    recipe: Recipe
    seconds: float  # measured: of a step, or CPU seconds of a step on a cluster of CPUs


@dataclass(frozen=True, kw_only=True)
class Held:
    """A run, held against a cluster: seconds."""

    run: Run
    before: float
    after: float
    without: float  # after, by all runs but this one


@dataclass(frozen=True, kw_only=True)
class Calibration:
    cluster: Cluster
    runs: tuple[Held, ...]


def predicted_seconds(recipe: Recipe, cluster: Cluster, factors: Mapping[str, float] | None = None) -> float:
    """What a run's `seconds` are foretold to be; factors: by which constants are multiplied. Raises RecipeError."""
    work, dtype = of_recipe(recipe), recipe.train.dtype
    if cluster.accelerator == "cpu":
        return float(cpu_seconds_of(work, cluster, dtype, factors))
    return float(sum(parts_of(work, cluster, dtype, factors).values()))


def calibrated_on(runs: Sequence[Run], cluster: Cluster) -> Cluster:
    """`cluster` with factors of its constants by which these runs are as likely as can be."""
    names = spreads_of(cluster.device.generation) | {PROGRAM: PROGRAM_DEVIATION}
    measured = np.log([run.seconds for run in runs])

    def log_seconds(factors: Mapping[str, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.log([predicted_seconds(run.recipe, cluster, factors) for run in runs])

    logs = np.zeros(len(names))
    for _ in range(ITERATIONS):  # Gauss and Newton: the logarithm of a sum is no line
        now = dict(zip(names, np.exp(logs), strict=True))

        def beside(factors: Mapping[str, float], now: dict[str, float] = now) -> Any:
            return log_seconds({name: value * factors.get(name, 1.0) for name, value in now.items()})

        sensitive = sensitivities(beside, names)
        spreads = np.array(list(names.values()))
        # What the runs would be off by, were the constants where they began.
        errors = measured - log_seconds(now) + sensitive @ (logs / spreads)
        moved = spreads * learnt(sensitive, errors)
        done = np.abs(moved - logs).max() < 1e-4
        logs = moved
        if done:
            break
    factors = dict(zip(names, np.exp(logs).tolist(), strict=True))
    constants = {name: cluster.constants.get(name, 1.0) * factor for name, factor in factors.items()}
    return dataclasses.replace(cluster, constants=constants)


def held_against(runs: Sequence[Run], cluster: Cluster) -> Calibration:
    """`cluster` calibrated on all of the runs; and of each run, what it was foretold to take before and after."""
    after = calibrated_on(runs, cluster)
    held = []
    for i, run in enumerate(runs):
        others = [*runs[:i], *runs[i + 1 :]]
        without = calibrated_on(others, cluster) if others else cluster
        seconds = [predicted_seconds(run.recipe, each) for each in (cluster, after, without)]
        held.append(Held(run=run, before=seconds[0], after=seconds[1], without=seconds[2]))
    return Calibration(cluster=after, runs=tuple(held))
