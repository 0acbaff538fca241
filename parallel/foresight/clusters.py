"""What a recipe would run on: an accelerator, links in a node and between nodes, and software, from small files.

A catalogue lies beside this file; a user's own is named by its path. Peaks and memory of an accelerator are not said
again: parallel/measure/accelerators.toml has them by its name.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from parallel.foresight.constants import CONSTANTS, Generation
from parallel.foresight.price import TILE, Rates
from parallel.measure.accelerators import ACCELERATORS, Peak, peak_flops
from parallel.recipe import Recipe, RecipeError, did_you_mean, read_toml
from parallel.recipe.sections import Section, option

Origin = Literal["measured", "published", "assumed"]


@dataclass(frozen=True, kw_only=True)
class Device(Section):
    """[device]: what one rank computes with."""

    matmul_tflops: float = option(0.0, "best product in bfloat16 or float16", minimum=0)
    matmul_float8_tflops: float = option(0.0, "the same in 8 bits; 0: not known", minimum=0)
    matmul_float32_tflops: float = option(0.0, "the same in float32; 0: not known", minimum=0)
    memory_gb_per_s: float = option(0.0, "bandwidth of its memory, 10^9 bytes/s", minimum=1)
    multiprocessors: int = option(0, "that share a product", minimum=1)
    generation: Generation = option("other", "whose fitted constants hold")
    origin: Origin = option("assumed", "where these are from")
    source: str = option("", "the same in words")


@dataclass(frozen=True, kw_only=True)
class Links(Section):
    """[links]: how ranks talk, by the bus bandwidth of large all-reduces and the time of an empty one."""

    inside_gb_per_s: float = option(0.0, "in a node, 10^9 bytes/s", minimum=0.001)
    inside_us: float = option(40.0, "in a node, microseconds", minimum=0)
    inside_ranks: int = option(0, "among how many, where that grows with them, as on CPUs; 0: it does not", minimum=0)
    across_gb_per_s: float = option(
        0.0, "one rank's share of the node's network, each way, 10^9 bytes/s", minimum=0.001
    )
    across_us: float = option(60.0, "between nodes, microseconds", minimum=0)
    across_hop_us: float = option(
        4.0, "of each step of a ring between nodes, or level of a tree, as NCCL's table has it", minimum=0
    )
    origin: Origin = option("assumed", "where these are from")
    source: str = option("", "the same in words")


@dataclass(frozen=True, kw_only=True)
class Collectives(Section):
    """[collectives]: other messages, beside an all-reduce: seconds of a byte that travels, and of an empty one."""

    gather_bytes: float = option(1.0, "of an all-gather", minimum=0)
    gather_start: float = option(1.0, "an empty one", minimum=0)
    scatter_bytes: float = option(1.0, "of a reduce-scatter", minimum=0)
    scatter_start: float = option(1.0, "an empty one", minimum=0)
    exchange_bytes: float = option(1.0, "of an all-to-all", minimum=0)
    exchange_start: float = option(1.0, "an empty one", minimum=0)
    send_bytes: float = option(2.0, "from rank to rank, one way", minimum=0.01)
    send_us: float = option(20.0, "an empty one, microseconds", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Software(Section):
    """[software]: what trains there, for two programs of one layout differ more than two layouts of one program."""

    profile: str = option("torch", "a named one of software.toml; the keys below go before it")
    attention_gain: float = option(
        1.0, "rate of its attention, held against kernels of the second generation", minimum=0.01, maximum=10
    )
    attention_tokens: float = option(512.0, "of a sequence at which attention reaches half its rate", minimum=0)
    launches: float = option(40.0, "kernels in a block's forward", minimum=0)
    tensor_launches: float = option(12.0, "more of them where tp splits the block", minimum=0)
    launch_us: float = option(8.0, "of the host, for each", minimum=0)
    late_us: float = option(
        0.0, "of a block's host, each way and for each rank of tp, where a pipeline goes over nodes", minimum=0
    )
    operator_share: float = option(1.3, "bytes that pass between products, of what one kernel each would", minimum=0)
    logit_bytes: float = option(40.0, "that pass through memory for each logit", minimum=0)
    tensor_hidden: float = option(0.0, "part of tp's messages that products hide", minimum=0, maximum=1)
    pipeline_hidden: float = option(0.0, "part of the pipeline's messages that is hidden", minimum=0, maximum=1)
    pipeline_split: int = option(
        0, "1: each rank of tp sends its part of what goes to the next stage", minimum=0, maximum=1
    )
    data_hidden: float = option(1.0, "part of weights' and gradients' messages that can hide", minimum=0, maximum=1)
    bucket_mib: float = option(0.0, "MiB of gradients that ranks sum at once, where each keeps all; 0: all", minimum=0)
    gather_launches: float = option(0.0, "that a message of FSDP takes of a host, in launches; on CPUs", minimum=0)
    stage_launches: float = option(0.0, "that a pipeline's stage and microbatch take, each way; on CPUs", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    name: str
    accelerator: str  # as torch.cuda.get_device_name gives it; "cpu"
    ranks_per_node: int
    memory_gib: float
    device: Device
    links: Links
    software: Software
    collectives: Collectives = field(default_factory=Collectives)
    # By which the constants of the closed form are multiplied here, and PROGRAM by which all seconds are: what lab
    # calibrate found.
    constants: Mapping[str, float] = field(default_factory=dict)

    def would_run(self, recipe: Recipe) -> Recipe:
        """The same, on such devices."""
        return recipe.on("cpu" if self.accelerator == "cpu" else "cuda")

    def peak(self, dtype: str) -> Peak:
        """Of one rank's device. On a CPU its best product is the peak, as in a measured run."""
        if self.accelerator == "cpu":
            return Peak(self.matmul_flops(dtype), f"cluster {self.name}: its best product")
        return peak_flops(self.accelerator, dtype)

    def matmul_flops(self, dtype: str) -> float | None:
        """FLOP/s of the best product in `dtype`; None where the file does not say."""
        suffix = {"float32": "_float32", "float8": "_float8"}.get(dtype, "")
        return getattr(self.device, f"matmul{suffix}_tflops") * 1e12 or None

    def rates(self, dtype: str) -> Rates:
        """Raises RecipeError where the cluster's file has no rate of products in `dtype`."""
        flops = self.matmul_flops(dtype) if dtype != "float64" else None
        if flops is None:
            remedy = "use bfloat16 (--set train.dtype=bfloat16), or a cluster file with one in [device]"
            raise RecipeError("train.dtype", dtype, f"the cluster {self.name} has no rate for it; {remedy}")
        device, links, software = self.device, self.links, self.software
        return Rates(
            matmul_flops=flops,
            memory_bytes_per_s=device.memory_gb_per_s * 1e9,
            wave_elements=device.multiprocessors * TILE,
            # On a CPU ranks_per_node is its cores, which any number of ranks of one host share.
            node_ranks=2**24 if self.accelerator == "cpu" else self.ranks_per_node,
            inside_bytes_per_s=links.inside_gb_per_s * 1e9,
            inside_seconds=links.inside_us * 1e-6,
            inside_ranks=links.inside_ranks,
            across_bytes_per_s=links.across_gb_per_s * 1e9,
            across_seconds=links.across_us * 1e-6,
            across_hop_seconds=links.across_hop_us * 1e-6,
            # Attention's kernels for 8 bits are not in use: its rate is of 16.
            attention_gain=software.attention_gain
            * ((self.matmul_flops("bfloat16") or flops) / flops if dtype == "float8" else 1),
            attention_tokens=software.attention_tokens,
            launch_seconds=software.launch_us * 1e-6,
            launches=software.launches,
            tensor_launches=software.tensor_launches,
            late_seconds=software.late_us * 1e-6,
            operator_share=software.operator_share,
            logit_bytes=software.logit_bytes,
            tensor_hidden=software.tensor_hidden,
            pipeline_hidden=software.pipeline_hidden,
            pipeline_split=software.pipeline_split,
            data_hidden=software.data_hidden,
            buckets_per_byte=1 / (software.bucket_mib * 2**20) if software.bucket_mib else 0,
            gather_launches=software.gather_launches,
            stage_launches=software.stage_launches,
            synchronous=int(self.accelerator == "cpu"),
            send_seconds=self.collectives.send_us * 1e-6,
            **{key: value for key, value in vars(self.collectives).items() if key != "send_us"},
        )


