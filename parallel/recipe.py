"""What a run is: typed, validated, read from TOML.

A recipe is refused here, in one line that names the key, its value and what would be right, before any process
starts. This module imports nothing heavy, so that `lab check` answers at once.
"""

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float64")
SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved-1f1b",
    "looped-bfs",
    "interleaved-zero-bubble",
    "zbv",
    "dualpipev",
)
SINGLE_STAGE_SCHEDULES = ("gpipe", "1f1b")
V_SCHEDULES = ("zbv", "dualpipev")  # rank r holds stages r and 2·pp - 1 - r
SPLIT_BACKWARD_SCHEDULES = ("interleaved-zero-bubble", "zbv", "dualpipev")  # dI and dW are computed apart

# Published shapes. SmolLM: Hugging Face config of SmolLM-1.7B. Llama 3: table 3 of arXiv:2407.21783.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(n_layers=8, d_model=128, n_heads=8, n_kv_heads=4, d_ff=352, vocab_size=256),
    "small": dict(n_layers=12, d_model=384, n_heads=12, n_kv_heads=4, d_ff=1024, vocab_size=256),
    "smollm-1.7b": dict(
        n_layers=24, d_model=2048, n_heads=32, n_kv_heads=32, d_ff=8192, vocab_size=49152, tied_embeddings=True
    ),
    "llama3-8b": dict(
        n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, vocab_size=128256, rope_theta=5e5
    ),
    "llama3-70b": dict(
        n_layers=80, d_model=8192, n_heads=64, n_kv_heads=8, d_ff=28672, vocab_size=128256, rope_theta=5e5
    ),
    "llama3-405b": dict(
        n_layers=126, d_model=16384, n_heads=128, n_kv_heads=8, d_ff=53248, vocab_size=128256, rope_theta=5e5
    ),
}


# The keys of [data] that each source takes.
DATA_KEYS: dict[str, tuple[str, ...]] = {
    "stdlib": (),
    "files": ("files",),
    "tokens": ("path", "token_dtype"),
    "huggingface": ("dataset", "split", "text_field", "tokenizer"),
    "synthetic": (),
}


class RecipeError(ValueError):
    """A recipe or command line that cannot be run. Its text is one line: `key = value: what would be right`."""

    def __init__(self, key: str, value: Any, remedy: str) -> None:
        key = key if key.isprintable() and key.strip() and len(key) <= 100 else _shown(key)
        super().__init__(" ".join(f"{key} = {_shown(value)}: {remedy}".split()))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # tables nested a thousand deep, an integer of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float = 2**40,
) -> Any:
    """A key of a section, with what a user may write there."""
    return dataclasses.field(
        default=default, metadata=dict(help=help, choices=tuple(choices), minimum=minimum, maximum=maximum)
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """[model]: the shape of the transformer; `preset` gives every key, and each may be overridden."""

    preset: str = option("tiny", "a named shape; the keys below override it", choices=(*PRESETS, "none"))
    n_layers: int = option(0, "transformer blocks", minimum=1, maximum=10_000)
    d_model: int = option(0, "width of the residual stream", minimum=2, maximum=1_000_000)
    n_heads: int = option(0, "query heads", minimum=1, maximum=100_000)
    n_kv_heads: int = option(0, "key and value heads (grouped-query attention)", minimum=1, maximum=100_000)
    d_ff: int = option(0, "hidden width of the SwiGLU", minimum=1, maximum=10_000_000)
    vocab_size: int = option(0, "tokens in the vocabulary", minimum=2, maximum=100_000_000)
    tied_embeddings: bool = option(False, "the output projection is the embedding matrix")
    rope_theta: float = option(10_000.0, "base of the rotary frequencies", minimum=1.0)
    norm_eps: float = option(1e-5, "epsilon of RMSNorm", minimum=0.0, maximum=1.0)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True, kw_only=True)
class Data:
    """[data]: where tokens come from."""

    source: str = option(
        "stdlib",
        "stdlib: the Python standard library's own source, as bytes; files: text files as bytes; tokens: a binary"
        " file of token ids; huggingface: a dataset and a tokenizer; synthetic: random tokens, for pure speed",
        choices=tuple(DATA_KEYS),
    )
    files: tuple[str, ...] = option((), "text files or globs (source = files)")
    path: str = option("", "file of token ids (source = tokens)")
    token_dtype: str = option("uint16", "type of the ids in that file", choices=("uint16", "uint32"))
    dataset: str = option("", "name or local folder of a Hugging Face dataset (source = huggingface)")
    split: str = option("train", "its split")
    text_field: str = option("text", "its column of text")
    tokenizer: str = option("", "a tokenizer.json file or the name of a Hugging Face tokenizer")


