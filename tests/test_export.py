"""`lab checkpoint`: what it shows, and weights out to Hugging Face's transformers and in from it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from layouts import batch_of
from ranks import Ranks
from test_checkpoint import content, flip, lived, recipe_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from launch.cli import main
from parallel.checkpoint.files import step_folder
from parallel.checkpoint.huggingface import model_of
from parallel.recipe import Recipe, RecipeError, load_recipe
from parallel.transformer import Transformer, weight_name

MODELS = {
    "grouped heads": dict(vocab_size=67, n_kv_heads=2),
    "tied, one key head": dict(vocab_size=67, n_kv_heads=1, tied_embeddings=True, rope_theta=5e5),
    "all heads": dict(vocab_size=67, n_kv_heads=4, norm_eps=1e-6),
}


def logits_of(recipe: Recipe, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    model = Transformer(recipe.model, seq_len=tokens.shape[1], compute_dtype=torch.float64).double()
    model.rotary.reset_buffers()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[weight_name(name, recipe.model)])
        return model(tokens)


def their_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """In float64, but for what they compute in float32 whatever they are given: rotary tables and norms."""
    with torch.no_grad():
        return model.double().eval()(tokens).logits


def exact_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def lab_checkpoint(*arguments: Any) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.mark.parametrize("layout", ["tp2 sp · fsdp2", "zbv"])
@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_the_logits_of_the_lab(ranks: Ranks, tmp_path: Path, model: str, layout: str) -> None:
    """Out of a checkpoint of several ranks, and back in."""
    if MODELS[model]["n_kv_heads"] == 1 and "tp" in layout:
        layout = "fsdp4"
    recipe = recipe_of(layout, model=MODELS[model])
    lived(ranks, recipe, tmp_path / "run")
    weights = content(tmp_path / "run", 6)
    tokens, _ = batch_of(recipe, range(4))
    ours = logits_of(recipe, weights, tokens)

    assert lab_checkpoint("export", tmp_path / "run", "--to", tmp_path / "llama") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float64, local_files_only=True)
    assert theirs.config.rope_parameters["rope_theta"] == recipe.model.rope_theta
    assert (their_logits(theirs, tokens) - ours).abs().max() < 1e-6
    rotary = Transformer(recipe.model, seq_len=tokens.shape[1]).double().rotary
    rotary.reset_buffers()
    sin = rotary.sin.chunk(2, dim=-1)[1].repeat(1, 2)  # theirs turns the sign of half of what it multiplies
    theirs.model.rotary_emb.forward = lambda x, position_ids: (rotary.cos[None], sin[None])
    for module in theirs.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(exact_norm, module)
    assert (their_logits(theirs, tokens) - ours).abs().max() < 1e-13 and ours.abs().max() > 0.1

    assert lab_checkpoint("import", tmp_path / "llama", "--to", tmp_path / "imported") == 0
    back = content(tmp_path / "imported", 0)
    assert all(torch.equal(back[name], weights[name]) for name in back) and "norm.weight.step" not in back
    shape = load_recipe(tmp_path / "imported" / "recipe.toml")
    assert shape.train.dtype == "float64"
    assert {key: getattr(shape.model, key) for key in MODELS[model]} == MODELS[model]
    steps = lived(
        ranks, recipe_of("hsdp", model=MODELS[model], train=dict(steps=2)), tmp_path / "on", tmp_path / "imported"
    )
    assert [step["step"] for step in steps] == [1, 2]
    assert content(tmp_path / "on", 2)["norm.weight.step"].item() == 2


def test_a_model_made_by_transformers_is_imported_as_it_is(tmp_path: Path) -> None:
    """In bfloat16 and in several files, as they are published."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
    )
    theirs = LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    assert lab_checkpoint("import", tmp_path / "llama", "--to", tmp_path / "run") == 0
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    weights = content(tmp_path / "run", 0)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    tokens = torch.arange(20).reshape(2, 10)
    assert (logits_of(recipe, weights, tokens) - their_logits(theirs, tokens)).abs().max() < 1e-6


