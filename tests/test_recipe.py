"""Recipes: what is refused and how it is said, what is accepted, and that the shipped ones and the docs hold true."""

import copy
import dataclasses
import datetime
import json
import random
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.compare import is_comparison, load_comparison
from parallel.recipe import (
    PRESETS,
    SCHEDULES,
    SECTIONS,
    Recipe,
    RecipeError,
    apply_overrides,
    choices,
    load_recipe,
    read_toml,
    recipe_from_tables,
)
from parallel.transformer import Transformer

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / "recipes").rglob("*.toml") if not is_comparison(read_toml(path)))
COMPARISONS = sorted((ROOT / "recipes" / "compare").glob("*.toml"))


def recipe_of(text: str) -> Recipe:
    """The recipe of some TOML lines, written on one line with '; ' between them."""
    return recipe_from_tables(tomllib.loads(text.replace("; ", "\n")))


def check_message(error: RecipeError, *fragments: str) -> None:
    text = str(error)
    assert text.isprintable(), text  # so it is one line, and nothing that moves a terminal's cursor
    assert len(text) < 600, text
    for fragment in fragments:
        assert fragment in text, text


# ---- what is refused -----------------------------------------------------------------------------------------------

PP4 = "parallel.pp = 4; train.micro_batch = 1"
ACCELERATE, DEEPSPEED = ("engine.name = 'accelerate'", "engine.name = 'deepspeed'")
SHAPE = "model.preset = 'none'; model.n_layers = 2; model.d_model = 64; model.vocab_size = 256"

