"""What goes with what: a Recipe that exists can be run, but for what only its hosts can tell (devices, data)."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from parallel.recipe.engine_rules import check_engine
from parallel.recipe.sections import DATA_KEYS, RecipeError, Sections


@dataclass(frozen=True, kw_only=True)
class Recipe(Sections):
    """One run. Raises RecipeError, in one line that names the key, its value and what would be right."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for check in (
            *(_check_model, _check_batch, _check_tensor_and_context, _check_pipeline),
            *(_check_recompute, _check_split_backward, _check_compile, _check_data, check_engine),
        ):
            check(self)

    def on(self, device: Literal["cpu", "cuda"]) -> Self:
        """The same, with that train.device."""
        return replace(self, train=replace(self.train, device=device))


def check_name(key: str, name: Any) -> None:
    """A name becomes a folder: nothing that could leave its parent."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        remedy = "use letters, digits, '.', '_', '+' and '-', at most 100, starting with a letter or digit"
        raise RecipeError(key, name, remedy)


def _must_divide(key: str, part: int, whole_key: str, whole: int, *, fits_also: int = 0) -> None:
    """`fits_also`: another number that the key must divide, so that the values offered do."""
    if whole % part:
        common = math.gcd(whole, fits_also)
        fits = [n for n in range(1, min(common, 64) + 1) if common % n == 0]
        raise RecipeError(key, part, f"does not divide {whole_key} = {whole}; use one of {', '.join(map(str, fits))}")


def _check_model(recipe: Sections) -> None:
    model = recipe.model
    _must_divide("model.n_heads", model.n_heads, "model.d_model", model.d_model)
    _must_divide("model.n_kv_heads", model.n_kv_heads, "model.n_heads", model.n_heads)
    if model.head_dim % 2:
        raise RecipeError(
            "model.n_heads",
            model.n_heads,
            f"gives heads of d_model / n_heads = {model.head_dim}; rotary positions need an even head size",
        )


def _check_batch(recipe: Sections) -> None:
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
    if train.loss_chunks > (tokens := max(train.seq_len // parallel.cp, 1)):
        remedy = f"is more than the {tokens} tokens of a sequence on a rank; use at most {tokens}"
        raise RecipeError("train.loss_chunks", train.loss_chunks, remedy)


def _check_tensor_and_context(recipe: Sections) -> None:
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
    if cp > 1 and recipe.context.zigzag and recipe.train.attention != "auto":
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
    elif cp > 1 and recipe.context.zigzag and seq_len % (2 * cp):
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


def _check_pipeline(recipe: Sections) -> None:
    pipeline, pp = recipe.pipeline, recipe.parallel.pp
    if pp == 1:
        if pipeline.stages_per_rank > 1:
            raise RecipeError("pipeline.stages_per_rank", pipeline.stages_per_rank, "needs parallel.pp of at least 2")
        return
    if pipeline.stages_per_rank and pipeline.single_stage != (pipeline.stages_per_rank == 1):
        allowed = "1" if pipeline.single_stage else "2 or more"
        raise RecipeError(
            "pipeline.stages_per_rank", pipeline.stages_per_rank, f"{pipeline.schedule} takes {allowed} (or 0)"
        )
    if pipeline.is_v and recipe.stages_per_rank != 2:
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


def _check_microbatches(recipe: Sections) -> None:
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


def _check_split_backward(recipe: Sections) -> None:
    schedule = recipe.pipeline.schedule
    if recipe.parallel.pp == 1 or not recipe.pipeline.splits_backward:
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


def _check_recompute(recipe: Sections) -> None:
    mode = recipe.recompute.mode
    if mode not in ("none", "full", "sqrt", "selective") and not recipe.recompute.every:
        raise RecipeError("recompute.mode", mode, "choose none, full, every(n) with n of at least 1, sqrt or selective")
    if mode == "selective" and not recipe.recompute.save:
        raise RecipeError("recompute.save", [], "name at least one operation, or set recompute.mode = full")


def _check_compile(recipe: Sections) -> None:
    """Where torch.compile fails, or would leave whole blocks eager without a word."""
    parallel, context, mode = recipe.parallel, recipe.context, recipe.recompute.mode
    whole_blocks = recipe.recompute.every > 0
    refusals = (
        (
            parallel.pp > 1 and recipe.pipeline.splits_backward,
            f"pipeline.schedule = {recipe.pipeline.schedule} cuts backward in two, which torch.compile cannot;"
            " take another schedule",
        ),
        (
            parallel.tp > 1 and whole_blocks,
            f"with parallel.tp > 1 and recompute.mode = {mode} torch.compile fails (it saves a DeviceMesh as if it were"
            " a tensor); set recompute.mode to selective or sqrt",
        ),
        (
            parallel.cp > 1 and context.zigzag and (whole_blocks or mode == "selective"),
            f"cannot trace the messages of context.method = {context.method}, and would leave blocks eager under"
            f" recompute.mode = {mode}; set recompute.mode to none or sqrt, or context.method = ulysses",
        ),
    )
    for refused, reason in refusals:
        if recipe.train.compile != "none" and refused:
            raise RecipeError("train.compile", recipe.train.compile, f"{reason}, or set train.compile = none")


def _check_data(recipe: Sections) -> None:
    data = recipe.data
    for key in ("files", "path", "dataset", "tokenizer"):
        if key in DATA_KEYS[data.source] and not getattr(data, key):
            raise RecipeError(f"data.{key}", getattr(data, key), f"is needed with data.source = {data.source}")
    if data.source in ("stdlib", "files") and recipe.model.vocab_size < 256:
        raise RecipeError(
            "model.vocab_size", recipe.model.vocab_size, f"data.source = {data.source} gives bytes; use at least 256"
        )
