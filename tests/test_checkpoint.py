"""Checkpoints: from any layout to any other, bit by bit; whole or not at all; and one story over all lives of a run."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import CPU, small_recipe
from ranks import Ranks

import parallel.measure.hardware as hardware
from parallel.checkpoint.files import move_latest, read_checkpoint, step_folder
from parallel.checkpoint.storage import whole_tensor
from parallel.measure.record import read_steps
from parallel.recipe import Recipe
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
    from functools import partial

    from parallel.checkpoint.saving import Saver, last_whole, load
    from parallel.engines.native import NativeEngine
    from parallel.measure.clock import Clock
    from parallel.mesh import build_mesh

    checkpoint = last_whole(Path(resume_from))
    assert checkpoint is not None
    engine = NativeEngine(recipe, mesh=build_mesh(recipe, "cpu"), device=CPU)
    engine.load_state(partial(load, checkpoint))
    about = {"recipe": recipe.resolved(), "data": None, "float32_matmul": None}
    Saver(recipe, engine.state, run=Path(out), about=about, clock=Clock(recipe, CPU), device=CPU)._save(3)


def digits(steps: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in steps]


@pytest.mark.parametrize(
    ("source", "target", "model"), PAIRS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_any_layout_goes_on_from_any_other(
    ranks: Ranks, tmp_path: Path, source: str, target: str, model: dict[str, Any]
) -> None:
    """The same layout to the last digit; another with the same bits, as if nothing had happened."""
    batch = max(LAYOUTS[layout].get("train", {}).get("global_batch", 8) for layout in (source, target))
    here, there = (
        recipe_of(layout, model=model, train=dict(global_batch=batch) | LAYOUTS[layout].get("train", {}))
        for layout in (source, target)
    )
    whole = lived(ranks, here, tmp_path / "a")
    first, last = content(tmp_path / "a", 3), content(tmp_path / "a", 6)
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

    same = lived(ranks, here, tmp_path / "a", tmp_path / "a")
    assert digits(same) == digits(whole) and same_bits(last, content(tmp_path / "a", 6))
