"""The tables of a recipe: what each key means, what may be written there, and what follows from them together.

Nothing heavy is imported here, so that `lab check` answers at once.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

Dtype = Literal["float32", "bfloat16", "float64"]
Source = Literal["stdlib", "files", "tokens", "huggingface", "synthetic"]
AdamW = Literal["fused", "foreach", "for-loop"]
AttentionKernel = Literal["auto", "flash", "cudnn", "math"]
Compiler = Literal["none", "inductor", "aot_eager"]
ContextMethod = Literal["ring", "all-gather", "ulysses"]
Operation = Literal["attention", "matmul"]
Schedule = Literal[
    "gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "interleaved-zero-bubble", "zbv", "dualpipev"
]  # fmt: skip
EngineName = Literal["native", "deepspeed", "accelerate"]
Offload = Literal["none", "optimizer", "parameters"]
Plugin = Literal["torch", "deepspeed"]
Checkpointing = Literal["torch", "deepspeed"]
WandbMode = Literal["off", "offline", "online"]
Preset = Literal["tiny", "small", "smollm-1.7b", "llama3-8b", "llama3-70b", "llama3-405b", "none"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
SINGLE_STAGE_SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b")
V_SCHEDULES: tuple[Schedule, ...] = ("zbv", "dualpipev")  # rank r holds stages r and 2·pp - 1 - r
SPLIT_BACKWARD_SCHEDULES: tuple[Schedule, ...] = ("interleaved-zero-bubble", "zbv", "dualpipev")  # dI, then dW

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
DATA_KEYS: dict[Source, tuple[str, ...]] = {
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
    """`value` as it is written in a recipe, so that it can be copied into one."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except (RecursionError, ValueError):  # tables nested a thousand deep, an integer of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float = 2**40, short: str = "") -> Any:
    """A key of a section, with what a user may write there. short: its name where there is little room."""
    return dataclasses.field(default=default, metadata=dict(help=help, minimum=minimum, maximum=maximum, short=short))


def choices(type_: Any) -> tuple[str, ...]:
    """What may be written for a Literal or a tuple of one; () where anything of the type may."""
    return get_args(get_args(type_)[0] if isinstance(type_, types.GenericAlias) else type_)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table of a recipe. Its values are checked as it is made, by `dataclasses.replace` too. Raises RecipeError."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            key = f"{type(self).__name__.lower()}.{field.name}"
            value = _checked(key, getattr(self, field.name), hints[field.name], field.metadata)
            object.__setattr__(self, field.name, value)  # frozen for everybody else