# lines of a recipe; the key and value that the message names; what it says would be right
REFUSED = [
    # unknown sections and keys
    ("trian.steps = 5", "trian = {'steps': 5}", "unknown section; did you mean train?"),
    ("optimizer.lr = 0.1", "optimizer = ", "unknown section; known: model, data, train"),
    ("tracker.wandb = 'online'", "tracker = ", "unknown section; did you mean track?"),
    ("track.wandb = 'on'", "track.wandb = 'on'", "choose off, offline, online"),
    ("checkpoint.every = -1", "checkpoint.every = -1: ", "at least 0"),
    ("checkpoint.keep = 0", "checkpoint.keep = 0: ", "at least 1"),
    ("checkpoint.async = true", "checkpoint.async = true: ", "unknown key"),
    ("steps = 5", "steps = 5", "unknown key here; it belongs in [train]"),
    ("nmae = 'x'", "nmae = 'x'", "did you mean name?"),
    ("train.step = 5", "train.step = 5", "unknown key; did you mean steps?"),
    ("train.xyz = 5", "train.xyz = 5", "unknown key; known: steps, seq_len"),
    ("train.tp = 2", "train.tp = 2", "unknown key here; it belongs in [parallel]"),
    ("parallel.schedule = 'gpipe'", "parallel.schedule = 'gpipe'", "it belongs in [pipeline]"),
    ('train."a\\nb" = 1', "'train.a\\nb' = 1", "unknown key"),
    ('"\\u001b[2J" = 1', "'\\x1b[2J' = 1", "unknown key"),
    ("'' = 1", "'' = 1", "unknown key; known: model, data"),
    # names
    ("name = '../x'", "name = '../x'", "use letters, digits"),
    ("name = '/x'", "name = '/x'", "use letters, digits"),
    ("name = '..'", "name = '..'", "starting with a letter or digit"),
    ("name = ''", "name = ''", "use letters, digits"),
    ("name = 'a b'", "name = 'a b'", "use letters, digits"),
    ('name = "a\\n"', "name = 'a\\n'", "use letters, digits"),
    ("name = 5", "name = 5", "use letters, digits"),
    (f"name = '{'a' * 101}'", "name = 'aaa", "at most 100"),
    # a section that is none
    ("train = 5", "train = 5", "is a section; write [train] with keys below it"),
    ("model = 'tiny'", "model = 'tiny'", "is a section; write [model]"),
    ("data = ['a']", "data = ['a']", "is a section; write [data]"),
    # wrong types
    ("train.steps = '5'", "train.steps = '5'", "give a whole number"),
    ("train.steps = 5.0", "train.steps = 5.0", "give a whole number"),
    ("train.steps = true", "train.steps = true", "give a whole number"),
    ("train.steps = [5]", "train.steps = [5]", "give a whole number"),
    ("train.steps = {}", "train.steps = {}", "give a whole number"),
    ("train.steps = 2026-01-01", "train.steps = datetime.date(2026, 1, 1)", "give a whole number"),
    ("train.learning_rate = '1e-3'", "train.learning_rate = '1e-3'", "give a number"),
    ("train.learning_rate = false", "train.learning_rate = false", "give a number"),
    ("train.parity = 1", "train.parity = 1", "give true or false"),
    ("train.parity = 'yes'", "train.parity = 'yes'", "give true or false"),
    ("train.dtype = 32", "train.dtype = 32", "choose float32, bfloat16, float64"),
    ("model.preset = 8", "model.preset = 8", "choose tiny, small"),
    ("track.wandb = true", "track.wandb = true", "choose off, offline, online"),
    ("data.source = 'tokens'; data.path = 5", "data.path = 5", "give a string in quotes"),
    ("data.source = 'files'; data.files = 'a.txt'", "data.files = 'a.txt'", 'give a list of strings, as in ["a", "b"]'),
    ("data.source = 'files'; data.files = [1]", "data.files = [1]", "give a list of strings"),
    ("recompute.save = [['matmul']]", "recompute.save = [['matmul']]", "give a list of strings"),
    # numbers out of range
    ("train.steps = 0", "train.steps = 0", "give a whole number of at least 1"),
    ("train.steps = -3", "train.steps = -3", "give a whole number of at least 1"),
    ("train.steps = 9223372036854775807", "train.steps = 9223372036854775807", "of at most 1000000000"),
    (f"train.steps = 1{'0' * 400}", "train.steps = 1000", "give a whole number of at most 1000000000"),
    ("train.seed = -1", "train.seed = -1", "give a whole number of at least 0"),
    ("train.seed = 2147483648", "train.seed = 2147483648", "of at most 2147483647"),
    ("train.seq_len = 0", "train.seq_len = 0", "give a whole number of at least 1"),
    ("train.global_batch = 0", "train.global_batch = 0", "give a whole number of at least 1"),
    ("train.micro_batch = -1", "train.micro_batch = -1", "give a whole number of at least 0"),
    ("train.learning_rate = -0.1", "train.learning_rate = -0.1", "give a number of at least 0.0"),
    ("train.learning_rate = nan", "train.learning_rate = nan", "give a number of at most 1000.0"),
    ("train.learning_rate = inf", "train.learning_rate = inf", "give a number of at most 1000.0"),
    ("train.weight_decay = -inf", "train.weight_decay = -inf", "give a number of at least 0.0"),
    (f"train.grad_clip = 1{'0' * 400}", "train.grad_clip = 1000", "give a number of at most"),
    ("train.time_limit_seconds = 0.5", "train.time_limit_seconds = 0.5", "give a number of at least 1.0"),
    ("parallel.tp = 0", "parallel.tp = 0", "give a whole number of at least 1"),
    ("parallel.pp = -2", "parallel.pp = -2", "give a whole number of at least 1"),
    ("parallel.dp_replicate = 2000000", "parallel.dp_replicate = 2000000", "of at most 1048576"),
    ("parallel.pp = 4096; parallel.dp_shard = 8192", "parallel = 33554432", "at most 16777216 ranks"),
    ("model.norm_eps = 2", "model.norm_eps = 2", "give a number of at most 1.0"),
    ("model.rope_theta = 0.5", "model.rope_theta = 0.5", "give a number of at least 1.0"),
    ("model.n_layers = 0", "model.n_layers = 0", "give a whole number of at least 1"),
    ("model.vocab_size = 1", "model.vocab_size = 1", "give a whole number of at least 2"),
    ("ddp.bucket_mib = 0", "ddp.bucket_mib = 0", "give a number of at least 0.001"),
    ("sharding.prefetch = 0", "sharding.prefetch = 0", "give a whole number of at least 1"),
    ("pipeline.stages_per_rank = -1", "pipeline.stages_per_rank = -1", "give a whole number of at least 0"),
    # choices
    ("model.preset = 'llama9'", "model.preset = 'llama9'", "choose tiny, small, smollm-1.7b, llama3-8b"),
    ("train.dtype = 'float16'", "train.dtype = 'float16'", "choose float32, bfloat16, float64"),
    ("train.adamw = 'sgd'", "train.adamw = 'sgd'", "choose fused, foreach, for-loop"),
    ("train.device = 'tpu'", "train.device = 'tpu'", "choose auto, cpu, cuda"),
    ("train.compile = 'max'", "train.compile = 'max'", "choose none, inductor, aot_eager"),
    ("data.source = 'web'", "data.source = 'web'", "choose stdlib, files, tokens, huggingface, synthetic"),
    ("context.method = 'star'", "context.method = 'star'", "choose ring, all-gather, ulysses"),
    ("pipeline.schedule = '2f2b'", "pipeline.schedule = '2f2b'", "choose gpipe, 1f1b, interleaved-1f1b"),
    ("recompute.mode = 'some'", "recompute.mode = 'some'", "choose none, full, every(n)"),
    ("recompute.mode = 'every(0)'", "recompute.mode = 'every(0)'", "every(n) with n of at least 1"),
    ("recompute.mode = 'every(-1)'", "recompute.mode = 'every(-1)'", "every(n) with n of at least 1"),
    ("recompute.mode = 'every(x)'", "recompute.mode = 'every(x)'", "every(n) with n of at least 1"),
    ("recompute.mode = 'every(2'", "recompute.mode = 'every(2'", "every(n) with n of at least 1"),
    ("recompute.mode = 'every(٣)'", "recompute.mode = 'every(٣)'", "every(n) with n of at least 1"),
    ("recompute.save = ['norm']", "recompute.save = ['norm']", "choose from attention, matmul"),
    ("recompute.mode = 'selective'; recompute.save = []", "recompute.save = []", "name at least one operation"),
    # the shape of the model
    ("model.n_heads = 7", "model.n_heads = 7", "does not divide model.d_model = 128; use one of 1, 2, 4, 8"),
    ("model.n_heads = 256", "model.n_heads = 256", "does not divide model.d_model = 128"),
    ("model.n_kv_heads = 3", "model.n_kv_heads = 3", "does not divide model.n_heads = 8; use one of 1, 2, 4, 8"),
    ("model.n_kv_heads = 16", "model.n_kv_heads = 16", "does not divide model.n_heads = 8"),
    ("model.n_heads = 128; model.n_kv_heads = 128", "model.n_heads = 128", "need an even head size"),
    ("model.preset = 'none'", "model.preset = 'none'", "give n_layers, d_model, n_heads, vocab_size too"),
    (SHAPE, "model.preset = 'none'", "without a preset give n_heads too"),
    (SHAPE + "; model.n_heads = 0", "model.n_heads = 0", "give a whole number of at least 1"),
    (SHAPE + "; model.n_heads = true", "model.n_heads = true", "give a whole number"),
    # batch
    (
        "parallel.dp_shard = 3",
        "train.global_batch = 8",
        "3 replicas (dp_replicate 1 · dp_shard 3); use a multiple of 3",
    ),
    ("parallel.dp_replicate = 16", "train.global_batch = 8", "use a multiple of 16"),
    ("train.micro_batch = 9", "train.micro_batch = 9", "use at most 8"),
    ("train.loss_chunks = 0", "train.loss_chunks = 0", "give a whole number of at least 1"),
    ("train.loss_chunks = 129; parallel.cp = 2", "train.loss_chunks = 129", "use at most 128"),
    ("train.micro_batch = 3; parallel.dp_shard = 4", "train.micro_batch = 3", "global_batch 8 / 4 replicas"),
    # tensor and context
    ("parallel.tp = 3", "parallel.tp = 3", "does not divide model.n_heads = 8; use one of 1, 2, 4"),
    ("parallel.tp = 8", "parallel.tp = 8", "does not divide model.n_kv_heads = 4; use one of 1, 2, 4"),
    ("parallel.tp = 4; model.d_ff = 350", "parallel.tp = 4", "does not divide model.d_ff = 350; use one of 1, 2"),
    ("parallel.tp = 4; model.vocab_size = 5; data.source = 'synthetic'", "model.vocab_size = 5", "use at least 16"),
    ("parallel.tp = 4; train.seq_len = 254", "train.seq_len = 254", "or set tensor.sequence_parallel = false"),
    (
        "parallel.tp = 4; parallel.cp = 2; train.seq_len = 252",
        "train.seq_len = 252",
        "gives 126 tokens per context rank",
    ),
    ("parallel.cp = 3", "parallel.cp = 3", "does not divide train.seq_len = 256; use one of 1, 2, 4"),
    ("parallel.cp = 4; train.seq_len = 252", "train.seq_len = 252", "use a multiple of 8"),
    (
        "parallel.cp = 4; train.seq_len = 252; context.method = 'all-gather'",
        "train.seq_len = 252",
        "one early and one late chunk",
    ),
    ("parallel.cp = 16; context.method = 'ulysses'", "parallel.cp = 16", "does not divide model.n_heads / tp"),
    ("parallel.cp = 4; parallel.tp = 4; context.method = 'ulysses'", "parallel.cp = 4", "= 2; use one of 1, 2"),
    (
        "parallel.cp = 2; model.n_kv_heads = 3; model.n_heads = 6; model.d_model = 96; context.method = 'ulysses'",
        "parallel.cp = 2",
        "use context.method = ring",
    ),
    # pipeline
    ("pipeline.stages_per_rank = 2", "pipeline.stages_per_rank = 2", "needs parallel.pp of at least 2"),
    (PP4 + "; pipeline.stages_per_rank = 2", "pipeline.stages_per_rank = 2", "1f1b takes 1 (or 0)"),
    (
        PP4 + "; pipeline.schedule = 'gpipe'; pipeline.stages_per_rank = 3",
        "pipeline.stages_per_rank = 3",
        "gpipe takes 1 (or 0)",
    ),
    (
        PP4 + "; pipeline.schedule = 'looped-bfs'; pipeline.stages_per_rank = 1",
        "pipeline.stages_per_rank = 1",
        "looped-bfs takes 2 or more (or 0)",
    ),
    (
        PP4 + "; pipeline.schedule = 'zbv'; pipeline.stages_per_rank = 3",
        "pipeline.stages_per_rank = 3",
        "zbv is a V of exactly 2 (or 0)",
    ),
    (
        "parallel.pp = 2; train.micro_batch = 1; pipeline.schedule = 'dualpipev'; pipeline.stages_per_rank = 4",
        "pipeline.stages_per_rank = 4",
        "dualpipev is a V of exactly 2 (or 0)",
    ),
    ("parallel.pp = 16; train.micro_batch = 1", "model.n_layers = 8", "fewer than the 16 stages"),
    (PP4 + "; pipeline.schedule = 'zbv'; model.n_layers = 7", "model.n_layers = 7", "pp 4 · stages_per_rank 2"),
    ("parallel.pp = 2; train.micro_batch = 3", "train.micro_batch = 3", "pipeline microbatches must be equal"),
    ("parallel.pp = 2", "train.micro_batch = 8", "gives 1 microbatches"),
    ("parallel.pp = 4; train.micro_batch = 4", "train.micro_batch = 4", "1f1b needs at least 4"),
    (
        "parallel.pp = 2; train.global_batch = 5; train.micro_batch = 1; pipeline.schedule = 'interleaved-zero-bubble'",
        "train.micro_batch = 1",
        "fewer than 4 or a multiple of pp = 2",
    ),
    (
        "parallel.pp = 4; train.global_batch = 9; train.micro_batch = 1; pipeline.schedule = 'interleaved-1f1b'",
        "train.micro_batch = 1",
        "gives 9 microbatches",
    ),
    (
        "parallel.pp = 2; parallel.dp_shard = 2; train.micro_batch = 1; pipeline.schedule = 'zbv'",
        "sharding.reshard_after_forward = true",
        "set it to false",
    ),
    (
        "parallel.pp = 2; train.micro_batch = 1; pipeline.schedule = 'dualpipev'; recompute.mode = 'selective'",
        "recompute.mode = 'selective'",
        "take another schedule",
    ),
    (
        "parallel.pp = 4; train.micro_batch = 2; pipeline.schedule = 'dualpipev'",
        "train.micro_batch = 2",
        "dualpipev needs at least 8",
    ),
    (
        "parallel.tp = 2; recompute.mode = 'every(2)'; train.compile = 'inductor'",
        "train.compile = 'inductor'",
        "recompute.mode",
    ),
    (
        "parallel.cp = 2; recompute.mode = 'selective'; train.compile = 'inductor'",
        "train.compile = 'inductor'",
        "context.method = ulysses",
    ),
    (PP4 + "; pipeline.schedule = 'zbv'; train.compile = 'inductor'", "train.compile = 'inductor'", "torch.compile"),
    # engines
    ("engine.name = 'horovod'", "engine.name = 'horovod'", "choose native, deepspeed, accelerate"),
    ("engine.zero_stage = 2", "engine.zero_stage = 2", "read by engine.name = deepspeed alone, and this is native"),
    (DEEPSPEED + "; engine.zero_stage = 0", "engine.zero_stage = 0", "at least 1"),
    ("engine.offload = 'optimizer'", "engine.offload = 'optimizer'", "and this is native; remove it"),
    (DEEPSPEED + "; train.non_finite = 'skip'", "train.non_finite = 'skip'", "takes every step; use stop"),
    (DEEPSPEED + "; engine.plugin = 'deepspeed'", "engine.plugin", "read by engine.name = accelerate alone"),
    (DEEPSPEED + "; engine.offload = 'optimizer'", "engine.offload", "use parallel.dp_shard above 1, or none"),
    (
        DEEPSPEED + "; parallel.dp_shard = 2; engine.zero_stage = 2; engine.offload = 'parameters'",
        *("engine.offload = 'parameters'", "needs engine.zero_stage = 3"),
    ),
    (DEEPSPEED + "; engine.checkpointing = 'deepspeed'", "engine.checkpointing", "recompute.mode is none; use full"),
    (DEEPSPEED + "; parallel.tp = 2", "tensor.sequence_parallel = true", "has no sequence parallelism; use false"),
    (DEEPSPEED + "; parallel.cp = 2", "context.method = 'ring'", "deepspeed has ulysses alone; use that"),
    (
        DEEPSPEED + "; parallel.cp = 8; context.method = 'ulysses'",
        *("parallel.cp = 8", "does not divide model.n_kv_heads = 4, which DeepSpeed hands out"),
    ),
    (
        DEEPSPEED + "; parallel.cp = 2; context.method = 'ulysses'; parallel.tp = 2",
        *("parallel = 'pp 1 · cp 2 · tp 2'", "takes one of the three"),
    ),
    (DEEPSPEED + "; parallel.pp = 2; train.micro_batch = 1", "engine.zero_stage = 3", "goes with ZeRO 1 alone"),
    (
        DEEPSPEED + "; parallel.pp = 2; train.micro_batch = 1; engine.zero_stage = 1; pipeline.schedule = 'gpipe'",
        *("pipeline.schedule = 'gpipe'", "has 1f1b alone"),
    ),
    (
        DEEPSPEED + "; parallel.pp = 2; train.micro_batch = 1; engine.zero_stage = 1; model.tied_embeddings = true",
        *("model.tied_embeddings = true", "use false"),
    ),
    (
        DEEPSPEED + "; parallel.pp = 2; train.micro_batch = 1; engine.zero_stage = 1; train.loss_chunks = 2",
        *("train.loss_chunks = 2", "whole logits; use 1"),
    ),
    (ACCELERATE + "; parallel.tp = 2", "parallel.tp = 2", "to a plan in the model"),
    (ACCELERATE + "; parallel.cp = 2", "parallel.cp = 2", "has no kernel for a CPU; use 1"),
    (ACCELERATE + "; parallel.pp = 2; train.micro_batch = 1", "parallel.pp = 2", "or set engine.name = native"),
    (ACCELERATE + "; engine.zero_stage = 1", "engine.zero_stage = 1", "and this is accelerate; remove it"),
    (ACCELERATE + "; train.compile = 'inductor'", "train.compile = 'inductor'", "use none"),
    (ACCELERATE + "; checkpoint.every = 5", "checkpoint.every = 5", "is not saved yet; use 0"),
    (ACCELERATE + "; ddp.overlap = false", "ddp.overlap = false", "use true, or set engine.name = native"),
    (ACCELERATE + "; parallel.dp_shard = 2; sharding.prefetch = 2", "sharding.prefetch = 2", "in its own way; use 1"),
    (DEEPSPEED + "; ddp.bucket_mib = 1", "ddp.bucket_mib = 1.0", "has buckets of its own"),
    (
        DEEPSPEED + "; parallel.dp_shard = 2; sharding.reshard_after_forward = false",
        "sharding.reshard_after_forward = false",
        "has engine.zero_stage = 2 for that",
    ),
    (
        DEEPSPEED + "; parallel.dp_shard = 2; parallel.dp_replicate = 2; engine.zero_stage = 2",
        "parallel.dp_replicate = 2",
        "with dp_shard it is hpZ",
    ),
    (DEEPSPEED + "; train.dtype = 'float64'", "train.dtype = 'float64'", "use float32"),
    (DEEPSPEED + "; train.dtype = 'bfloat16'", "train.dtype = 'bfloat16'", "use dp_shard with engine.zero_stage = 1"),
    # data
    ("data.path = 'x.bin'", "data.path = 'x.bin'", "has no meaning with data.source = stdlib; remove it"),
    ("data.source = 'synthetic'; data.files = ['a']", "data.files = ['a']", "no meaning with data.source = synthetic"),
    ("data.source = 'tokens'; data.dataset = 'c4'", "data.dataset = 'c4'", "no meaning with data.source = tokens"),
    ("data.source = 'tokens'", "data.path = ''", "is needed with data.source = tokens"),
    ("data.source = 'files'", "data.files = []", "is needed with data.source = files"),
    ("data.source = 'huggingface'; data.tokenizer = 't'", "data.dataset = ''", "is needed"),
    ("data.source = 'huggingface'; data.dataset = 'd'", "data.tokenizer = ''", "is needed"),
    ("data.source = 'tokens'; data.token_dtype = 'int8'", "data.token_dtype = 'int8'", "choose uint16, uint32"),
    ("model.vocab_size = 128", "model.vocab_size = 128", "gives bytes; use at least 256"),
    ("model.vocab_size = 255; data.source = 'files'; data.files = ['a']", "model.vocab_size = 255", "at least 256"),
]