@dataclass(frozen=True, kw_only=True)
class Train:
    """[train]: what is computed, the same under every layout."""

    steps: int = option(15, "optimizer steps", minimum=1, maximum=10**9)
    seq_len: int = option(256, "tokens in a sequence", minimum=1, maximum=2**27)
    global_batch: int = option(8, "sequences in an optimizer step, over all ranks", minimum=1, maximum=2**27)
    micro_batch: int = option(
        0, "sequences one data-parallel replica takes at once; 0: its whole share of the batch", minimum=0
    )
    seed: int = option(0, "of initial weights and data order", minimum=0, maximum=2**31 - 1)
    dtype: str = option("float32", "of computation; bfloat16 keeps float32 weights and gradients", choices=DTYPES)
    learning_rate: float = option(3e-4, "of AdamW", minimum=0.0, maximum=1e3)
    weight_decay: float = option(0.1, "of AdamW", minimum=0.0, maximum=1e3)
    grad_clip: float = option(1.0, "largest global gradient norm; 0: no clipping", minimum=0.0)
    adamw: str = option("fused", "implementation of AdamW", choices=("fused", "foreach", "for-loop"))
    attention: str = option(
        "auto",
        "kernel: auto: torch's choice; flash; cudnn: NVIDIA's, on CUDA alone; math: plain matrix products",
        choices=("auto", "flash", "cudnn", "math"),
    )
    device: str = option("auto", "auto: CUDA where each rank has a GPU, else CPU", choices=("auto", "cpu", "cuda"))
    compile: str = option("none", "torch.compile of each block", choices=("none", "inductor", "aot_eager"))
    parity: bool = option(True, "prove the layout on float64 gradients before training")
    time_limit_seconds: float = option(600.0, "after which the run is ended and recorded as such", minimum=1.0)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """[parallel]: ranks per mesh dimension; their product is the world size."""

    pp: int = option(1, "pipeline stages' ranks", minimum=1, maximum=2**20)
    dp_replicate: int = option(
        1, "data-parallel replicas with whole weights (DDP; the outer part of HSDP)", minimum=1, maximum=2**20
    )
    dp_shard: int = option(1, "data-parallel ranks that share the weights (FSDP)", minimum=1, maximum=2**20)
    cp: int = option(1, "ranks that share a sequence", minimum=1, maximum=2**20)
    tp: int = option(1, "ranks that share each matrix", minimum=1, maximum=2**20)


@dataclass(frozen=True, kw_only=True)
class Ddp:
    """[ddp]: gradient all-reduce of replicas that hold whole weights."""

    bucket_mib: float = option(25.0, "MiB of gradients per all-reduce", minimum=0.001, maximum=2**20)
    overlap: bool = option(True, "all-reduce during backward; false: after it")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """[sharding]: FSDP2."""

    reshard_after_forward: bool = option(True, "true: ZeRO-3; false: keep weights gathered until backward, ZeRO-2")
    prefetch: int = option(1, "blocks whose weights are fetched ahead", minimum=1, maximum=64)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """[tensor]: tensor parallelism."""

    sequence_parallel: bool = option(True, "norms and residuals are split along the sequence")
    loss_parallel: bool = option(True, "cross-entropy on the vocabulary shards; false: gather the logits")


