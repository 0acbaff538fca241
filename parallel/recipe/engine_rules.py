"""What other engines cannot do, or not as a recipe says, and what must be installed: refused, with the reason."""

import importlib.util
from typing import Any

from parallel.recipe.sections import RecipeError, Sections

# What Accelerate 1.15 does not split, and why.
NOT_BY_ACCELERATE = {
    "pp": "has a pipeline for inference alone (prepare_pippy)",
    "tp": "leaves tensor parallelism to a plan in the model, as transformers has, and splits nothing itself",
    "cp": "hands attention to torch's context_parallel, which has no kernel for a CPU",
}


def check_engine(recipe: Sections) -> None:
    """What another engine cannot do, or not as the recipe says."""
    name, parallel, train = recipe.engine.name, recipe.parallel, recipe.train
    deepspeed = recipe.engine.by_deepspeed
    if name != "accelerate" and recipe.engine.plugin != "torch":
        remedy = f"is read by engine.name = accelerate alone, and this is {name}; remove it"
        raise RecipeError("engine.plugin", recipe.engine.plugin, remedy)
    for key, default in {"zero_stage": 3, "offload": "none", "checkpointing": "torch"}.items():
        value = getattr(recipe.engine, key)
        if not deepspeed and value != default:
            remedy = f"is read by engine.name = deepspeed alone, and this is {name}; remove it"
            raise RecipeError(f"engine.{key}", value, remedy)
    if name == "native":
        return
    native = "or set engine.name = native"
    for dim, reason in NOT_BY_ACCELERATE.items() if name == "accelerate" else ():
        if getattr(parallel, dim) > 1:
            remedy = f"engine.name = accelerate (1.15) {reason}; use 1, {native}"
            raise RecipeError(f"parallel.{dim}", getattr(parallel, dim), remedy)
    if deepspeed:
        _check_deepspeed(recipe, native)
    if deepspeed and parallel.dp_shard == parallel.pp == 1 and train.dtype == "bfloat16":
        remedy = (
            "without dp_shard engine.name = deepspeed takes an optimizer step on zero gradients before the first one,"
            f" and does not train as others do; use dp_shard with engine.zero_stage = 1, {native}"
        )
        raise RecipeError("train.dtype", train.dtype, remedy)
    if deepspeed and train.dtype == "float64":
        remedy = f"engine.name = deepspeed adds gradients in float32 at most; use float32, {native}"
        raise RecipeError("train.dtype", train.dtype, remedy)
    fixed: tuple[tuple[str, Any, Any, str], ...] = (
        ("train.compile", train.compile, "none", "is compiled by the native engine alone"),
        ("ddp.overlap", recipe.ddp.overlap, True, "sends gradients during backward, if it can"),
        ("sharding.prefetch", recipe.sharding.prefetch, 1, "fetches weights ahead in its own way"),
        ("checkpoint.every", recipe.checkpoint.every, 0, "is not saved yet"),
        ("train.non_finite", train.non_finite, "stop", "takes every step"),
    )
    if deepspeed:
        fixed += (
            ("ddp.bucket_mib", recipe.ddp.bucket_mib, 25.0, "has buckets of its own"),
            (
                "sharding.reshard_after_forward",
                recipe.sharding.reshard_after_forward,
                True,
                "has engine.zero_stage = 2 for that",
            ),
        )
    for key, value, only, reason in fixed:
        if value != only:
            shown = str(only).lower() if isinstance(only, bool) else only
            raise RecipeError(key, value, f"engine.name = {name} {reason}; use {shown}, {native}")