def _checked(key: str, value: Any, type_: Any, rule: Mapping[str, Any]) -> Any:
    """`value` as its field holds it: a list as a tuple, a whole number as a float where that is wanted."""
    allowed = choices(type_)
    if isinstance(type_, types.GenericAlias):  # tuple[str, ...]
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise RecipeError(key, value, 'give a list of strings, as in ["a", "b"]')
        if allowed and not set(value) <= set(allowed):
            raise RecipeError(key, list(value), f"choose from {', '.join(allowed)}")
        return tuple(value)
    if allowed and value not in allowed:
        raise RecipeError(key, value, f"choose {', '.join(allowed)}")
    type_ = str if allowed else type_
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a string in quotes"}[type_]
    if type(value) is not type_ and not (type_ is float and type(value) is int):
        raise RecipeError(key, value, f"give {wanted}")
    if type_ in (int, float):
        if not value <= rule["maximum"]:  # so is NaN
            raise RecipeError(key, value, f"give {wanted} of at most {rule['maximum']}")
        if value < rule["minimum"]:
            raise RecipeError(key, value, f"give {wanted} of at least {rule['minimum']}")
    return type_(value)


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    """[model]: the shape of the transformer; `preset` gives every key, and each may be overridden."""

    preset: Preset = option("tiny", "a named shape; the keys below override it")
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

    @property
    def block_matrices(self) -> int:
        """Elements of the matrices of one block: q and out, k and v; gate, up and down."""
        attention = 2 * (self.n_heads + self.n_kv_heads) * self.head_dim * self.d_model
        return attention + 3 * self.d_model * self.d_ff

    @property
    def n_parameters(self) -> int:
        """Elements of all weights of the transformer, a tied matrix once."""
        ends = (1 if self.tied_embeddings else 2) * self.vocab_size * self.d_model + self.d_model
        return self.n_layers * (self.block_matrices + 2 * self.d_model) + ends  # two norms a block


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """[data]: where tokens come from."""

    source: Source = option(
        "stdlib",
        "stdlib: the Python standard library's own source, as bytes; files: text files as bytes; tokens: a binary"
        " file of token ids; huggingface: a dataset and a tokenizer; synthetic: random tokens, for pure speed",
    )
    files: tuple[str, ...] = option((), "text files or globs (source = files)")
    path: str = option("", "file of token ids (source = tokens)")
    token_dtype: Literal["uint16", "uint32"] = option("uint16", "type of the ids in that file")
    dataset: str = option("", "name or local folder of a Hugging Face dataset (source = huggingface)")
    split: str = option("train", "its split")
    text_field: str = option("text", "its column of text")
    tokenizer: str = option("", "a tokenizer.json file or the name of a Hugging Face tokenizer")


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """[train]: what is computed, the same under every layout."""

    steps: int = option(15, "optimizer steps", minimum=1, maximum=10**9)
    seq_len: int = option(256, "tokens in a sequence", minimum=1, maximum=2**27)
    global_batch: int = option(8, "sequences in an optimizer step, over all ranks", minimum=1, maximum=2**27)
    micro_batch: int = option(
        0, "sequences one data-parallel replica takes at once; 0: its whole share of the batch", minimum=0
    )
    seed: int = option(0, "of initial weights and data order", minimum=0, maximum=2**31 - 1)
    dtype: Dtype = option("float32", "of computation; bfloat16 keeps float32 weights and gradients")
    learning_rate: float = option(3e-4, "of AdamW", minimum=0.0, maximum=1e3)
    weight_decay: float = option(0.1, "of AdamW", minimum=0.0, maximum=1e3)
    grad_clip: float = option(1.0, "largest global gradient norm; 0: no clipping", minimum=0.0)
    adamw: AdamW = option("fused", "implementation of AdamW")
    non_finite: Literal["stop", "skip"] = option(
        "stop",
        "gradient norm that is no finite number: stop: ends the run; skip: leaves the step out, but not 11 in a row",
    )
    attention: AttentionKernel = option(
        "auto", "kernel: auto: torch's choice; flash; cudnn: NVIDIA's, on CUDA alone; math: plain matrix products"
    )
    loss_chunks: int = option(
        1, "pieces of a microbatch's tokens for which output and loss are computed one by one", minimum=1, maximum=2**27
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: CUDA where each rank has a GPU, else CPU")
    compile: Compiler = option("none", "torch.compile of each block")
    parity: bool = option(True, "prove the layout on float64 gradients before training")
    time_limit_seconds: float = option(600.0, "after which the run is ended and recorded as such", minimum=1.0)


def _ranks(short: str, help: str) -> Any:
    return option(1, help, minimum=1, maximum=2**20, short=short)


@dataclass(frozen=True, kw_only=True)
class Parallel(Section):
    """[parallel]: ranks per mesh dimension, from the outermost to that of neighbours; their product is the world size.

    These fields are the mesh: parallel/mesh.py builds it from them, and says which ranks share what.
    """

    pp: int = _ranks("pp", "pipeline stages' ranks")
    dp_replicate: int = _ranks("dp", "data-parallel replicas with whole weights (DDP; the outer part of HSDP)")
    dp_shard: int = _ranks("fsdp", "data-parallel ranks that share the weights (FSDP)")
    cp: int = _ranks("cp", "ranks that share a sequence")
    tp: int = _ranks("tp", "ranks that share each matrix")


# The dimensions of the mesh, in its order, and their short names.
MESH_DIMS: dict[str, str] = {field.name: field.metadata["short"] for field in dataclasses.fields(Parallel)}


@dataclass(frozen=True, kw_only=True)
class Ddp(Section):
    """[ddp]: gradient all-reduce of replicas that hold whole weights."""

    bucket_mib: float = option(25.0, "MiB of gradients per all-reduce", minimum=0.001, maximum=2**20)
    overlap: bool = option(True, "all-reduce during backward; false: after it")


@dataclass(frozen=True, kw_only=True)
class Sharding(Section):
    """[sharding]: FSDP2."""

    reshard_after_forward: bool = option(True, "true: ZeRO-3; false: keep weights gathered until backward, ZeRO-2")
    prefetch: int = option(1, "blocks whose weights are fetched ahead", minimum=1, maximum=64)


@dataclass(frozen=True, kw_only=True)
class Tensor(Section):
    """[tensor]: tensor parallelism."""

    sequence_parallel: bool = option(True, "norms and residuals are split along the sequence")
    loss_parallel: bool = option(True, "cross-entropy on the vocabulary shards; false: gather the logits")


@dataclass(frozen=True, kw_only=True)
class Context(Section):
    """[context]: context parallelism."""

    method: ContextMethod = option("ring", "how attention sees the other ranks' keys and values")

    @property
    def zigzag(self) -> bool:
        """A rank holds an early and a late chunk of the sequence, and attends piece by piece, with its own kernels."""
        return self.method in ("ring", "all-gather")


@dataclass(frozen=True, kw_only=True)
class Pipeline(Section):
    """[pipeline]: pipeline parallelism."""

    schedule: Schedule = option("1f1b", "order of forward and backward of the microbatches")
    stages_per_rank: int = option(0, "0: 1 for gpipe and 1f1b, 2 for every other schedule", minimum=0, maximum=10_000)

    @property
    def single_stage(self) -> bool:
        return self.schedule in SINGLE_STAGE_SCHEDULES

    @property
    def is_v(self) -> bool:
        return self.schedule in V_SCHEDULES

    @property
    def splits_backward(self) -> bool:
        """Gradients of inputs first and those of weights later, from the same activations."""
        return self.schedule in SPLIT_BACKWARD_SCHEDULES


@dataclass(frozen=True, kw_only=True)
class Recompute(Section):
    """[recompute]: activation checkpointing."""

    mode: str = option("none", "none, full (each block), every(n) (each n-th block), sqrt (groups), selective")
    save: tuple[Operation, ...] = option(("attention", "matmul"), "operations that mode = selective keeps")

    @property
    def every(self) -> int:
        """n of every(n); 1 for full, 0 for the other modes."""
        match = re.fullmatch(r"every\(([0-9]{1,6})\)", self.mode)
        return int(match[1]) if match else int(self.mode == "full")


@dataclass(frozen=True, kw_only=True)
class Engine(Section):
    """[engine]: who splits the model and executes its steps."""

    name: EngineName = option("native", "native: the lab's own; deepspeed and accelerate: theirs, where installed")
    zero_stage: int = option(
        3,
        "deepspeed: what ranks of dp_shard share: 1: the optimizer's state; 2: gradients, too; 3: weights, too",
        minimum=1,
        maximum=3,
    )

    offload: Offload = option(
        "none", "deepspeed: what rests in the memory of the host: the optimizer's state; parameters: weights, too"
    )
    plugin: Plugin = option("torch", "accelerate: what it splits with: torch's DDP and FSDP2, or DeepSpeed's ZeRO")
    checkpointing: Checkpointing = option("torch", "deepspeed: whose code executes [recompute]; deepspeed: its own")

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed splits the model, whoever calls it."""
        return self.name == "deepspeed" or self.plugin == "deepspeed"

    @property
    def exact_dtype(self) -> Dtype:
        """The most exact type in which it computes gradients: DeepSpeed adds those of ranks in float32 at most."""
        return "float32" if self.by_deepspeed else "float64"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """[checkpoint]: what a run saves of itself, to go on from."""

    every: int = option(0, "steps from one to the next, and the last step; 0: never", minimum=0, maximum=10**9)
    keep: int = option(2, "how many of the last ones stay", minimum=1, maximum=10**6)
    asynchronous: bool = option(False, "written in the background, from a copy in memory")


@dataclass(frozen=True, kw_only=True)
class Track(Section):
    """[track]: who is told of steps and results, beside the plain files."""

    wandb: WandbMode = option("off", "Weights & Biases; offline: in files alone, for wandb sync; online: sent at once")
    tensorboard: bool = option(False, "event files for TensorBoard")

    @property
    def chosen(self) -> list[str]:
        """The keys of those that are on."""
        return [key for key, value in vars(self).items() if value not in ("off", False)]


@dataclass(frozen=True, kw_only=True)
class Sections:
    """A name and every section: what a Recipe is made of, before it is known that they go together."""

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
    engine: Engine
    checkpoint: Checkpoint
    track: Track

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
        one = self.parallel.pp == 1 or self.pipeline.single_stage
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


SECTIONS: dict[str, type[Section]] = typing.get_type_hints(Sections)
del SECTIONS["name"]
