"""Checkpoints: from any layout to any other, bit by bit; whole or not at all; and one story over all lives of a run."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import CPU, small_recipe
from ranks import Ranks

import parallel.measure.hardware as hardware
from launch.folder import prepare_run
from parallel.checkpoint import files, storage
from parallel.checkpoint.files import (
    CheckpointError,
    Damaged,
    move_latest,
    read_checkpoint,
    step_folder,
    step_folders,
)
from parallel.checkpoint.saving import Saver, last_whole, load
from parallel.checkpoint.storage import whole_tensor
from parallel.engines.native import NativeEngine
from parallel.measure.clock import Clock
from parallel.measure.journal import Diverged
from parallel.measure.observer import Step
from parallel.measure.record import read_record, read_steps
from parallel.mesh import build_mesh
from parallel.recipe import Recipe, RecipeError
from parallel.training import train_in_group
from parallel.transformer import Transformer

ODD = dict(vocab_size=67)  # divides by nothing that a layout here has
TIED = ODD | dict(tied_embeddings=True)

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": dict(),
    "ddp2, accumulated": dict(parallel=dict(dp_replicate=2), train=dict(micro_batch=3)),
    "ddp4": dict(parallel=dict(dp_replicate=4)),
    "fsdp4": dict(parallel=dict(dp_shard=4)),
    "fsdp8, accumulated": dict(parallel=dict(dp_shard=8), train=dict(global_batch=16, micro_batch=1)),
    "zero2": dict(parallel=dict(dp_shard=2), sharding=dict(reshard_after_forward=False)),
    "hsdp": dict(parallel=dict(dp_replicate=2, dp_shard=2)),
    "tp2": dict(parallel=dict(tp=2), tensor=dict(sequence_parallel=False)),
    "tp2 sp · fsdp2": dict(parallel=dict(tp=2, dp_shard=2)),
    "hsdp · tp": dict(parallel=dict(dp_replicate=2, dp_shard=2, tp=2)),
    "cp ring": dict(parallel=dict(cp=2)),
    "cp ulysses · fsdp": dict(parallel=dict(cp=2, dp_shard=2), context=dict(method="ulysses")),
    "gpipe": dict(parallel=dict(pp=2), pipeline=dict(schedule="gpipe"), train=dict(micro_batch=2)),
    "1f1b, uneven": dict(parallel=dict(pp=3), train=dict(micro_batch=2)),
    "pp · tp": dict(parallel=dict(pp=2, tp=2), train=dict(micro_batch=2)),
    "interleaved": dict(
        parallel=dict(pp=2),
        pipeline=dict(schedule="interleaved-1f1b"),
        train=dict(micro_batch=1),
        recompute=dict(mode="full"),
    ),
    "looped-bfs · ddp": dict(
        parallel=dict(pp=2, dp_replicate=2), pipeline=dict(schedule="looped-bfs"), train=dict(micro_batch=1)
    ),
    "zero bubble": dict(
        parallel=dict(pp=2), pipeline=dict(schedule="interleaved-zero-bubble"), train=dict(micro_batch=1)
    ),
    "zbv": dict(parallel=dict(pp=2), pipeline=dict(schedule="zbv"), train=dict(micro_batch=1)),
    "zbv · fsdp": dict(
        parallel=dict(pp=2, dp_shard=2),
        pipeline=dict(schedule="zbv"),
        train=dict(micro_batch=1),
        sharding=dict(reshard_after_forward=False),
    ),
    "dualpipev": dict(parallel=dict(pp=2), pipeline=dict(schedule="dualpipev"), train=dict(micro_batch=1)),
    "compiled": dict(parallel=dict(dp_replicate=2), train=dict(compile="aot_eager")),
}
# from, to, model
PAIRS = [
    ("fsdp4", "tp2 sp · fsdp2", ODD),
    ("tp2 sp · fsdp2", "fsdp4", TIED),
    ("pp · tp", "ddp4", TIED),
    ("ddp4", "pp · tp", ODD),
    ("zbv", "one", TIED),
    ("one", "zbv", TIED),
    ("one", "hsdp · tp", ODD),
    ("hsdp · tp", "one", TIED),
    ("hsdp", "cp ring", ODD),
    ("cp ring", "zero2", ODD),
    ("zero2", "gpipe", TIED),
    ("gpipe", "cp ulysses · fsdp", TIED),
    ("cp ulysses · fsdp", "interleaved", ODD),
    ("interleaved", "tp2", TIED),
    ("tp2", "1f1b, uneven", ODD),
    ("1f1b, uneven", "zbv · fsdp", TIED),
    ("zbv · fsdp", "looped-bfs · ddp", TIED),
    ("looped-bfs · ddp", "zero bubble", TIED),
    ("zero bubble", "dualpipev", TIED),
    ("dualpipev", "ddp2, accumulated", TIED),
    ("ddp2, accumulated", "compiled", ODD),
    ("compiled", "hsdp", ODD),
]


def recipe_of(layout: str, *, model: dict[str, Any] = ODD, dtype: str = "float64", **sections: Any) -> Recipe:
    """Six steps, saved after the third and the sixth, with clipping at work."""
    tables: dict[str, Any] = {
        "model": model,
        "train": dict(steps=6, learning_rate=1e-2, grad_clip=0.1, parity=False),
        "checkpoint": dict(every=3),
    }
    for changes in (LAYOUTS[layout], sections):
        for section, table in changes.items():
            tables[section] = tables.get(section, {}) | table
    return small_recipe(dtype, **tables)


def life(recipe: Recipe, out: str, resume_from: str | None = None) -> dict[str, Any] | None:
    Path(out).mkdir(exist_ok=True)
    with mock.patch.object(hardware, "CEILING_SECONDS", 0.01):  # no test here looks at it
        return train_in_group(recipe, out=Path(out), device=CPU, resume_from=Path(resume_from) if resume_from else None)


def lived(ranks: Ranks, recipe: Recipe, out: Path, resume_from: Path | None = None) -> list[dict[str, Any]]:
    """The steps of the record, after that life."""
    record = ranks(recipe.world_size, life, recipe, str(out), str(resume_from) if resume_from else None)[0]
    assert record["status"] == "ok" and record["steps"] == read_steps(out / "steps.jsonl")
    return record["steps"]


def content(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(step_folder(run, step))
    assert checkpoint.step == step
    return {name: whole_tensor(checkpoint, name) for name in checkpoint.tensors}


def same_bits(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    same = (
        torch.equal(some[name].view(torch.uint8), others[name].view(torch.uint8)) for name in some if some[name].ndim
    )
    return some.keys() == others.keys() and all(same) and all(some[name].equal(others[name]) for name in some)


def resaved(recipe: Recipe, out: str, resume_from: str) -> None:
    """Loads the checkpoint in this layout and writes it again."""
    checkpoint = last_whole(Path(resume_from))
    assert checkpoint is not None
    engine = NativeEngine(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU)
    engine.load_state(partial(load, checkpoint))
    saver_of(recipe, engine, Path(out))._save(3)


def saver_of(recipe: Recipe, engine: NativeEngine, run: Path) -> Saver:
    about = {"recipe": recipe.resolved(), "data": None, "float32_matmul": None}
    return Saver(recipe, engine.state, run=run, about=about, clock=Clock(recipe, CPU), device=CPU)


def digits(steps: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in steps]


@pytest.mark.parametrize(
    ("source", "target", "model"),
    # Of each two pairs the second: so each layout is there, as what saved or as what goes on.
    [pytest.param(*pair, marks=[pytest.mark.long] * (number % 2 == 0)) for number, pair in enumerate(PAIRS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_layout_goes_on_from_any_other(
    ranks: Ranks, tmp_path: Path, source: str, target: str, model: dict[str, Any]
) -> None:
    """With the same bits, as if nothing had happened. (The same layout, to the last digit: test_trajectories.py.)"""
    batch = max(LAYOUTS[layout].get("train", {}).get("global_batch", 8) for layout in (source, target))
    here, there = (
        recipe_of(layout, model=model, train=dict(global_batch=batch) | LAYOUTS[layout].get("train", {}))
        for layout in (source, target)
    )
    whole = lived(ranks, here, tmp_path / "a")
    first = content(tmp_path / "a", 3)
    with torch.device("meta"):
        names = {name for name, _ in Transformer(here.model, seq_len=16).named_parameters()}
    assert first.keys() == {f"{name}{key}" for name in names for key in ("", ".exp_avg", ".exp_avg_sq", ".step")}
    assert all(first[f"{name}.step"].item() == 3 for name in names)
    move_latest(step_folder(tmp_path / "a", 3))

    ranks(there.world_size, resaved, there, str(tmp_path / "b"), str(tmp_path / "a"))
    assert same_bits(first, content(tmp_path / "b", 3))
    other = lived(ranks, there, tmp_path / "c", tmp_path / "a")
    assert [step["step"] for step in other] == [4, 5, 6]
    assert [step["loss"] for step in other] == pytest.approx([step["loss"] for step in whole[3:]], abs=1e-12)
    norms = [[step["grad_norm"] for step in steps] for steps in (other, whole[3:])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["fsdp4", "tp2 sp · fsdp2", "zbv", "cp ring"])
def test_the_same_layout_goes_on_exactly_in_the_types_that_train(
    ranks: Ranks, tmp_path: Path, layout: str, dtype: str
) -> None:
    recipe = recipe_of(layout, model=TIED, dtype=dtype)
    whole = lived(ranks, recipe, tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in content(tmp_path, 6).values())
    move_latest(step_folder(tmp_path, 3))
    assert digits(lived(ranks, recipe, tmp_path, tmp_path)) == digits(whole)


# ---- in the background ---------------------------------------------------------------------------------------------


def slow_life(recipe: Recipe, out: str) -> tuple[dict[str, Any] | None, list[list[str]]]:
    """The record, and at each step's end which checkpoints were whole: files of step 3 wait for step 5, of 6 for 7."""
    write, set_attribute, seen = storage._write_file, Step.__setattr__, []
    done = {5: threading.Event(), 7: threading.Event()}
    waits_for = {"step-00000003": 5, "step-00000006": 7}

    def late(path: Path, tensors: Any) -> Any:
        if path.parent.name in waits_for:
            assert done[waits_for[path.parent.name]].wait(60)
        return write(path, tensors)

    def watch(step: Step, key: str, value: Any) -> None:
        set_attribute(step, key, value)
        if key == "seconds":
            seen.append([folder.name for folder in step_folders(Path(out)) if (folder / files.MANIFEST).exists()])
            if step.number in done:
                done[step.number].set()

    with mock.patch.object(storage, "_write_file", late), mock.patch.object(Step, "__setattr__", watch):
        return life(recipe, out), seen