@dataclass(frozen=True, kw_only=True)
class Context:
    """[context]: context parallelism."""

    method: str = option(
        "ring", "how attention sees the other ranks' keys and values", choices=("ring", "all-gather", "ulysses")
    )


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """[pipeline]: pipeline parallelism."""

    schedule: str = option("1f1b", "order of forward and backward of the microbatches", choices=SCHEDULES)
    stages_per_rank: int = option(0, "0: 1 for gpipe and 1f1b, 2 for every other schedule", minimum=0, maximum=10_000)


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """[recompute]: activation checkpointing."""

    mode: str = option("none", "none, full (each block), every(n) (each n-th block), sqrt (groups), selective")
    save: tuple[str, ...] = option(
        ("attention", "matmul"), "operations that mode = selective keeps", choices=("attention", "matmul")
    )

    @property
    def every(self) -> int:
        """n of every(n); 1 for full, 0 for the other modes."""
        match = re.fullmatch(r"every\(([0-9]{1,6})\)", self.mode)
        return int(match[1]) if match else int(self.mode == "full")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `load_recipe` reads and validates it; a Recipe that exists can be run."""

    name: str
    model: Model
    data: Data
    train: Train
    parallel: Parallel
    ddp: Ddp
    sharding: Sharding
    tensor: Tensor
    context: Context
    pipeline: Pipeline
    recompute: Recompute

    @cached_property
    def world_size(self) -> int:
        return math.prod(dataclasses.astuple(self.parallel))

    @cached_property
    def replicas(self) -> int:
        """Data-parallel replicas: groups of ranks that take different sequences."""
        return self.parallel.dp_replicate * self.parallel.dp_shard

    @cached_property
    def replica_batch(self) -> int:
        """Sequences one replica takes in a step."""
        return self.train.global_batch // self.replicas

    @cached_property
    def micro_batch(self) -> int:
        return self.train.micro_batch or self.replica_batch

    @cached_property
    def n_microbatches(self) -> int:
        """Accumulated without a pipeline, in flight with one. Without one the last may be short."""
        return -(-self.replica_batch // self.micro_batch)

    @cached_property
    def stages_per_rank(self) -> int:
        one = self.parallel.pp == 1 or self.pipeline.schedule in SINGLE_STAGE_SCHEDULES
        return self.pipeline.stages_per_rank or (1 if one else 2)

    @cached_property
    def n_stages(self) -> int:
        return self.parallel.pp * self.stages_per_rank

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain JSON types; `recipe_from_tables` gives it back."""
        tables = dataclasses.asdict(self)
        tables["data"] = {key: tables["data"][key] for key in ("source", *DATA_KEYS[self.data.source])}
        return {
            key: {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}
            if isinstance(table, dict)
            else table
            for key, table in tables.items()
        }


SECTIONS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "train": Train,
    "parallel": Parallel,
    "ddp": Ddp,
    "sharding": Sharding,
    "tensor": Tensor,
    "context": Context,
    "pipeline": Pipeline,
    "recompute": Recompute,
}


# ---- reading -------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates the TOML file `path`, with `section.key=value` overrides on top.

    Raises RecipeError. File names in [data] are relative to the working directory, as on any command line.
    """
    return recipe_from_tables(apply_overrides(read_toml(path), overrides), default_name=Path(path).stem)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; RecipeError where it cannot be read or parsed."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        raise RecipeError("file", str(path), "does not exist; see recipes/ for those shipped") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError("file", str(path), f"cannot be read ({reason}); give a TOML text file") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError comes of an integer of 5,000 digits
        raise RecipeError("file", str(path), f"is not valid TOML ({str(error)[:200]})") from None


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tables` with each `section.key=value` set; the value is read as TOML, else as a bare string."""
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in tables.items()}
    for text in overrides:
        key, equals, value_text = text.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path) or len(path) > 2:
            raise RecipeError("--set", text, "write section.key=value, as in train.steps=5")
        try:
            [value] = tomllib.loads(f"value = {value_text}").values()
        except (ValueError, RecursionError):
            value = value_text.strip()
        if len(path) == 1:
            merged[path[0]] = value
        else:
            section = merged.setdefault(path[0], {})
            if not isinstance(section, dict):
                raise RecipeError(path[0], section, f"is a section; write [{path[0]}] with keys below it")
            section[path[1]] = value
    return merged


def recipe_from_tables(tables: Mapping[str, Any], *, default_name: str = "run") -> Recipe:
    """Validates parsed TOML. Raises RecipeError at the first thing that is wrong."""
    for key, value in tables.items():
        if key not in SECTIONS and key != "name":
            kind = "section" if isinstance(value, dict) else "key"
            raise RecipeError(key, value, f"unknown {kind}" + _did_you_mean(key, [*SECTIONS, "name"]))
    name = tables.get("name", default_name)
    check_name("name", name)
    given = dict(tables)
    given["model"] = _with_preset(tables.get("model", {}))
    recipe = Recipe(name=name, **{key: _read_section(key, cls, given.get(key, {})) for key, cls in SECTIONS.items()})
    _check_model(recipe)
    _check_batch(recipe)
    _check_tensor_and_context(recipe)
    _check_pipeline(recipe)
    _check_recompute(recipe)
    _check_split_backward(recipe)
    _check_compile(recipe)
    _check_data(recipe, given.get("data", {}))
    return recipe