@pytest.mark.parametrize(("text", "key_and_value", "remedy"), REFUSED, ids=[case[0][:90] for case in REFUSED])
def test_a_bad_recipe_is_refused_with_key_value_and_remedy(text: str, key_and_value: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        recipe_of(text)
    check_message(refusal.value, key_and_value, remedy)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.steps", ("--set = 'train.steps'", "write section.key=value, as in train.steps=5")),
        ("=5", ("--set = '=5'", "write section.key=value")),
        ("train.=5", ("--set = 'train.=5'", "write section.key=value")),
        (".steps=5", ("--set = '.steps=5'", "write section.key=value")),
        ("a.b.c=5", ("--set = 'a.b.c=5'", "write section.key=value")),
        ("", ("--set = ''", "write section.key=value")),
        ("steps=5", ("steps = 5", "it belongs in [train]")),
        ("train=5", ("train = 5", "is a section")),
        ("name.x=5", ("name = 'tiny'", "is a section")),
        ("train.steps=", ("train.steps = ''", "give a whole number")),
        ("train.steps=five", ("train.steps = 'five'", "give a whole number")),
        ("train.steps=5\ntrain.seed=1", ("train.steps = '5\\ntrain.seed=1'", "give a whole number")),
        (f"train.steps={'9' * 5000}", ("train.steps = '999", "give a whole number")),
        (f"train.steps=0x{'f' * 5000}", ("train.steps = <int>", "of at most 1000000000")),
        (f"train.steps={'[' * 5000}", ("train.steps = '[[[", "give a whole number")),
        ("train.stepz=5", ("train.stepz = 5", "did you mean steps?")),
    ],
)
def test_a_bad_override_is_refused(override: str, fragments: tuple[str, str]) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(ROOT / "recipes" / "tiny.toml", [override])
    check_message(refusal.value, *fragments)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"[train", "is not valid TOML"),
        (b"train.steps = ", "is not valid TOML"),
        (b"steps = 5\nsteps = 6", "is not valid TOML"),
        (b"[train]\n[train]", "is not valid TOML"),
        (b"[train]\nsteps = five", "is not valid TOML"),
        (b"steps: 5", "is not valid TOML"),
        (b"x = " + b"9" * 5000, "is not valid TOML"),  # more digits than Python reads
        (b"x = " + b"[" * 5000, "is not valid TOML"),  # deeper than Python's stack
        (b".".join([b"a"] * 2000) + b" = 1", "unknown section"),  # parsed, but deeper than repr can go
        (b"name = '\xff'", "cannot be read ('utf-8' codec can't decode byte 0xff"),
        (b"\x00", "is not valid TOML"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, remedy: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as refusal:
        load_recipe(file)
    check_message(refusal.value, remedy)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, remedy in (
        ("no-such.toml", "file = 'no-such.toml': does not exist; see recipes/"),
        (tmp_path, "cannot be read (Is a directory); give a TOML text file"),
        (ROOT / "recipes" / "tiny.toml" / "x", "cannot be read (Not a directory)"),
        ("a\0b", "file = 'a\\x00b': cannot be read"),
        ("a" * 5000, "cannot be read (File name too long)"),
    ):
        with pytest.raises(RecipeError) as refusal:
            read_toml(path)
        check_message(refusal.value, remedy)


# ---- what is accepted ----------------------------------------------------------------------------------------------


def test_an_empty_recipe_is_the_default_run() -> None:
    recipe = recipe_from_tables({})
    assert recipe.name == "run"
    assert (recipe.world_size, recipe.replicas, recipe.micro_batch, recipe.n_microbatches) == (1, 1, 8, 1)
    assert (recipe.n_stages, recipe.model.head_dim, recipe.data.source) == (1, 16, "stdlib")


def test_tiny_toml_writes_out_the_defaults() -> None:
    tiny = load_recipe(ROOT / "recipes" / "tiny.toml")
    assert dataclasses.replace(tiny, name="run") == recipe_from_tables({})


# As Hugging Face counts the parameters of the published weights.
PUBLISHED_PARAMETERS = {
    "smollm-1.7b": 1_711_376_384,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}
LAYERS_WIDTH_HEADS_KV_HIDDEN_VOCABULARY = {
    "tiny": (8, 128, 8, 4, 352, 256),
    "small": (12, 384, 12, 4, 1024, 256),
    "smollm-1.7b": (24, 2048, 32, 32, 8192, 49152),
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": (80, 8192, 64, 8, 28672, 128256),
    "llama3-405b": (126, 16384, 128, 8, 53248, 128256),
}


def n_parameters(preset: str) -> int:
    model = recipe_from_tables({"model": {"preset": preset}}).model
    kv_width = model.n_kv_heads * model.head_dim
    attention = 2 * model.d_model**2 + 2 * model.d_model * kv_width  # q and out, k and v
    block = attention + 3 * model.d_model * model.d_ff + 2 * model.d_model  # gate, up, down; two norms
    vocabulary = (1 if model.tied_embeddings else 2) * model.vocab_size * model.d_model
    return model.n_layers * block + vocabulary + model.d_model


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_shapes_and_parameters(preset: str) -> None:
    model = recipe_from_tables({"model": {"preset": preset}}).model
    shape = (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads, model.d_ff, model.vocab_size)
    assert shape == LAYERS_WIDTH_HEADS_KV_HIDDEN_VOCABULARY[preset]
    assert model.tied_embeddings == (preset == "smollm-1.7b")
    assert model.rope_theta == (500_000 if preset.startswith("llama3") else 10_000)
    assert n_parameters(preset) == PUBLISHED_PARAMETERS.get(preset, n_parameters(preset))
    with torch.device("meta"):
        transformer = Transformer(model, seq_len=1)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == n_parameters(preset)


def test_a_key_beside_a_preset_overrides_it() -> None:
    model = recipe_of("model.preset = 'llama3-8b'; model.n_layers = 4; model.tied_embeddings = true").model
    assert (model.n_layers, model.d_model, model.tied_embeddings) == (4, 4096, True)


def test_a_model_without_a_preset_gets_the_usual_hidden_width() -> None:
    model = recipe_of(SHAPE + "; model.n_heads = 4").model
    assert (model.n_kv_heads, model.d_ff, model.tied_embeddings) == (4, 192, False)  # 8/3 · 64 = 170.7, in 32s


def test_a_whole_number_serves_where_a_float_is_wanted() -> None:
    train = recipe_of("train.learning_rate = 1; train.grad_clip = 0").train
    assert (train.learning_rate, train.grad_clip) == (1.0, 0.0)
    assert type(train.learning_rate) is float


def test_overrides_are_toml_values_or_bare_strings() -> None:
    tables = {"name": "a", "train": {"steps": 1}}
    merged = apply_overrides(
        tables, ["train.steps=5", "train.dtype=float64", "ddp.overlap=false", "name = b", "name=c"]
    )
    assert merged == {"name": "c", "train": {"steps": 5, "dtype": "float64"}, "ddp": {"overlap": False}}
    assert tables == {"name": "a", "train": {"steps": 1}}  # untouched


def test_a_file_may_begin_with_a_byte_order_mark_and_gives_the_name(tmp_path: Path) -> None:
    file = tmp_path / "my-run.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 3\r\n")
    recipe = load_recipe(file)
    assert (recipe.name, recipe.train.steps) == ("my-run", 3)


