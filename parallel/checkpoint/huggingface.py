"""Weights out of a checkpoint and into one: a safetensors file, or a folder as Hugging Face's Llama has it.

The two models are the same: rotary positions in the half-split layout, grouped heads in the same order, matrices of
shape (out, in). So a weight changes its name and nothing else.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel.checkpoint.files import Checkpoint, step_folder
from parallel.checkpoint.storage import SafetensorsWriter, whole_tensor
from parallel.recipe import Dtype, Model, Recipe, RecipeError, recipe_from_tables
from parallel.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON_BYTES = 64 * 2**20
NAMES = {  # ours -> theirs
    "embedding": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
KEYS = {  # ours -> theirs, in config.json
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
# What their Llama can be and this model is not.
PLAIN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


def their_name(name: str) -> str:
    """ "blocks.3.attention.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    name = name.removesuffix(".weight")
    if not name.startswith("blocks."):
        return f"{NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{NAMES[rest]}.weight"


def weight_shapes(model: Model) -> dict[str, torch.Size]:
    """Of every parameter of the whole model, by name; a tied matrix once."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(model, seq_len=1).named_parameters()}


# ---- out -----------------------------------------------------------------------------------------------------------


def export(checkpoint: Checkpoint, to: Path) -> None:
    """The weights, without the optimizer's state: one file where `to` ends with .safetensors, else a folder."""
    recipe = recipe_from_tables(checkpoint.recipe)
    weights = {name: whole_tensor(checkpoint, name) for name in weight_shapes(recipe.model)}
    if to.suffix == ".safetensors":
        to.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(weights, to, metadata={"format": "pt"})
        return
    to.mkdir(parents=True)
    theirs = {their_name(name): weight for name, weight in weights.items()}
    safetensors.torch.save_file(theirs, to / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config_of(recipe, checkpoint.tensors["norm.weight"].dtype), indent=2)
    (to / CONFIG).write_text(text + "\n", encoding="utf-8")


def config_of(recipe: Recipe, dtype: str) -> dict[str, Any]:
    model = recipe.model
    return {
        "architectures": ["LlamaForCausalLM"],
        **PLAIN,
        **{theirs: getattr(model, ours) for ours, theirs in KEYS.items()},
        "head_dim": model.head_dim,
        "max_position_embeddings": recipe.train.seq_len,
        "rope_theta": model.rope_theta,
        "torch_dtype": dtype,
    }


# ---- in ------------------------------------------------------------------------------------------------------------


def import_weights(source: Path, run: Path) -> Recipe:
    """Makes `run` the folder of a run whose checkpoint, of step 0, holds the weights of the folder `source`.

    Raises RecipeError for a model that is not this one, in a line that says in what.
    """
    config = _read_json(source / CONFIG)
    tables = {"name": run.name, "model": model_of(config), "data": {"source": "synthetic"}}  # its tokens are not known
    recipe = recipe_from_tables(tables)
    found = _weight_files(source)
    shapes = {their_name(name): (name, shape) for name, shape in weight_shapes(recipe.model).items()}
    spare = {"lm_head.weight"} if recipe.model.tied_embeddings else set()  # some write a tied matrix twice
    if (missing := shapes.keys() - found.keys()) or (unknown := found.keys() - shapes.keys() - spare):
        which = f"lacks {min(missing)}" if missing else f"has {min(unknown)}, which this model has not"
        raise RecipeError("import", str(source), which)
    weights: dict[str, Tensor] = {}
    for theirs, (name, shape) in shapes.items():
        with _opened(source / found[theirs]) as file:
            weight = file.get_tensor(theirs)
        if weight.shape != shape or not weight.is_floating_point():
            kind = f"{tuple(weight.shape)} of {weight.dtype}"
            raise RecipeError("import", str(source), f"{theirs} is {kind}, not numbers of shape {tuple(shape)}")
        weights[name] = weight if weight.dtype == torch.float64 else weight.float()
    dtypes = {weight.dtype for weight in weights.values()}
    dtype: Dtype = "float64" if dtypes == {torch.float64} else "float32"
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    recipe = replace(recipe, train=replace(recipe.train, dtype=dtype))
    about = {"step": 0, "recipe": recipe.resolved(), "data": None, "float32_matmul": None}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.save(weights, storage_writer=SafetensorsWriter(step_folder(run, 0), about, weights), no_dist=True)
    return recipe


def model_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The [model] of a recipe from a config.json. Raises RecipeError."""
    for key, plain in PLAIN.items():
        if config.get(key, plain) != plain:
            raise RecipeError(f"{CONFIG}: {key}", config[key], f"this model has {plain!r}; it cannot be imported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise RecipeError(f"{CONFIG}: rope_type", kind, "this model has 'default'; it cannot be imported")
    if config.get("quantization_config") is not None:
        raise RecipeError(f"{CONFIG}: quantization_config", "...", "give weights that are not quantized")
    model = {ours: config[theirs] for ours, theirs in KEYS.items() if theirs in config}
    model["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    model.setdefault("n_kv_heads", model.get("n_heads", 1))
    heads = config.get("head_dim")
    if heads is not None and heads * config.get("num_attention_heads", 0) != config.get("hidden_size"):
        raise RecipeError(f"{CONFIG}: head_dim", heads, "this model has hidden_size / num_attention_heads")
    return {"preset": "none"} | model


def _weight_files(source: Path) -> dict[str, str]:
    """Which file of `source` holds each weight. safetensors alone: other files could run code."""
    if (source / INDEX).exists():
        files = _read_json(source / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise RecipeError(INDEX, files, "has no weight_map, a table of weights and their files")
        names = {str(file) for file in files.values()}
        if bad := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise RecipeError(INDEX, bad[0], "names no .safetensors file of its own folder")
        return files
    if not (source / WEIGHTS).is_file():
        raise RecipeError("import", str(source), f"holds no {WEIGHTS} and no {INDEX}; convert it to safetensors")
    with _opened(source / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise RecipeError("import", str(path.parent), f"{path.name} cannot be read ({str(error)[:200]})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise ValueError("it is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError("import", str(path.parent), f"{path.name} cannot be read ({reason})") from None