def test_one_file_has_the_weights_under_the_names_of_the_whole_model(ranks: Ranks, tmp_path: Path) -> None:
    lived(ranks, recipe_of("pp · tp"), tmp_path / "run")
    step_3 = step_folder(tmp_path / "run", 3)
    assert lab_checkpoint("export", step_3, "--to", tmp_path / "out" / "weights.safetensors") == 0
    weights = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    stored = content(tmp_path / "run", 3)
    assert weights.keys() == {name for name in stored if name.endswith(".weight")}
    assert all(torch.equal(weights[name], stored[name]) for name in weights)


def test_show_and_verify(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(ranks, recipe_of("tp2 sp · fsdp2"), tmp_path)
    assert lab_checkpoint("verify", tmp_path) == 0
    newest, older = capsys.readouterr().out.splitlines()
    assert newest.startswith("step-00000006: run on fsdp2·tp2, 156 tensors, ") and newest.endswith("; latest")
    assert "4 files; every byte as it was written" in newest
    assert older.startswith("step-00000003: ") and "latest" not in older
    flip(step_folder(tmp_path, 6) / "part-00002-00000.safetensors")
    assert lab_checkpoint("show", tmp_path) == 0  # looks at no byte of the tensors, and does not say that it did
    assert "every byte" not in capsys.readouterr().out
    assert lab_checkpoint("verify", tmp_path, "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["damage"] for row in rows] == [
        "part-00002-00000.safetensors does not have the checksum that was written",
        None,
    ]
    assert lab_checkpoint("export", tmp_path, "--to", tmp_path / "x") == 1
    assert "step-00000006: damaged: part-00002" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert lab_checkpoint("export", step_folder(tmp_path, 3), "--to", tmp_path / "x") == 0


def test_what_is_asked_wrongly_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["show", tmp_path / "empty"], "holds no checkpoint"),
        (["verify", tmp_path / "none", "--to", "x"], "takes no --to"),
        (["export", tmp_path / "empty"], "needs --to"),
        (["import", tmp_path / "empty", "--to", tmp_path / "run"], "config.json cannot be read (No such file"),
        (["import", tmp_path / "empty", "--to", tmp_path / " "], "--to"),
        (["describe", tmp_path], "ACTION = 'describe': give one of"),
        (["import", tmp_path / "empty", "--to", tmp_path], f"--to = '{tmp_path}': exists; give another"),
    ):
        assert lab_checkpoint(*arguments) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="qwen2"), "config.json: model_type = 'qwen2': this model has 'llama'"),
        (dict(attention_bias=True), "attention_bias = true"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_type = 'llama3'"),
        (dict(quantization_config={}), "quantization_config"),
        (dict(head_dim=7), "head_dim = 7"),
        (dict(num_attention_heads=5), "model.n_heads = 5: does not divide model.d_model"),
        (dict(vocab_size=-1), "model.vocab_size = -1"),
    ],
    ids=str,
)
def test_another_model_is_refused_with_what_makes_it_another(change: dict[str, Any], words: str) -> None:
    from parallel.recipe import recipe_from_tables

    config = dict(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=300,
        model_type="llama",
    )
    with pytest.raises(RecipeError) as error:
        recipe_from_tables({"model": model_of(config | change)})
    assert words in str(error.value)
    assert recipe_from_tables({"model": model_of(config)}).model.n_kv_heads == 4


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dict(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        model_type="llama",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))

    def refusal() -> str:
        assert lab_checkpoint("import", tmp_path, "--to", tmp_path / "run") == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "holds no model.safetensors" in refusal()
    safetensors.torch.save_file({"lm_head.weight": torch.zeros(20, 8)}, tmp_path / "model.safetensors")
    assert "lacks model.embed_tokens.weight" in refusal()
    theirs = LlamaForCausalLM(LlamaConfig(**config | dict(vocab_size=21), num_key_value_heads=2)).state_dict()
    safetensors.torch.save_file(theirs, tmp_path / "model.safetensors")
    assert "is (21, 8) of torch.float32, not numbers of shape (20, 8)" in refusal()
    safetensors.torch.save_file(theirs | {"extra.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "has extra.bias, which this model has not" in refusal()
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04rubbish")
    assert "model.safetensors" in refusal()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "names no .safetensors file of its own folder" in refusal()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))
    assert "weight_map" in refusal()