def _check_deepspeed(recipe: Sections, native: str) -> None:
    engine, parallel, model = recipe.engine, recipe.parallel, recipe.model
    pp, sharded, replicated = parallel.pp > 1, parallel.dp_shard > 1, parallel.dp_replicate > 1
    refusals: tuple[tuple[bool, str, Any, str], ...] = (
        (
            pp + (parallel.tp > 1) + (parallel.cp > 1) > 1,
            *("parallel", f"pp {parallel.pp} · cp {parallel.cp} · tp {parallel.tp}"),
            f"engine.name = deepspeed takes one of the three beside data here; use that, {native}",
        ),
        (
            pp and (engine.zero_stage > 1 or replicated),
            *("engine.zero_stage", engine.zero_stage),
            "DeepSpeed's pipeline goes with ZeRO 1 alone, over dp_shard: without it, it clips each stage by a norm of"
            f" its own; use engine.zero_stage = 1 and dp_replicate = 1, {native}",
        ),
        (
            pp and recipe.pipeline.schedule != "1f1b",
            *("pipeline.schedule", recipe.pipeline.schedule),
            f"engine.name = deepspeed has 1f1b alone; use that, {native}",
        ),
        (
            pp and model.tied_embeddings,
            *("model.tied_embeddings", True),
            f"is not handed to DeepSpeed's pipeline; use false, {native}",
        ),
        (
            pp and recipe.train.loss_chunks > 1,
            *("train.loss_chunks", recipe.train.loss_chunks),
            f"DeepSpeed's pipeline takes a loss of whole logits; use 1, {native}",
        ),
        (
            replicated and sharded and (engine.zero_stage < 3 or parallel.cp > 1 or parallel.tp > 1),
            *("parallel.dp_replicate", parallel.dp_replicate),
            "with dp_shard it is hpZ for engine.name = deepspeed, of engine.zero_stage = 3 and without cp and tp; use"
            f" that, or one of the two, {native}",
        ),
        (
            engine.offload != "none" and not sharded,
            *("engine.offload", engine.offload),
            "is of what ranks of dp_shard share; use parallel.dp_shard above 1, or none",
        ),
        (
            engine.offload == "parameters" and engine.zero_stage < 3,
            *("engine.offload", engine.offload),
            "needs engine.zero_stage = 3; use that, or optimizer",
        ),
        (
            engine.checkpointing == "deepspeed" and not recipe.recompute.every,
            *("engine.checkpointing", engine.checkpointing),
            f"is of whole blocks, and recompute.mode is {recipe.recompute.mode}; use full or every(n), or torch",
        ),
        (
            parallel.cp > 1 and recipe.context.method != "ulysses",
            *("context.method", recipe.context.method),
            f"engine.name = deepspeed has ulysses alone; use that, {native}",
        ),
        (
            parallel.cp > 1 and model.n_kv_heads % parallel.cp > 0,
            *("parallel.cp", parallel.cp),
            f"does not divide model.n_kv_heads = {model.n_kv_heads}, which DeepSpeed hands out; {native[3:]}",
        ),
        (
            parallel.tp > 1 and recipe.tensor.sequence_parallel,
            *("tensor.sequence_parallel", True),
            f"engine.name = deepspeed has no sequence parallelism; use false, {native}",
        ),
    )
    for refused, key, value, remedy in refusals:
        if refused:
            raise RecipeError(key, value, remedy)


TRACKER_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX"}  # by their keys of [track], which name extras


def refuse_missing_packages(recipe: Sections) -> None:
    """RecipeError where the recipe's engine or a tracker of it is not installed on this host."""
    engine, track = recipe.engine, recipe.track
    engines = [("name", engine.name), ("plugin", engine.plugin)]
    needs: list[tuple[str, Any, str, str]]  # key, value, package, extra
    needs = [(f"engine.{key}", value, value, value) for key, value in engines if value not in ("native", "torch")]
    needs += [(f"track.{key}", getattr(track, key), TRACKER_PACKAGES[key], key) for key in track.chosen]
    for key, value, package, extra in needs:
        if importlib.util.find_spec(package) is None:
            raise RecipeError(key, value, f"is not installed; pip install 'parallel-lab[{extra}]'")