@pytest.mark.parametrize(
    ("text", "world_size", "replicas", "micro_batch", "n_microbatches", "n_stages"),
    [
        ("parallel.dp_replicate = 4", 4, 4, 2, 1, 1),
        ("parallel.dp_shard = 2; train.micro_batch = 3", 2, 2, 3, 2, 1),  # 3 and 1: the last may be short
        ("parallel.dp_replicate = 2; parallel.dp_shard = 2; parallel.tp = 2; train.micro_batch = 1", 8, 4, 1, 2, 1),
        ("parallel.cp = 4", 4, 1, 8, 1, 1),
        (PP4, 4, 1, 1, 8, 4),
        (PP4 + "; pipeline.schedule = 'gpipe'", 4, 1, 1, 8, 4),
        (PP4 + "; pipeline.schedule = 'zbv'", 4, 1, 1, 8, 8),
        ("parallel.pp = 2; train.micro_batch = 1; pipeline.schedule = 'looped-bfs'; pipeline.stages_per_rank = 3",
         2, 1, 1, 8, 6),
    ],
)  # fmt: skip
def test_the_numbers_that_follow_from_a_layout(
    text: str, world_size: int, replicas: int, micro_batch: int, n_microbatches: int, n_stages: int
) -> None:
    recipe = recipe_of(text)
    found = (recipe.world_size, recipe.replicas, recipe.micro_batch, recipe.n_microbatches, recipe.n_stages)
    assert found == (world_size, replicas, micro_batch, n_microbatches, n_stages)