def check_name(key: str, name: Any) -> None:
    """A name becomes a folder: nothing that could leave its parent."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        raise RecipeError(key, name, "use letters, digits, '.', '_', '+' and '-', starting with a letter or digit")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    for section, cls in SECTIONS.items():
        if any(word == field.name for field in dataclasses.fields(cls)):
            return f" here; it belongs in [{section}]"
    close = difflib.get_close_matches(str(word)[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _with_preset(table: Any) -> Any:
    """[model] with the preset's keys under the user's, and the usual values of what neither gives."""
    if not isinstance(table, dict):
        return table
    preset = table.get("preset", "tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        required = ("n_layers", "d_model", "n_heads", "vocab_size")
        missing = [key for key in required if key not in table]
        if preset == "none" and missing:
            raise RecipeError("model.preset", preset, f"without a preset give {', '.join(missing)} too")
        merged = dict(table)
        if isinstance(merged.get("n_heads"), int):
            merged.setdefault("n_kv_heads", merged["n_heads"])
        if isinstance(merged.get("d_model"), int) and 0 < merged["d_model"] <= 1_000_000:
            merged.setdefault("d_ff", -(-8 * merged["d_model"] // 3 // 32) * 32)  # 8/3·d (Shazeer 2020), in 32s
        return merged
    return PRESETS[preset] | table


def _read_section(name: str, cls: type, table: Any) -> Any:
    if not isinstance(table, dict):
        raise RecipeError(name, table, f"is a section; write [{name}] with keys below it")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types_ = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise RecipeError(f"{name}.{key}", value, "unknown key" + _did_you_mean(key, list(fields)))
        values[key] = _read_value(f"{name}.{key}", value, types_[key], fields[key].metadata)
    return cls(**values)


def _read_value(key: str, value: Any, type_: Any, rule: Mapping[str, Any]) -> Any:
    if isinstance(type_, types.GenericAlias):  # tuple[str, ...]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RecipeError(key, value, 'give a list of strings, as in ["a", "b"]')
        for item in value:
            if rule["choices"] and item not in rule["choices"]:
                raise RecipeError(key, value, f"choose from {', '.join(rule['choices'])}")
        return tuple(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a string in quotes"}[type_]
    if type(value) is not type_ and not (type_ is float and type(value) is int):
        raise RecipeError(key, value, f"give {wanted}")
    if rule["choices"] and value not in rule["choices"]:
        raise RecipeError(key, value, f"choose {', '.join(rule['choices'])}")
    if type_ in (int, float):
        if not value <= rule["maximum"]:  # so is NaN
            raise RecipeError(key, value, f"give {wanted} of at most {rule['maximum']}")
        if value < rule["minimum"]:
            raise RecipeError(key, value, f"give {wanted} of at least {rule['minimum']}")
        return type_(value)  # a whole number where a float is wanted
    return value


# ---- what cannot be ------------------------------------------------------------------------------------------------


def _must_divide(key: str, part: int, whole_key: str, whole: int, *, fits_also: int = 0) -> None:
    """`fits_also`: another number that the key must divide, so that the values offered do."""
    if whole % part:
        common = math.gcd(whole, fits_also)
        fits = [n for n in range(1, min(common, 64) + 1) if common % n == 0]
        raise RecipeError(key, part, f"does not divide {whole_key} = {whole}; use one of {', '.join(map(str, fits))}")


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    _must_divide("model.n_heads", model.n_heads, "model.d_model", model.d_model)
    _must_divide("model.n_kv_heads", model.n_kv_heads, "model.n_heads", model.n_heads)
    if model.head_dim % 2:
        raise RecipeError(
            "model.n_heads",
            model.n_heads,
            f"gives heads of d_model / n_heads = {model.head_dim}; rotary positions need an even head size",
        )


def _check_batch(recipe: Recipe) -> None:
    train, parallel = recipe.train, recipe.parallel
    if recipe.world_size > 2**24:
        raise RecipeError("parallel", recipe.world_size, f"is the world size; at most {2**24} ranks")
    if train.global_batch % recipe.replicas:
        raise RecipeError(
            "train.global_batch",
            train.global_batch,
            f"is not divisible by the {recipe.replicas} replicas (dp_replicate {parallel.dp_replicate} ·"
            f" dp_shard {parallel.dp_shard}); use a multiple of {recipe.replicas}",
        )
    if train.micro_batch > recipe.replica_batch:
        raise RecipeError(
            "train.micro_batch",
            train.micro_batch,
            f"is more than the {recipe.replica_batch} sequences of one replica (global_batch {train.global_batch}"
            f" / {recipe.replicas} replicas); use at most {recipe.replica_batch}",
        )


def _check_tensor_and_context(recipe: Recipe) -> None:
    model, parallel, seq_len = recipe.model, recipe.parallel, recipe.train.seq_len
    tp, cp = parallel.tp, parallel.cp
    fits_all = math.gcd(model.n_kv_heads, model.d_ff)
    _must_divide("parallel.tp", tp, "model.n_heads", model.n_heads, fits_also=fits_all)
    _must_divide("parallel.tp", tp, "model.n_kv_heads", model.n_kv_heads, fits_also=fits_all)
    _must_divide("parallel.tp", tp, "model.d_ff", model.d_ff, fits_also=fits_all)
    if tp > 1 and -(-model.vocab_size // tp) * (tp - 1) >= model.vocab_size:
        raise RecipeError(
            "model.vocab_size", model.vocab_size, f"leaves a rank of tp = {tp} without rows; use at least {tp * tp}"
        )
    _must_divide("parallel.cp", cp, "train.seq_len", seq_len)
    if cp > 1 and recipe.context.method != "ulysses" and recipe.train.attention != "auto":
        raise RecipeError(
            "train.attention",
            recipe.train.attention,
            f"context.method = {recipe.context.method} brings its own kernels; set it to auto, or take ulysses",
        )
    if cp > 1 and recipe.context.method == "ulysses":
        heads, kv_heads = model.n_heads // tp, model.n_kv_heads // tp
        _must_divide("parallel.cp", cp, "model.n_heads / tp (context.method = ulysses gives each rank heads)", heads)
        if kv_heads % cp and cp % kv_heads:
            raise RecipeError(
                "parallel.cp",
                cp,
                f"neither divides nor is a multiple of n_kv_heads / tp = {kv_heads}, as context.method = ulysses"
                " needs; use context.method = ring",
            )
    elif cp > 1 and seq_len % (2 * cp):
        raise RecipeError(
            "train.seq_len",
            seq_len,
            f"is not divisible by 2 · cp = {2 * cp}: each rank takes one early and one late chunk (zig-zag);"
            f" use a multiple of {2 * cp}",
        )
    if tp > 1 and recipe.tensor.sequence_parallel and (seq_len // cp) % tp:
        raise RecipeError(
            "train.seq_len",
            seq_len,
            f"gives {seq_len // cp} tokens per context rank, not divisible by tp = {tp} for sequence parallelism;"
            " change one of them or set tensor.sequence_parallel = false",
        )


def _check_pipeline(recipe: Recipe) -> None:
    pipeline, pp = recipe.pipeline, recipe.parallel.pp
    if pp == 1:
        if pipeline.stages_per_rank > 1:
            raise RecipeError("pipeline.stages_per_rank", pipeline.stages_per_rank, "needs parallel.pp of at least 2")
        return
    single = pipeline.schedule in SINGLE_STAGE_SCHEDULES
    if pipeline.stages_per_rank and single != (pipeline.stages_per_rank == 1):
        allowed = "1" if single else "2 or more"
        raise RecipeError(
            "pipeline.stages_per_rank", pipeline.stages_per_rank, f"{pipeline.schedule} takes {allowed} (or 0)"
        )
    if pipeline.schedule in V_SCHEDULES and recipe.stages_per_rank != 2:
        raise RecipeError(
            "pipeline.stages_per_rank", pipeline.stages_per_rank, f"{pipeline.schedule} is a V of exactly 2 (or 0)"
        )
    if recipe.model.n_layers < recipe.n_stages:
        raise RecipeError(
            "model.n_layers",
            recipe.model.n_layers,
            f"is fewer than the {recipe.n_stages} stages (pp {pp} · stages_per_rank {recipe.stages_per_rank});"
            " use more layers or fewer stages",
        )
    if recipe.replica_batch % recipe.micro_batch:
        raise RecipeError(
            "train.micro_batch",
            recipe.micro_batch,
            f"does not divide the {recipe.replica_batch} sequences of one replica; pipeline microbatches must be equal",
        )
    _check_microbatches(recipe)


def _check_microbatches(recipe: Recipe) -> None:
    """What each schedule asks of the number of microbatches (torch.distributed.pipelining)."""
    pp, n, schedule = recipe.parallel.pp, recipe.n_microbatches, recipe.pipeline.schedule
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
    rounds = max(1, n // pp) if schedule in ("interleaved-1f1b", "interleaved-zero-bubble") else 1
    if n < least or n % rounds:
        wanted = f"fewer than {2 * pp} or a multiple of pp = {pp}" if n % rounds else f"at least {least}"
        raise RecipeError(
            "train.micro_batch",
            recipe.micro_batch,
            f"gives {n} microbatches (global_batch {recipe.train.global_batch} / (replicas {recipe.replicas} ·"
            f" micro_batch)); {schedule} needs {wanted}",
        )


def _check_split_backward(recipe: Recipe) -> None:
    """Schedules that compute the gradients of inputs first and those of weights later, from the same activations."""
    schedule = recipe.pipeline.schedule
    if recipe.parallel.pp == 1 or schedule not in SPLIT_BACKWARD_SCHEDULES:
        return
    if recipe.parallel.dp_shard > 1 and recipe.sharding.reshard_after_forward:
        raise RecipeError(
            "sharding.reshard_after_forward",
            True,
            f"pipeline.schedule = {schedule} finds the weights gone when it comes to their gradients; set it to false",
        )
    if recipe.recompute.mode != "none":
        raise RecipeError(
            "recompute.mode",
            recipe.recompute.mode,
            f"pipeline.schedule = {schedule} would recompute a block once for each of its weights; set it to none, or"
            " take another schedule",
        )


def _check_recompute(recipe: Recipe) -> None:
    mode = recipe.recompute.mode
    if mode not in ("none", "full", "sqrt", "selective") and not recipe.recompute.every:
        raise RecipeError("recompute.mode", mode, "choose none, full, every(n) with n of at least 1, sqrt or selective")
    if mode == "selective" and not recipe.recompute.save:
        raise RecipeError("recompute.save", [], "name at least one operation, or set recompute.mode = full")


def _check_compile(recipe: Recipe) -> None:
    """Where torch.compile fails, or would leave whole blocks eager without a word."""
    parallel, method, mode = recipe.parallel, recipe.context.method, recipe.recompute.mode
    whole_blocks = recipe.recompute.every > 0
    refusals = (
        (
            parallel.pp > 1 and recipe.pipeline.schedule in SPLIT_BACKWARD_SCHEDULES,
            f"pipeline.schedule = {recipe.pipeline.schedule} cuts backward in two, which torch.compile cannot;"
            " take another schedule",
        ),
        (
            parallel.tp > 1 and whole_blocks,
            f"with parallel.tp > 1 and recompute.mode = {mode} torch.compile fails (it saves a DeviceMesh as if it were"
            " a tensor); set recompute.mode to selective or sqrt",
        ),
        (
            parallel.cp > 1 and method != "ulysses" and (whole_blocks or mode == "selective"),
            f"cannot trace the messages of context.method = {method}, and would leave blocks eager under"
            f" recompute.mode = {mode}; set recompute.mode to none or sqrt, or context.method = ulysses",
        ),
    )
    for refused, reason in refusals:
        if recipe.train.compile != "none" and refused:
            raise RecipeError("train.compile", recipe.train.compile, f"{reason}, or set train.compile = none")


def _check_data(recipe: Recipe, given: Mapping[str, Any]) -> None:
    data = recipe.data
    used = DATA_KEYS[data.source]
    for key, value in given.items():
        if key != "source" and key not in used:
            raise RecipeError(f"data.{key}", value, f"has no meaning with data.source = {data.source}; remove it")
    for key in ("files", "path", "dataset", "tokenizer"):
        if key in used and not getattr(data, key):
            raise RecipeError(f"data.{key}", getattr(data, key), f"is needed with data.source = {data.source}")
    if data.source in ("stdlib", "files") and recipe.model.vocab_size < 256:
        raise RecipeError(
            "model.vocab_size", recipe.model.vocab_size, f"data.source = {data.source} gives bytes; use at least 256"
        )