def _packaged(name: str) -> dict[str, Any]:
    return tomllib.loads(files("parallel.foresight").joinpath(name).read_text(encoding="utf-8"))


PROFILES: dict[str, dict[str, Any]] = _packaged("software.toml")
CATALOGUE = sorted(
    path.name.removesuffix(".toml") for path in files("parallel.foresight").joinpath("catalogue").iterdir()
)
TABLES = {"device": Device, "links": Links, "collectives": Collectives, "software": Software}
KEYS = ("name", "accelerator", "ranks_per_node", "memory_gib", *TABLES, "constants")
PROGRAM = "program"  # the constant that multiplies all seconds, common to the runs of one program on one machine


def load_cluster(name_or_path: str) -> Cluster:
    """One of the CATALOGUE by name, or the file at a path. Raises RecipeError."""
    if name_or_path in CATALOGUE:
        return cluster_from_tables(_packaged(f"catalogue/{name_or_path}.toml"), default_name=name_or_path)
    if "/" not in name_or_path and not name_or_path.endswith(".toml"):
        remedy = f"is no cluster of the catalogue ({', '.join(CATALOGUE)}) and no path of a .toml file"
        raise RecipeError("--cluster", name_or_path, remedy)
    if not Path(name_or_path).exists():
        raise RecipeError("--cluster", name_or_path, f"does not exist; give a file, or one of {', '.join(CATALOGUE)}")
    return cluster_from_tables(read_toml(name_or_path), default_name=Path(name_or_path).stem)