@pytest.mark.parametrize(("mode", "every"), [("none", 0), ("full", 1), ("every(3)", 3), ("sqrt", 0), ("selective", 0)])
def test_recompute_modes(mode: str, every: int) -> None:
    assert recipe_of(f"recompute.mode = '{mode}'").recompute.every == every


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_layers", [8, 11])
def test_every_schedule_takes_layers_that_do_not_divide_evenly(schedule: str, n_layers: int) -> None:
    assert recipe_of(PP4 + f"; pipeline.schedule = '{schedule}'; model.n_layers = {n_layers}").n_stages in (4, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.preset = 'llama3-8b'; data.source = 'synthetic'; parallel.tp = 8; recompute.mode = 'every(2)'",
        SHAPE + "; model.n_heads = 4; model.rope_theta = 5e5",
        "data.source = 'files'; data.files = ['a.txt', '*.md']",
        "data.source = 'tokens'; data.path = 'x.bin'; data.token_dtype = 'uint32'",
        "data.source = 'huggingface'; data.dataset = 'd'; data.tokenizer = 't'; data.split = 'test'",
    ],
)
def test_a_resolved_recipe_is_a_recipe(text: str) -> None:
    check_round_trip(recipe_of(text))


def check_round_trip(recipe: Recipe) -> None:
    text = json.dumps(recipe.resolved(), allow_nan=False)
    assert recipe_from_tables(json.loads(text)) == recipe


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, parallel.recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- fuzz ----------------------------------------------------------------------------------------------------------