@pytest.mark.parametrize("layout", ["fsdp4", "ddp2, accumulated", "pp · tp"])
def test_what_is_written_in_the_background_is_the_step_that_was_saved(
    ranks: Ranks, tmp_path: Path, layout: str
) -> None:
    recipe = recipe_of(layout, model=TIED, train=dict(steps=8), checkpoint=dict(every=3, keep=3))
    steps = lived(ranks, recipe, tmp_path / "now")
    later = recipe_of(layout, model=TIED, train=dict(steps=8), checkpoint=dict(every=3, keep=3, asynchronous=True))
    record, seen = ranks(recipe.world_size, slow_life, later, str(tmp_path / "later"))[0]
    assert digits(record["steps"]) == digits(steps)
    assert seen[4] == [] and seen[6] == ["step-00000003"]  # what is written waits for training, and not the reverse
    for step in (3, 6, 8):
        assert same_bits(content(tmp_path / "now", step), content(tmp_path / "later", step))
    kept = record["checkpoint"]
    assert kept["saves"] == 3 and kept["background_seconds"] > 0 and kept["waited_seconds"] > 0
    folder = step_folder(tmp_path / "later", 8)
    assert kept["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # From step 4 on one was under way, or followed.
    assert record["throughput"]["steps_left_out"] == {"warm-up": 3, "checkpoint": 5}


def test_steps_with_a_save_are_left_out_of_the_timings(ranks: Ranks, tmp_path: Path) -> None:
    recipe = recipe_of("fsdp4", train=dict(steps=9), checkpoint=dict(every=4))
    record = ranks(4, life, recipe, str(tmp_path))[0]
    assert record["throughput"]["steps_left_out"] == {"warm-up": 3, "checkpoint": 3}  # 4, 8 and the last
    assert record["throughput"]["steps_timed"] == 3
    kept = record["checkpoint"]
    assert kept["saves"] == 3 and kept["waited_seconds"] > 0 and kept["background_seconds"] is None


# ---- whole, or not at all ------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept_and_nothing_is_written_that_could_be_executed(ranks: Ranks, tmp_path: Path) -> None:
    recipe = recipe_of("zero2", train=dict(steps=7), checkpoint=dict(every=2, keep=3))
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)  # an earlier life was ended while it wrote
    (tmp_path / "checkpoints" / "step-00000001" / "part-00000-00000.safetensors").write_bytes(b"half")
    lived(ranks, recipe, tmp_path)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-00000007", "step-00000006", "step-00000004"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000007\n"
    suffixes = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ""}
    prepare_run(tmp_path, resume=True)
    with pytest.raises(RecipeError, match=r"holds checkpoints up to step-00000007; go on with --resume"):
        prepare_run(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (
        lambda folder: flip(folder / "part-00001-00000.safetensors"),
        "part-00001-00000.safetensors does not have",
    ),
    "cut off": (lambda folder: os.truncate(folder / "part-00000-00000.safetensors", 1000), "has 1000 bytes, not "),
    "a file": (lambda folder: (folder / "part-00001-00000.safetensors").unlink(), "cannot be read (No such file"),
    "a bit of the manifest": (lambda folder: flip(folder / "checkpoint.json"), "checkpoint.json "),
    "the manifest": (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json is missing: it was not"),
    "all": (shutil.rmtree, ""),
}


def found_whole(run: str) -> tuple[str, list[str]]:
    said: list[str] = []
    with mock.patch("parallel.checkpoint.saving.say", said.append):
        checkpoint = last_whole(Path(run))
    assert checkpoint is not None
    return checkpoint.folder.name, said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(ranks: Ranks, tmp_path: Path, damage: str) -> None:
    recipe = recipe_of("zero2")
    steps = lived(ranks, recipe, tmp_path)
    break_it, words = DAMAGES[damage]
    break_it(step_folder(tmp_path, 6))
    for folder, said in ranks(2, found_whole, str(tmp_path)):
        assert folder == "step-00000003"
        assert len(said) == (damage != "all")  # a line
        assert all("warning: checkpoint step-00000006 is damaged: " in line and words in line for line in said)
    assert digits(lived(ranks, recipe, tmp_path, tmp_path)) == digits(steps)
    assert ranks(2, found_whole, str(tmp_path))[0] == ("step-00000006", [])


def none_whole(run: str) -> str:
    with pytest.raises(RecipeError) as error:
        last_whole(Path(run))
    return str(error.value)


def test_where_all_are_damaged_the_run_does_not_start_from_the_beginning(ranks: Ranks, tmp_path: Path) -> None:
    lived(ranks, recipe_of("zero2"), tmp_path)
    for step in (3, 6):
        flip(step_folder(tmp_path, step) / "part-00000-00000.safetensors")
    assert all("none of them is whole" in line for line in ranks(2, none_whole, str(tmp_path)))


def full_disk(recipe: Recipe, out: str, resume_from: str | None) -> str:
    """What the life says that ends when rank 1 cannot write more than 4 KB of a tensor's file."""
    write = storage._write_file

    def limited(*arguments: Any) -> Any:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with mock.patch.object(storage, "_write_file", limited if torch.distributed.get_rank() == 1 else write):
        return unwritable(recipe, out, resume_from)


def unwritable(recipe: Recipe, out: str, resume_from: str | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        life(recipe, out, resume_from)
    return str(error.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_ends_the_run_and_leaves_the_last_good_one(
    ranks: Ranks, tmp_path: Path, asynchronous: bool
) -> None:
    sections: dict[str, Any] = dict(train=dict(steps=20), checkpoint=dict(every=6, asynchronous=asynchronous))
    lived(ranks, recipe_of("fsdp4"), tmp_path)
    reasons = ranks(4, full_disk, recipe_of("fsdp4", **sections), str(tmp_path), str(tmp_path))
    assert len(set(reasons)) == 1
    assert reasons[0].startswith(
        "checkpoint step-00000012 cannot be written (rank 1: OSError: [Errno 27] File too large"
    )
    assert reasons[0].endswith("the last good one is step-00000006") and "\n" not in reasons[0]
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-00000006", "step-00000003"]
    assert ranks(4, found_whole, str(tmp_path))[0] == ("step-00000006", [])
    assert len(read_steps(tmp_path / "steps.jsonl")) < 20


def test_a_folder_that_cannot_be_written_is_said_in_a_line(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    for reason in ranks(2, unwritable, recipe_of("zero2"), str(tmp_path)):
        assert reason.startswith("checkpoint step-00000003 cannot be written (rank 0: ") and "\n" not in reason
        assert reason.endswith("there is none before it")


def lost_on_the_way(recipe: Recipe, out: str) -> str:
    """What rank 1 writes does not reach the disk as it was."""
    write = storage.sha256_of
    with mock.patch.object(
        storage, "sha256_of", lambda path: write(path)[::-1] if "part-00001" in path.name else write(path)
    ):
        return unwritable(recipe, out)


def test_what_is_read_back_must_have_the_checksum_of_what_was_in_memory(ranks: Ranks, tmp_path: Path) -> None:
    for reason in ranks(2, lost_on_the_way, recipe_of("zero2"), str(tmp_path)):
        assert "rank 1: OSError: part-00001-00000.safetensors is not on the disk as it was written" in reason
    assert step_folders(tmp_path) == [] and not (tmp_path / "checkpoints" / "latest").exists()


def diverges(recipe: Recipe, out: str) -> None:
    with pytest.raises(Diverged):
        life(recipe, out)


def test_a_step_that_diverged_is_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    recipe = recipe_of("zero2", dtype="float32", train=dict(steps=60, learning_rate=1e3), checkpoint=dict(every=1))
    ranks(2, diverges, recipe, str(tmp_path))
    rows = read_steps(tmp_path / "steps.jsonl")
    assert None in rows[-1].values()
    newest = step_folders(tmp_path)[0]
    assert read_checkpoint(newest).step == len(rows) - 1


def sealed(folder: Path, content: dict[str, Any]) -> None:
    (folder / "checkpoint.json").write_text(json.dumps({"sha256": files._seal(content), "checkpoint": content}))


def test_a_manifest_from_anywhere_names_no_file_elsewhere_and_no_part_outside_the_whole(
    ranks: Ranks, tmp_path: Path
) -> None:
    lived(ranks, recipe_of("zero2"), tmp_path)
    folder = step_folder(tmp_path, 6)
    good = json.loads((folder / "checkpoint.json").read_text())["checkpoint"]
    name = "blocks.0.mlp.up.weight"

    def broken(change: Callable[[dict[str, Any]], Any]) -> str:
        content = json.loads(json.dumps(good))
        change(content)
        sealed(folder, content)
        with pytest.raises(Damaged) as error:
            read_checkpoint(folder)
        return str(error.value)

    def first_part(content: dict[str, Any]) -> dict[str, Any]:
        return content["tensors"][name]["parts"][0]

    assert "names a file" in broken(
        lambda content: content["files"].update({"../../etc/passwd": dict(bytes=1, sha256="")})
    )
    assert "in no file" in broken(lambda content: first_part(content).update(file="/etc/passwd"))
    assert "outside the whole" in broken(lambda content: first_part(content).update(offsets=[40, 0]))
    assert "no whole number" in broken(lambda content: first_part(content).update(offsets=[-1, 0]))
    assert "are not the whole" in broken(lambda content: content["tensors"][name]["parts"].pop())
    assert "no step or no recipe" in broken(lambda content: content.update(step="6"))
    assert "no step or no recipe" in broken(lambda content: content["recipe"].update(train=[]))
    assert "has format 99" in broken(lambda content: content.update(format=99))
    for key in good:
        assert "checkpoint.json" in broken(lambda content, key=key: content.pop(key))
        for value in (None, [], {"a": 1}, "surprise", 7):
            content = good | {key: value}
            sealed(folder, content)
            try:
                read_checkpoint(folder)
            except Damaged as error:
                assert "checkpoint.json" in str(error)
    (folder / "checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(Damaged):
        read_checkpoint(folder)


# ---- the lives of a run --------------------------------------------------------------------------------------------


def test_steps_and_record_tell_one_story_over_all_lives(ranks: Ranks, tmp_path: Path) -> None:
    """Steps of a life that were lost are replaced, and the record says which steps each life trained."""
    whole = lived(ranks, recipe_of("zero2", train=dict(steps=8)), tmp_path / "whole")
    run = tmp_path / "run"
    lived(ranks, recipe_of("zero2", train=dict(steps=5), checkpoint=dict(every=2)), run)
    move_latest(step_folder(run, 4))
    with open(run / "steps.jsonl", "a") as file:  # it was ended while it wrote a line
        file.write('{"step": 6, "lo')
    lived(ranks, recipe_of("zero2", train=dict(steps=6), checkpoint=dict(every=2)), run, run)
    record = ranks(4, life, recipe_of("fsdp4", train=dict(steps=8)), str(run), str(run))[0]
    lives = record["checkpoint"]["lives"]
    assert [(one["first_step"], one["last_step"]) for one in lives] == [(1, 5), (5, 6), (7, 8)]
    assert [one["layout"]["dp_shard"] for one in lives] == [2, 2, 4]
    resumed = [one["resumed_from"] for one in lives]
    assert resumed == [None, {"name": "run", "step": 4}, {"name": "run", "step": 6}]
    assert [step["step"] for step in record["steps"]] == list(range(1, 9)) and record["steps"] == read_steps(
        run / "steps.jsonl"
    )
    assert digits(record["steps"])[:6] == digits(whole)[:6]
    other = ranks(2, life, recipe_of("zero2", train=dict(steps=9)), str(tmp_path / "other"), str(run))[0]
    [first] = other["checkpoint"]["lives"]
    assert (first["first_step"], first["last_step"]) == (9, 9)


def refused(recipe: Recipe, out: str, resume_from: str) -> str:
    with pytest.raises(RecipeError) as error:
        life(recipe, out, resume_from)
    return str(error.value)


@pytest.mark.parametrize(
    ("sections", "words", "elsewhere"),
    [
        (
            dict(model=ODD | dict(n_layers=5)),
            "model.n_layers = 5: the checkpoint of step 6 was trained with 4; ",
            False,
        ),
        (dict(model=ODD | dict(rope_theta=5e5)), "model.rope_theta = 500000.0: ", False),
        (dict(train=dict(seed=1)), "train.seed = 1: the checkpoint of step 6 was trained with 0; --resume needs", True),
        (dict(train=dict(global_batch=16)), "train.global_batch = 16: ", True),
        (dict(train=dict(learning_rate=0.5)), "train.learning_rate = 0.5: ", True),
        (dict(data=dict(source="stdlib"), model=dict(vocab_size=256)), "model.vocab_size = 256: ", False),
        (dict(train=dict(steps=6)), "train.steps = 6: the checkpoint is of step 6: all are done", False),
    ],
    ids=str,
)
def test_another_model_or_training_is_refused_in_a_line(
    ranks: Ranks, tmp_path: Path, sections: dict[str, Any], words: str, elsewhere: bool
) -> None:
    """--resume-from needs the same model and type of weights alone."""
    lived(ranks, recipe_of("one"), tmp_path / "run")
    train = dict(steps=7) | sections.pop("train", {})
    recipe = recipe_of("one", train=train, **sections)
    [line] = ranks(1, refused, recipe, str(tmp_path / "run"), str(tmp_path / "run"))
    assert line.startswith(words)
    if elsewhere:
        assert len(lived(ranks, recipe, tmp_path / "other", tmp_path / "run")) == 1
    else:
        [line] = ranks(1, refused, recipe, str(tmp_path / "other"), str(tmp_path / "run"))
        assert line.startswith(words.partition(":")[0])


def test_weights_of_another_type_and_other_tokens_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    lived(ranks, recipe_of("one"), tmp_path / "run")
    recipe = recipe_of("one", dtype="float32", train=dict(steps=7))
    [line] = ranks(1, refused, recipe, str(tmp_path / "other"), str(tmp_path / "run"))
    assert line.startswith("train.dtype = 'float32': the checkpoint of step 6 was trained with 'float64'")
    content = json.loads((step_folder(tmp_path / "run", 6) / "checkpoint.json").read_text())["checkpoint"]
    sealed(step_folder(tmp_path / "run", 6), content | {"data": "other text"})
    [line] = ranks(1, refused, recipe_of("one", train=dict(steps=7)), *[str(tmp_path / "run")] * 2)
    assert line.startswith("data.source = 'synthetic': now gives other tokens (synthetic")


def test_a_run_that_has_no_checkpoint_yet_begins_at_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    """And is a life of its own, where the one before it had come to none."""
    lived(ranks, recipe_of("one", train=dict(steps=3)), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    record = ranks(1, life, recipe_of("one"), str(tmp_path), str(tmp_path))[0]
    assert [step["step"] for step in record["steps"]] == [1, 2, 3, 4, 5, 6]
    lives = [(one["first_step"], one["last_step"], one["resumed_from"]) for one in record["checkpoint"]["lives"]]
    assert lives == [(1, 3, None), (1, 6, None)]


# ---- signals, in real processes ------------------------------------------------------------------------------------

RECIPE = """
name = "run"
[model]
n_layers = 2
d_model = 32
[data]
source = "synthetic"
[train]
steps = 400
seq_len = 16
parity = false
[parallel]
dp_shard = 2
[checkpoint]
every = 300
"""


def lab(folder: Path, *options: str) -> subprocess.Popen[str]:
    (folder / "recipe.toml").write_text(RECIPE)
    command = [sys.executable, "-P", "-m", "launch.cli", "run", "recipe.toml", *options]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_steps(folder: Path, n_steps: int) -> None:
    deadline = time.monotonic() + 180
    while len(read_steps(folder / "runs/run/steps.jsonl")) < n_steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(launcher: int) -> list[int]:
    """The processes of a run, and before them that which they are forked from."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_or_to_any_rank_saves_the_run_and_ends_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Then it goes on where it was, and a run without checkpoints ends as it always did (tests/test_launch.py)."""
    run, n_steps = tmp_path / "runs" / "run", 0
    for to_the_launcher in (True, False):
        process = lab(tmp_path, *([] if to_the_launcher else ["--resume"]))
        wait_for_steps(tmp_path, n_steps + 3)
        os.kill(process.pid if to_the_launcher else ranks_of(process.pid)[-1], number)
        _, err = process.communicate(timeout=120)
        steps = read_steps(run / "steps.jsonl")
        done = re.fullmatch(rf"lab: stopped by {number.name} after step (\d+), and saved: --resume goes on\n", err)
        assert process.returncode == 75 and done is not None
        assert [step["step"] for step in steps] == list(range(1, int(done[1]) + 1))
        assert read_checkpoint(step_folders(run)[0]).step == len(steps) > n_steps
        record = read_record(run / "record.json")
        assert record["status"] == "failed" and record["steps"] == steps
        assert record["reason"] == err.removeprefix("lab: ").strip()
        n_steps = len(steps)
    assert record["checkpoint"]["lives"][0]["first_step"] == 1
    process = lab(tmp_path, "--resume", "--set", f"train.steps={n_steps + 2}", "--json")
    out, _ = process.communicate(timeout=120)
    record = json.loads(out)
    assert process.returncode == 0 and [step["step"] for step in record["steps"]] == list(range(1, n_steps + 3))
    assert record["checkpoint"]["lives"][-1]["last_step"] == n_steps + 2


def test_a_rank_that_is_killed_while_it_writes_leaves_the_one_before(tmp_path: Path) -> None:
    """Saved after every step, so that the kill comes close to a save, and often within one."""
    process = lab(tmp_path, "--set", "checkpoint.every=1")
    wait_for_steps(tmp_path, 5)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 1
    n_done = len(read_steps(tmp_path / "runs/run/steps.jsonl"))
    process = lab(tmp_path, "--resume", "--json", "--set", f"train.steps={n_done + 1}", "--set", "checkpoint.every=1")
    out, _ = process.communicate(timeout=120)
    record = json.loads(out)
    assert process.returncode == 0 and len(record["steps"]) == n_done + 1
    assert record["checkpoint"]["lives"][1]["first_step"] >= n_done  # at most the last was lost


def test_what_cannot_resume_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    def refusal(*options: str) -> str:
        process = lab(tmp_path, *options)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err.count("\n")) == (2, "", 1)
        return err

    assert "--resume-from = 'nowhere': holds no checkpoint" in refusal("--resume-from", "nowhere")
    assert "checkpoint.every = 0: keeps no checkpoints" in refusal("--resume", "--set", "checkpoint.every=0")
    assert "not allowed with" in refusal("--resume", "--resume-from", "nowhere")
    assert lab(tmp_path, "--set", "train.steps=2").wait(timeout=120) == 0
    assert "holds checkpoints up to step-00000002; go on with --resume" in refusal()
    assert "train.seed = 5: the checkpoint of step 2 was trained with 0" in refusal("--resume", "--set", "train.seed=5")
    assert "model.n_layers = 3: " in refusal(
        "--resume-from", "runs/run", "--set", "name=b", "--set", "model.n_layers=3"
    )
    assert not (tmp_path / "runs" / "b").exists()
