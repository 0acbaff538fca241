"""Whole trajectories in float64: under every kind of layout, and over a restart, they are those of one process."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layouts import small_recipe
from ranks import Ranks
from test_checkpoint import digits, lived

from parallel.checkpoint.files import move_latest, step_folder
from parallel.recipe import Recipe

ODD = dict(vocab_size=67)  # divides by nothing that a layout here has
TIED = ODD | dict(tied_embeddings=True)
FOUR_HEADS = dict(n_kv_heads=4)
UNEVEN = ODD | dict(n_layers=5)
KINDS: dict[str, dict[str, Any]] = {
    "single, accumulated": dict(model=TIED, train=dict(micro_batch=3)),
    "ddp": dict(model=ODD, parallel=dict(dp_replicate=4)),
    "ddp, no overlap, accumulated": dict(
        model=TIED, parallel=dict(dp_replicate=2), ddp=dict(overlap=False), train=dict(micro_batch=3)
    ),
    "zero2": dict(model=ODD, parallel=dict(dp_shard=4), sharding=dict(reshard_after_forward=False)),
    "fsdp": dict(model=TIED, parallel=dict(dp_shard=4), train=dict(micro_batch=1)),
    "fsdp of three": dict(model=UNEVEN, parallel=dict(dp_shard=3), train=dict(global_batch=9, micro_batch=2)),
    "fsdp, recompute": dict(model=UNEVEN, parallel=dict(dp_shard=2), recompute=dict(mode="full")),
    "fsdp, selective": dict(model=ODD, parallel=dict(dp_shard=2), recompute=dict(mode="selective")),
    "fsdp, loss in chunks": dict(model=TIED, parallel=dict(dp_shard=2), train=dict(loss_chunks=3)),
    "hsdp": dict(model=TIED, parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1)),
    "tp": dict(model=ODD | FOUR_HEADS, parallel=dict(tp=4), tensor=dict(sequence_parallel=False)),
    "tp, sp": dict(model=TIED | FOUR_HEADS, parallel=dict(tp=4), train=dict(micro_batch=3)),
    "tp, sp, groups recomputed": dict(model=UNEVEN, parallel=dict(tp=2), recompute=dict(mode="sqrt")),
    "ring": dict(model=ODD, parallel=dict(cp=4)),
    "all-gather": dict(model=TIED, parallel=dict(cp=2), context=dict(method="all-gather")),
    "ulysses": dict(model=TIED, parallel=dict(cp=2), context=dict(method="ulysses"), train=dict(micro_batch=3)),
    "gpipe": dict(model=UNEVEN, parallel=dict(pp=4), pipeline=dict(schedule="gpipe"), train=dict(micro_batch=2)),
    "1f1b": dict(model=TIED | dict(n_layers=5), parallel=dict(pp=4), train=dict(micro_batch=1)),
    "interleaved": dict(
        model=TIED, parallel=dict(pp=2), pipeline=dict(schedule="interleaved-1f1b"), train=dict(micro_batch=1)
    ),
    "looped-bfs": dict(model=ODD, parallel=dict(pp=2), pipeline=dict(schedule="looped-bfs"), train=dict(micro_batch=1)),
    "zero bubble": dict(
        model=TIED, parallel=dict(pp=2), pipeline=dict(schedule="interleaved-zero-bubble"), train=dict(micro_batch=1)
    ),
    "zbv": dict(model=TIED, parallel=dict(pp=2), pipeline=dict(schedule="zbv"), train=dict(micro_batch=1)),
    "dualpipev": dict(model=ODD, parallel=dict(pp=2), pipeline=dict(schedule="dualpipev"), train=dict(micro_batch=1)),
    "ddp · fsdp · tp": dict(model=TIED, parallel=dict(dp_replicate=2, dp_shard=2, tp=2)),
    "pp · fsdp · tp": dict(model=TIED, parallel=dict(pp=2, dp_shard=2, tp=2), train=dict(micro_batch=2)),
    "pp · ddp · cp": dict(model=ODD, parallel=dict(pp=2, dp_replicate=2, cp=2), train=dict(micro_batch=2)),
    "fsdp · cp · tp": dict(model=TIED, parallel=dict(dp_shard=2, cp=2, tp=2), train=dict(micro_batch=2)),
    "zbv · fsdp": dict(
        model=TIED,
        parallel=dict(pp=2, dp_shard=2),
        pipeline=dict(schedule="zbv"),
        sharding=dict(reshard_after_forward=False),
        train=dict(micro_batch=1),
    ),
    "pp · cp · tp": dict(model=ODD, parallel=dict(pp=2, cp=2, tp=2), train=dict(micro_batch=2)),
    "ddp, compiled": dict(model=TIED, parallel=dict(dp_replicate=2), train=dict(compile="aot_eager")),
}
STEPS, SAVED = 8, 5
LONG = (  # each has others here that are much like it
    "ddp", "fsdp of three", "fsdp, recompute", "fsdp, loss in chunks", "tp", "tp, sp, groups recomputed", "all-gather",
    "gpipe", "interleaved", "zero bubble", "zbv", "ddp · fsdp · tp", "fsdp · cp · tp", "pp · cp · tp",
)  # fmt: skip


def recipe_of(kind: dict[str, Any]) -> Recipe:
    train = dict(steps=STEPS, learning_rate=1e-2, grad_clip=0.1, parity=False) | kind.get("train", {})
    return small_recipe(**kind | dict(train=train, checkpoint=dict(every=SAVED)))


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The steps of one process that takes the whole batch at once."""

    @cache
    def steps(global_batch: int, **model: Any) -> list[dict[str, Any]]:
        recipe = recipe_of(dict(model=dict(model), train=dict(global_batch=global_batch, micro_batch=global_batch)))
        return lived(ranks, recipe, tmp_path_factory.mktemp("alone"))

    return steps


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind in LONG)) for kind in KINDS])
def test_eight_steps_and_a_restart_are_those_of_one_process(
    ranks: Ranks, alone: Any, tmp_path: Path, kind: str
) -> None:
    """With clipping at work, so that a norm that misses a shard or counts one twice shows in the next step's loss."""
    recipe = recipe_of(KINDS[kind])
    steps, expected = lived(ranks, recipe, tmp_path), alone(recipe.train.global_batch, **KINDS[kind]["model"])
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], abs=1e-12)
    assert [step["grad_norm"] for step in steps] == pytest.approx([step["grad_norm"] for step in expected], rel=1e-9)
    assert min(step["grad_norm"] for step in steps) > 0.2  # clipping halves each at least
    move_latest(step_folder(tmp_path, SAVED))
    assert digits(lived(ranks, recipe, tmp_path, tmp_path)) == digits(steps)