def any_value(source: random.Random, depth: int = 0) -> Any:
    """A value of any TOML type, often an extreme one."""
    extremes: list[Any] = [
        0, -1, 1, 2**31, -(2**63), 10**30, 10**400, -(10**400), 16**5000,
        0.0, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
        True, False, "", "\n", "\x1b[2J\u2028\x85", "ünï⚡\U0001f600", "a" * 10_000, "none", "tiny", "every(2)",
        datetime.date(2026, 1, 1), datetime.time(1, 2), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), [], {},
    ]  # fmt: skip
    kind = source.random()
    if kind < 0.7 or depth > 3:
        return source.choice(extremes)
    if kind < 0.8:
        return [any_value(source, depth + 1) for _ in range(source.randrange(4))]
    if kind < 0.9:
        return {any_key(source): any_value(source, depth + 1) for _ in range(source.randrange(4))}
    nested: Any = 1
    for _ in range(source.choice((3, 2000))):  # deeper than repr can go
        nested = {"a": nested} if source.random() < 0.5 else [nested]
    return nested


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("train", "steps", 0, "train.steps = 0"),  # a value of its own
        ("train", "dtype", "float16", "train.dtype = 'float16'"),
        ("parallel", "tp", 3, "parallel.tp = 3"),  # what goes with what
        ("context", "method", "spiral", "context.method = 'spiral'"),
    ],
)
def test_a_recipe_that_exists_can_be_run_however_it_was_made(section: str, key: str, value: Any, named: str) -> None:
    recipe = recipe_from_tables({})
    with pytest.raises(RecipeError, match=re.escape(named)):
        dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **{key: value})})


