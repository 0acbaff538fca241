"""What a step of a recipe takes on a cluster: seconds with an interval, where they go, and where each is from."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.foresight.clusters import PROGRAM, Cluster
from parallel.foresight.constants import spreads_of, values_of
from parallel.foresight.price import COMMUNICATION, COMPUTE, Links, hop_seconds, price
from parallel.foresight.replay import Walk
from parallel.foresight.uncertainty import NINETY, corrected, covariance, sensitivities
from parallel.foresight.workload import Number, Workload, of_recipe
from parallel.measure.model_flops import model_flops_per_token
from parallel.recipe import Recipe

# What each part of a step is, and what it would take to make it shorter.
WORDS = {
    "products": ("products of matrices", "it is as fast as the device multiplies"),
    "attention": ("attention", "a newer kernel, shorter sequences, or more of cp, would help"),
    "other_operators": (
        "what lies between products",
        "train.compile fuses it, and tp with sequence_parallel splits it",
    ),
    "output_and_loss": ("the output and the loss", "tp splits them; with a pipeline, the last stage has them alone"),
    "launches": ("waiting for the host", "larger micro-batches, fewer ranks to a layer, or train.compile, would help"),
    "tensor_messages": ("messages of tp", "less tp, or none between nodes, would help"),
    "context_messages": ("messages of cp", "less cp, or another context.method, would help"),
    "data_messages": (
        "messages of weights and gradients",
        "more tokens a rank and step, or shards within a node, help",
    ),
    "pipeline_messages": ("messages of the pipeline", "larger micro-batches or fewer stages would help"),
    "bubble": (
        "the pipeline's bubble",
        "more microbatches, more stages a rank, or a schedule that splits backward, help",
    ),
    "optimizer": ("the optimizer", "more dp_shard splits it"),
}


@dataclass(frozen=True, kw_only=True)
class Term:
    name: str  # of price.PARTS
    seconds: float
    rate_from: str  # measured, published or assumed, of the cluster's file; with what is fitted


@dataclass(frozen=True, kw_only=True)
class Prediction:
    cluster: str
    method: str  # in words
    step_seconds: float
    closed_form_seconds: float  # of the same step
    cpu_seconds_per_step: float | None  # of all ranks of a cluster of CPUs
    low_seconds: float  # of the interval that should hold 90 % of such runs
    high_seconds: float
    terms: tuple[Term, ...]
    tokens_per_s: float
    mfu: float | None  # as parallel.measure.flops defines them; None where the peak is not known
    mfu_causal: float | None
    hfu: float | None
    peak_flops: float | None
    peak_source: str
    bottleneck: str

    def seconds_of(self, *names: str) -> float:
        return sum(term.seconds for term in self.terms if term.name in names)

    def fill_in(self, record: dict[str, Any]) -> None:
        """Into that of a dry run: the keys that a measured run has, and in `prediction` what only a forecast has."""
        record["throughput"] |= {
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_rank": self.tokens_per_s / record["layout"]["world_size"],
            "step_seconds": {"median": self.step_seconds, "p10": None, "p90": None},
            "step_parts": {
                "compute_seconds": self.seconds_of(*COMPUTE, "optimizer"),
                "communication_seconds": self.seconds_of(*COMMUNICATION),
                "idle_seconds": self.seconds_of("bubble"),
            },
        }
        record["flops"] |= {
            key: getattr(self, key) for key in ("mfu", "mfu_causal", "hfu", "peak_flops", "peak_source")
        }
        record["prediction"] = self.as_json()

    def as_json(self) -> dict[str, Any]:
        """As `prediction` in a record has it: of a dry run, or beside what a run has measured."""
        return {
            "cluster": self.cluster,
            "method": self.method,
            "step_seconds": self.step_seconds,
            "cpu_seconds_per_step": self.cpu_seconds_per_step,
            "closed_form_seconds": self.closed_form_seconds,
            "low_seconds": self.low_seconds,
            "high_seconds": self.high_seconds,
            "confidence": 0.9,
            "terms": [dataclasses.asdict(term) for term in self.terms],
            "bottleneck": self.bottleneck,
        }


def predict(recipe: Recipe, cluster: Cluster, walk: Walk | None = None) -> Prediction:
    """By what a dry run has walked through, where it has; else by the closed form, which is enough for a search.

    Raises RecipeError where the cluster has no rate for the recipe's type.
    """
    work = of_recipe(recipe)
    closed = {name: float(seconds) for name, seconds in parts_of(work, cluster, recipe.train.dtype).items()}
    parts, method = closed, "closed form"
    if walk is not None and cluster.accelerator == "cpu":
        method = "closed form: what a dry run walks through is priced on the streams of a GPU"
    elif walk is not None and recipe.train.compile == "none":
        parts, method = walked_parts(walk, work, cluster, recipe.train.dtype), "operators of a dry run"
    elif walk is not None:
        method = "closed form: what torch.compile fuses is not what a dry run walks through"
    seconds = sum(parts.values())
    sensitive = sensitivity(work, cluster, recipe.train.dtype)
    deviation = float(corrected(covariance(sensitive, [{}]), {})[1][0])
    cpu_seconds = float(cpu_seconds_of(work, cluster, recipe.train.dtype)) if cluster.accelerator == "cpu" else None
    peak = cluster.peak(recipe.train.dtype)
    tokens, ranks = recipe.train.global_batch * recipe.train.seq_len, recipe.world_size
    possible = None if peak.flops is None else seconds * peak.flops * cores_share(cluster, ranks) * ranks / tokens
    model = model_flops_per_token(recipe.model, seq_len=recipe.train.seq_len)
    worst = max(parts, key=lambda name: parts[name])
    what, remedy = WORDS[worst]
    return Prediction(
        cluster=cluster.name,
        method=method,
        step_seconds=seconds,
        closed_form_seconds=sum(closed.values()),
        cpu_seconds_per_step=cpu_seconds,
        low_seconds=seconds * math.exp(-NINETY * deviation),
        high_seconds=seconds * math.exp(NINETY * deviation),
        terms=tuple(Term(name=k, seconds=v, rate_from=_rate_from(k, cluster)) for k, v in parts.items()),
        tokens_per_s=tokens / seconds,
        mfu=_at_most_one(model.full, possible),
        mfu_causal=_at_most_one(model.causal, possible),
        hfu=_at_most_one(hardware_flops_per_token(work), possible),
        peak_flops=peak.flops,
        peak_source=peak.source,
        bottleneck=f"{parts[worst] / seconds:.0%} of the step is {what}: {remedy}",
    )


def parts_of(
    work: Workload, cluster: Cluster, dtype: str, factors: Mapping[str, float] | None = None
) -> dict[str, Number]:
    """Seconds by part. factors: by which constants are multiplied."""
    parts = _priced(work, cluster, dtype, factors or {}, mean=False)
    if cluster.accelerator != "cpu":
        return parts
    # Ranks of a CPU share its cores: when one idles, another goes on.
    share = np.maximum(work.world_size / cluster.ranks_per_node, 1.0)
    busy = sum(seconds for name, seconds in parts.items() if name != "bubble")
    idle = np.maximum(busy + parts["bubble"] - share * busy, 0)
    return {name: seconds * share for name, seconds in parts.items()} | {"bubble": idle}


def cpu_seconds_of(work: Workload, cluster: Cluster, dtype: str, factors: Mapping[str, float] | None = None) -> Number:
    """CPU seconds of a step, over all ranks of a cluster of CPUs, as `throughput.cpu_seconds_per_step` measures them.

    What ranks compute, launch and send; who waits takes none.
    """
    parts = _priced(work, cluster, dtype, factors or {}, mean=True)
    return work.world_size * sum(seconds for name, seconds in parts.items() if name != "bubble")


def _priced(
    work: Workload, cluster: Cluster, dtype: str, factors: Mapping[str, float], *, mean: bool
) -> dict[str, Number]:
    if cluster.accelerator == "cpu":  # where operators are not counted one by one: lab calibrate measures a block's
        work = dataclasses.replace(work, own=0)
    parts = price(work, cluster.rates(dtype), _constants(cluster, factors), mean=mean)
    return {name: seconds * _factor(cluster, factors, PROGRAM) for name, seconds in parts.items()}


def walked_parts(walk: Walk, work: Workload, cluster: Cluster, dtype: str) -> dict[str, float]:
    """Seconds by part, operator by operator."""
    rates, constants = cluster.rates(dtype), _constants(cluster, {})
    hop = float(hop_seconds(work, rates, Links(rates, constants)))
    parts = walk.seconds(rates, constants, hop=hop)
    return {name: float(seconds) * _factor(cluster, {}, PROGRAM) for name, seconds in parts.items()}


def _constants(cluster: Cluster, factors: Mapping[str, float]) -> dict[str, float]:
    values = values_of(cluster.device.generation)
    return {name: value * _factor(cluster, factors, name) for name, value in values.items()}


def _factor(cluster: Cluster, factors: Mapping[str, float], name: str) -> float:
    return cluster.constants.get(name, 1.0) * factors.get(name, 1.0)


def sensitivity(work: Workload, cluster: Cluster, dtype: str) -> np.ndarray[Any, Any]:
    """See uncertainty.sensitivities."""

    def log_seconds(factors: Mapping[str, float]) -> Any:
        return np.log(sum(parts_of(work, cluster, dtype, factors).values()))

    return sensitivities(log_seconds, spreads_of(cluster.device.generation))


def cores_share(cluster: Cluster, ranks: int) -> float:
    """Of a core, or a device, that a rank has."""
    return min(1.0, cluster.ranks_per_node / ranks) if cluster.accelerator == "cpu" else 1.0


def hardware_flops_per_token(work: Workload) -> float:
    """What runs, by docs/measures.md: fused attention looks at the scores twice, and recompute does forward again."""
    weights = work.n_layers * work.block_parameters
    pairs = work.n_layers * work.n_heads * work.head_dim * work.seq_len
    again = 2 * work.again_products * weights + 2 * work.again_attention * pairs
    attention = 7 * pairs if work.flash else 12 * pairs
    return float(6 * (weights + work.vocab_size * work.d_model) + attention + again)


def _at_most_one(flops: float, possible: float | None) -> float | None:
    return None if possible is None or flops > possible else flops / possible


def _rate_from(part: str, cluster: Cluster) -> str:
    device, links = cluster.device.origin, cluster.links.origin
    if part == "bubble":
        return "the schedule, and the parts above"
    if part == "launches":
        return f"software.profile {cluster.software.profile}: assumed; constants fitted"
    return f"{links if part in COMMUNICATION else device}; constants fitted"