def cluster_from_tables(tables: Mapping[str, Any], *, default_name: str) -> Cluster:
    """Validates parsed TOML. Raises RecipeError at the first thing that is wrong."""
    for key, value in tables.items():
        _refuse_unknown(key, value, KEYS)
    for section in ("device", "links"):
        if section not in tables:
            raise RecipeError(section, None, f"is missing; write [{section}] with keys below it, as in the catalogue")
    read: dict[str, Any] = {}
    for name, cls in TABLES.items():
        table: Any = tables.get(name, {})
        if not isinstance(table, dict):
            raise RecipeError(name, table, f"is a section; write [{name}] with keys below it")
        for key, value in table.items():
            _refuse_unknown(key, value, [field.name for field in dataclasses.fields(cls)], prefix=f"{name}.")
        if name == "software":
            profile = table.get("profile", "torch")
            if not isinstance(profile, str) or profile not in PROFILES:
                raise RecipeError("software.profile", profile, f"choose {', '.join(PROFILES)}")
            table = PROFILES[profile] | {"profile": profile} | table
        read[name] = cls(**table)
    called, accelerator = tables.get("name", default_name), tables.get("accelerator", "")
    if not isinstance(accelerator, str):
        raise RecipeError("accelerator", accelerator, 'give its name, as "NVIDIA H200"')
    if accelerator != "cpu" and accelerator not in ACCELERATORS and "memory_gib" not in tables:
        remedy = "is not in parallel/measure/accelerators.toml; give its exact name, or memory_gib of one beside it"
        raise RecipeError("accelerator", accelerator, remedy)
    known = ACCELERATORS.get(accelerator)
    memory = tables.get("memory_gib", known.memory_bytes / 2**30 if known else 0)
    ranks = tables.get("ranks_per_node", 0)
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= 100_000:
        raise RecipeError("ranks_per_node", ranks, "give how many ranks share fast links, as 8")
    if not isinstance(memory, int | float) or isinstance(memory, bool) or not 0 < memory <= 1e6:
        raise RecipeError("memory_gib", memory, "give the memory of one accelerator in GiB, as 80")
    if not isinstance(called, str) or not called.isprintable() or not 0 < len(called) <= 100:
        raise RecipeError("name", called, "give a short line of text")
    return Cluster(
        name=called,
        accelerator=accelerator,
        ranks_per_node=ranks,
        memory_gib=float(memory),
        **read,
        constants=_factors(tables.get("constants", {})),
    )


def _factors(table: Any) -> dict[str, float]:
    if not isinstance(table, dict):
        raise RecipeError("constants", table, "is a section; write [constants] with keys below it")
    for key, value in table.items():
        _refuse_unknown(key, value, [*CONSTANTS, PROGRAM], prefix="constants.")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0.01 <= value <= 100:
            raise RecipeError(f"constants.{key}", value, "give a factor of the fitted constant, as 1.1")
    return {key: float(value) for key, value in table.items()}


def cluster_toml(cluster: Cluster, *, head: str) -> str:
    """A file that `load_cluster` reads as this one. head: a line that says how it was made."""
    lines = [f"# {head}", "", f"name = {json.dumps(cluster.name)}", f"accelerator = {json.dumps(cluster.accelerator)}"]
    lines += [f"ranks_per_node = {cluster.ranks_per_node}", f"memory_gib = {cluster.memory_gib:.6g}"]
    for section in TABLES:
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {_written(value)}" for key, value in vars(getattr(cluster, section)).items()]
    lines += ["", "[constants]  # factors of those in parallel/foresight/constants.toml; program: of all seconds"]
    lines += [f"{key} = {_written(value)}" for key, value in cluster.constants.items()]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    return json.dumps(float(f"{value:.6g}") if isinstance(value, float) else value)


def _refuse_unknown(key: str, value: Any, known: Sequence[str], *, prefix: str = "") -> None:
    if key not in known:
        raise RecipeError(f"{prefix}{key}", value, f"unknown key; {did_you_mean(key, known)}")