def any_key(source: random.Random) -> str:
    keys = ["name", "step", "tp ", "\n", "", "\x00", "ключ", "x" * 5000, *SECTIONS]
    return source.choice(keys + [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)])


def likely_value(source: random.Random, field: dataclasses.Field[Any], field_choices: tuple[str, ...]) -> Any:
    """A value of the key's own type, within or near its range."""
    if isinstance(field.default, tuple):
        return source.choices(field_choices or ["a.txt"], k=source.randrange(3))
    if field_choices:
        return source.choice(field_choices)
    if isinstance(field.default, bool):
        return source.random() < 0.5
    if isinstance(field.default, str):
        return source.choice(("none", "full", "every(2)", "sqrt", "selective", "every(0)", "x"))
    if isinstance(field.default, int):
        return source.choice((0, 1, 1, 2, 2, 2, 4, 4, 3, 8, 16, 64, 256, 1024, 6, 7))
    return source.choice((0, 1, 2.5, 1e-3, 1e4))


def random_tables(source: random.Random, shipped: list[dict[str, Any]]) -> dict[str, Any]:
    """A shipped recipe, or an empty one, with some keys changed."""
    tables = copy.deepcopy(source.choice((source.choice(shipped), {})))
    for _ in range(source.choice((1, 1, 2, 2, 3, 4, 6, 9))):
        section = source.choice([*SECTIONS, "parallel", "train", "model"])
        table = tables.setdefault(section, {})
        field = source.choice(dataclasses.fields(SECTIONS[section]))
        kind = source.random()
        if kind < 0.85 and isinstance(table, dict):
            types = typing.get_type_hints(SECTIONS[section])
            table[field.name] = likely_value(source, field, choices(types[field.name]))
        elif kind < 0.93 and isinstance(table, dict):
            table[source.choice((field.name, any_key(source)))] = any_value(source)
        else:
            tables[source.choice((any_key(source), section))] = any_value(source)
    return tables


def test_2000_random_recipes_are_valid_or_refused_in_one_line() -> None:
    source = random.Random(0)
    shipped = [read_toml(path) for path in SHIPPED]
    valid = refused = 0
    for _ in range(2000):
        tables = random_tables(source, shipped)
        try:
            recipe = recipe_from_tables(tables)
        except RecipeError as error:
            check_message(error, " = ", ": ")
            refused += 1
        else:
            check_round_trip(recipe)
            valid += 1
    assert valid >= 400 and refused >= 400, (valid, refused)


def test_random_files_are_valid_or_refused_in_one_line(tmp_path: Path) -> None:
    source = random.Random(1)
    shipped = [path.read_bytes() for path in SHIPPED]
    file = tmp_path / "fuzz.toml"
    valid = refused = 0
    for _ in range(1000):
        content = bytearray(source.choice(shipped))
        for _ in range(source.choice((1, 1, 2, 5, 50))):
            at = source.randrange(len(content))
            part = source.choice(
                (source.randbytes(1), source.randbytes(8), b"[", b"]]", b'"', b"\n", b"= ", b"0x", b"")
            )
            content[at : at + source.randrange(3)] = part
        file.write_bytes(source.randbytes(200) if source.random() < 0.1 else content)
        try:
            load_recipe(file)
            valid += 1
        except RecipeError as error:
            check_message(error, " = ", ": ")
            refused += 1
    assert valid >= 100 and refused >= 100, (valid, refused)


# ---- what is shipped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid_and_says_how_to_start_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = path.read_text(encoding="utf-8").split("\nname = ")[0]
    here = path.relative_to(ROOT).as_posix()
    for label in ("lab ", "by hand ", "when ", "paper "):
        assert f"#   {label}" in head, label
    assert re.search(rf"lab (run|check) {here}\n", head)
    assert f"-m launch.train {here}\n" in head
    nodes = re.search(r"--nnodes (\d+)", head)
    per_node = re.search(r"--nproc-per-node (\d+)", head)
    assert per_node is not None
    assert int(per_node[1]) * (int(nodes[1]) if nodes else 1) == recipe.world_size


def test_the_small_recipes_train_the_same_model_on_the_same_data() -> None:
    tiny = load_recipe(ROOT / "recipes" / "tiny.toml")
    for path in SHIPPED:
        if path.parent.name in ("strategies", "mixes"):
            recipe = load_recipe(path)
            free = {"micro_batch": 0, "dtype": "float32"}
            assert dataclasses.replace(recipe.train, **free) == tiny.train, path
            assert (recipe.model, recipe.data) == (tiny.model, tiny.data), path
            assert recipe.world_size in (4, 8), path


def variants(path: Path) -> dict[str, Recipe]:
    comparison = load_comparison(path)
    assert comparison.name == path.stem
    recipes = {variant.name: variant.recipe for variant in comparison.variants if variant.recipe is not None}
    assert len(recipes) == len(comparison.variants)
    return recipes


LADDER, LOSS = (ROOT / "recipes" / "compare" / f"{name}.toml" for name in ("one-gpu", "loss"))


@pytest.mark.parametrize("path", [p for p in COMPARISONS if p not in (LADDER, LOSS)], ids=lambda path: path.stem)
def test_shipped_comparison_compares_like_with_like(path: Path) -> None:
    recipes = variants(path)
    reference = recipes["single"]
    assert reference.world_size == 1
    for recipe in recipes.values():
        assert (recipe.model, recipe.data) == (reference.model, reference.data)
        assert dataclasses.replace(recipe.train, micro_batch=0) == reference.train
        assert recipe is reference or recipe.world_size == 4


def test_the_ladder_of_one_accelerator_is_one_model_on_the_same_tokens() -> None:
    recipes = variants(LADDER)
    eager = recipes["eager"]
    assert eager == dataclasses.replace(load_recipe(ROOT / "recipes" / "one-gpu.toml"), name="eager")
    for recipe in recipes.values():
        free = {key: getattr(eager.train, key) for key in ("attention", "compile", "dtype", "steps")}
        assert dataclasses.replace(recipe.train, **free) == eager.train
        assert recipe.world_size == 1 and recipe.train.steps > 3
        assert dataclasses.replace(
            recipe, name="any", train=eager.train, recompute=eager.recompute
        ) == dataclasses.replace(eager, name="any")
    assert {recipe.train.attention for recipe in recipes.values()} == {"auto", "flash", "cudnn", "math"}
    assert {recipe.recompute.mode for recipe in recipes.values()} == {"none", "selective", "every(2)", "sqrt", "full"}


def test_the_comparison_of_losses_changes_their_chunks_alone() -> None:
    recipes = variants(LOSS)
    whole = [recipe for recipe in recipes.values() if recipe.train.loss_chunks == 1]
    assert {recipe.parallel for recipe in recipes.values()} == {recipe.parallel for recipe in whole}
    for recipe in recipes.values():
        same = dict(name="any", train=dataclasses.replace(recipe.train, loss_chunks=1), parallel=whole[0].parallel)
        assert dataclasses.replace(recipe, **same) == dataclasses.replace(whole[0], name="any")


def test_the_main_comparison_is_made_of_the_shipped_strategies() -> None:
    recipes = variants(ROOT / "recipes" / "compare" / "strategies.toml")
    names = "single ddp ddp-no-overlap zero2 fsdp hsdp fsdp-recompute tp tp-sp pp-gpipe pp-1f1b pp-interleaved pp-zbv"
    assert recipes.keys() >= {*names.split(), "cp-ring", "cp-all-gather", "cp-ulysses", "fsdp-tp", "pp-tp"}
    shipped = {path.stem: load_recipe(path) for path in SHIPPED if path.parent.name in ("strategies", "mixes")}
    for name, recipe in recipes.items():
        assert name == "single" or recipe == shipped[name]


# ---- docs/recipe.md ------------------------------------------------------------------------------------------------


def section_table(section: str) -> str:
    """The rows of docs/recipe.md for one section, made from the dataclass."""
    types = typing.get_type_hints(SECTIONS[section])
    names = {int: "whole number", float: "number", bool: "true or false", str: "string"}
    lines = ["| key | type | default | values | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(SECTIONS[section]):
        rule = field.metadata
        default = f"`{json.dumps(field.default)}`"
        if section == "model" and any(field.name in preset for preset in PRESETS.values()):
            always = all(field.name in preset for preset in PRESETS.values())
            default = "the preset's" if always else f"the preset's, else {default}"
        values = ", ".join(f"`{choice}`" for choice in choices(types[field.name]))
        if rule["minimum"] is not None:
            upper = "and more" if rule["maximum"] == 2**40 else f"to {rule['maximum']}"
            values = f"{rule['minimum']} {upper}"
        one_of = typing.get_origin(types[field.name]) is typing.Literal
        kind = "string" if one_of else names.get(types[field.name], "list of strings")
        lines.append(f"| `{field.name}` | {kind} | {default} | {values} | {rule['help']} |")
    return "\n".join(lines)


def preset_table() -> str:
    columns = ["n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "tied_embeddings", "rope_theta"]
    lines = [f"| preset | {' | '.join(columns)} | parameters |", "|---" * (len(columns) + 2) + "|"]
    for name in PRESETS:
        model = recipe_from_tables({"model": {"preset": name}}).model
        cells = [json.dumps(getattr(model, column)) for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {n_parameters(name):,} |")
    return "\n".join(lines)


@pytest.mark.parametrize("section", [*SECTIONS, "presets"])
def test_docs_list_every_key(section: str) -> None:
    table = preset_table() if section == "presets" else section_table(section)
    document = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert table in document, f"docs/recipe.md: make the table of {section} read\n\n{table}\n"


def test_the_recipes_in_the_docs_are_valid() -> None:
    blocks = []
    for document in ("recipe.md", "strategies.md"):
        blocks += re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / document).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        recipe_from_tables(tomllib.loads(block))
