"""Every strategy, option and mix computes the gradients of one process, on real gloo ranks, in float64.

Each case also doubles one gradient on one rank afterwards, and must be found out.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from layouts import parity, small_recipe
from ranks import Ranks

from parallel.measure.parity import TOLERANCE
from parallel.recipe import SCHEDULES, SPLIT_BACKWARD_SCHEDULES

Sections = dict[str, dict[str, Any]]


def case(name: str, **sections: dict[str, Any]) -> Any:
    return pytest.param(sections, id=name)


def case_of(**sections: dict[str, Any]) -> Any:
    """A case named after what it sets."""
    words = [f"{key}={value}" for table in sections.values() for key, value in table.items()]
    return case(",".join(words), **sections)


def one_of_two(cases: Iterable[Any]) -> list[Any]:
    """Of each two neighbours one; the others are left to `make test-long`.

    Not the same one throughout: in a product, no value of its last factor is always left out.
    """
    return [
        pytest.param(*one.values, id=one.id, marks=pytest.mark.long) if (number // 4 + number) % 2 else one
        for number, one in enumerate(cases)
    ]


def whole_weights(schedule: str) -> dict[str, bool]:
    """[sharding] for FSDP under `schedule`: the split-backward ones need weights that stay until backward."""
    return {"reshard_after_forward": schedule not in SPLIT_BACKWARD_SCHEDULES}


DATA = [
    case("single"),
    case("single, accumulation", train=dict(micro_batch=2)),
    case("ddp", parallel=dict(dp_replicate=4)),
    case("ddp, many buckets", parallel=dict(dp_replicate=2), ddp=dict(bucket_mib=0.001)),
    case("ddp, no overlap", parallel=dict(dp_replicate=2), ddp=dict(overlap=False, bucket_mib=0.01)),
    case("ddp, accumulation 2", parallel=dict(dp_replicate=2), train=dict(micro_batch=2)),
    case("ddp, accumulation 4", parallel=dict(dp_replicate=2), train=dict(micro_batch=1)),
    case("ddp, short last microbatch", parallel=dict(dp_replicate=2), train=dict(micro_batch=3)),
    case("ddp, three ranks", parallel=dict(dp_replicate=3), train=dict(global_batch=9, micro_batch=2)),
    case("ddp, tied", parallel=dict(dp_replicate=2), model=dict(tied_embeddings=True)),
    case("zero2", parallel=dict(dp_shard=4), sharding=dict(reshard_after_forward=False)),
    case("fsdp", parallel=dict(dp_shard=4)),
    case("fsdp, three ranks that divide nothing", parallel=dict(dp_shard=3), train=dict(global_batch=9, micro_batch=2)),
    case("fsdp, tied", parallel=dict(dp_shard=2), model=dict(tied_embeddings=True)),
    case("fsdp, prefetch", parallel=dict(dp_shard=2), sharding=dict(prefetch=2)),
    case("fsdp, accumulation 2", parallel=dict(dp_shard=2), train=dict(micro_batch=2)),
    case("fsdp, accumulation 4", parallel=dict(dp_shard=2), train=dict(micro_batch=1)),
    case("fsdp, short last microbatch", parallel=dict(dp_shard=2), train=dict(micro_batch=3)),
    case("fsdp, more ranks than rows", parallel=dict(dp_shard=8), model=dict(d_model=6, n_heads=1, n_kv_heads=1)),
    case("hsdp", parallel=dict(dp_replicate=2, dp_shard=2)),
    case("hsdp, accumulation 4", parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1, global_batch=16)),
    case("hsdp, zero2", parallel=dict(dp_replicate=2, dp_shard=2), sharding=dict(reshard_after_forward=False)),
]

RECOMPUTE = [
    *one_of_two(
        case_of(parallel=parallel, recompute=recompute)
        for parallel, recompute in itertools.product(
            (dict(dp_replicate=2), dict(dp_shard=2), dict(tp=2), dict(cp=2)),
            (dict(mode="full"), dict(mode="every(2)"), dict(mode="sqrt"), dict(mode="selective")),
        )
    ),
    case_of(parallel=dict(dp_shard=2, tp=2), recompute=dict(mode="selective", save=["attention"])),
]

TENSOR = [
    *one_of_two(
        case_of(parallel=dict(tp=2), tensor=dict(sequence_parallel=sp, loss_parallel=lp), model=model)
        for sp, lp, model in itertools.product(
            (False, True),
            (False, True),
            (dict(vocab_size=68), dict(vocab_size=67), dict(tied_embeddings=True, vocab_size=67)),
        )
    ),
    case("tp 4, one kv head each", parallel=dict(tp=4), model=dict(n_kv_heads=4, vocab_size=70)),
    case("tp 3", parallel=dict(tp=3), model=dict(d_model=36, n_heads=6, n_kv_heads=3, vocab_size=67),
         train=dict(seq_len=15)),
    case("tp, accumulation", parallel=dict(tp=2), train=dict(micro_batch=3)),
    case("ddp·tp", parallel=dict(dp_replicate=2, tp=2), train=dict(micro_batch=2)),
    case("ddp·tp without sp", parallel=dict(dp_replicate=2, tp=2), tensor=dict(sequence_parallel=False)),
    case("fsdp·tp", parallel=dict(dp_shard=2, tp=2), model=dict(vocab_size=67)),
    case("fsdp·tp, tied", parallel=dict(dp_shard=2, tp=2), model=dict(tied_embeddings=True)),
    case("fsdp·tp without sp", parallel=dict(dp_shard=2, tp=2),
         tensor=dict(sequence_parallel=False, loss_parallel=False)),
]  # fmt: skip

CONTEXT = one_of_two(
    [
        *(
            case_of(parallel=dict(cp=cp), context=dict(method=method), model=dict(n_kv_heads=kv))
            for cp, method, kv in itertools.product((2, 4), ("ring", "all-gather", "ulysses"), (1, 4))
        ),
        *(
            case_of(parallel=parallel, context=dict(method=method), train=dict(micro_batch=2))
            for parallel, method in itertools.product(
                (dict(dp_shard=2, cp=2), dict(dp_replicate=2, cp=2), dict(cp=2, tp=2)),
                ("ring", "all-gather", "ulysses"),
            )
        ),
    ]
)

PIPELINE = [
    *one_of_two(
        case_of(pipeline=dict(schedule=schedule), parallel=parallel, train=dict(micro_batch=micro_batch), model=model)
        for schedule in SCHEDULES
        for parallel, micro_batch, model in (
            (dict(pp=2), 2, dict()),
            (dict(pp=2), 1, dict(n_layers=5, tied_embeddings=True)),
            (dict(pp=4), 1, dict(n_layers=9)),
        )
    ),
    case("three stages a rank", parallel=dict(pp=2), pipeline=dict(schedule="interleaved-1f1b", stages_per_rank=3),
         model=dict(n_layers=7), train=dict(micro_batch=1)),
]  # fmt: skip

MIXES = [
    *one_of_two(
        case_of(parallel=parallel, pipeline=dict(schedule=schedule), sharding=whole_weights(schedule),
                train=dict(micro_batch=1, global_batch=16),
                model=dict(n_layers=5, tied_embeddings=True, vocab_size=67))
        for schedule in SCHEDULES
        for parallel in (dict(pp=2, dp_shard=2), dict(pp=2, dp_replicate=2), dict(pp=2, dp_shard=2, tp=2))
    ),
    *one_of_two(
        case_of(parallel=parallel, recompute=dict(mode=recompute), train=dict(micro_batch=1))
        for parallel in (
            dict(dp_replicate=2, dp_shard=2, tp=2),
            dict(dp_shard=2, cp=2, tp=2),
            dict(pp=2, cp=2, tp=2),
            dict(pp=2, dp_replicate=2, cp=2),
            dict(pp=2, dp_replicate=2, dp_shard=2),
            dict(pp=2, dp_shard=2, cp=2),
            dict(dp_replicate=2, cp=2, tp=2),
            dict(dp_replicate=2, dp_shard=2, cp=2),
        )
        for recompute in ("none", "full")
    ),
    case("pp4·tp2, zbv", parallel=dict(pp=4, tp=2), pipeline=dict(schedule="zbv"), train=dict(micro_batch=1),
         model=dict(n_layers=8)),
    case("pp2·fsdp2·cp2, zbv, ulysses", parallel=dict(pp=2, dp_shard=2, cp=2), pipeline=dict(schedule="zbv"),
         context=dict(method="ulysses"), sharding=whole_weights("zbv"), train=dict(micro_batch=1)),
    case("pp2·cp2·tp2, dualpipev, all-gather", parallel=dict(pp=2, cp=2, tp=2), pipeline=dict(schedule="dualpipev"),
         context=dict(method="all-gather"), train=dict(micro_batch=1)),
]  # fmt: skip

LOSS_CHUNKS = [
    case_of(train=dict(loss_chunks=chunks, micro_batch=3), **sections)
    for chunks, sections in (
        (2, dict(model=dict(vocab_size=67))),
        (3, dict(model=dict(tied_embeddings=True))),
        (16, dict(parallel=dict(dp_replicate=2), recompute=dict(mode="full"))),
        (3, dict(parallel=dict(dp_replicate=2), model=dict(tied_embeddings=True), ddp=dict(bucket_mib=0.01))),
        (3, dict(parallel=dict(dp_shard=2))),
        (3, dict(parallel=dict(dp_shard=2), sharding=dict(reshard_after_forward=False))),
        (3, dict(parallel=dict(dp_shard=2), model=dict(tied_embeddings=True))),
        *((3, dict(parallel=dict(cp=2), context=dict(method=method))) for method in ("ring", "all-gather", "ulysses")),
        *(
            (3, dict(parallel=dict(tp=2), tensor=dict(sequence_parallel=sp, loss_parallel=lp),
                     model=dict(vocab_size=67, tied_embeddings=sp)))
            for sp, lp in itertools.product((False, True), (False, True))
        ),
        (7, dict(parallel=dict(dp_shard=2, cp=2, tp=2))),
    )
] + [
    case("loss_chunks, hsdp, accumulation", parallel=dict(dp_replicate=2, dp_shard=2),
         train=dict(loss_chunks=5, micro_batch=1)),
] + one_of_two(
    case_of(pipeline=dict(schedule=schedule), sharding=whole_weights(schedule), parallel=parallel,
            train=dict(loss_chunks=3, micro_batch=1), model=dict(n_layers=5, tied_embeddings=True, vocab_size=67))
    for schedule in SCHEDULES
    for parallel in (dict(pp=2), dict(pp=2, dp_shard=2, tp=2))
)  # fmt: skip


COMPILE = [
    case_of(train=dict(compile="aot_eager", micro_batch=1), **sections)
    for sections in (
        dict(parallel=dict(dp_replicate=2)),
        dict(parallel=dict(dp_shard=2), recompute=dict(mode="full")),
        dict(parallel=dict(dp_shard=2), recompute=dict(mode="sqrt")),
        dict(parallel=dict(dp_shard=2, tp=2), recompute=dict(mode="selective")),
        dict(parallel=dict(tp=2), tensor=dict(sequence_parallel=False, loss_parallel=False)),
        dict(parallel=dict(cp=2), context=dict(method="ring")),
        dict(parallel=dict(cp=2), context=dict(method="all-gather"), recompute=dict(mode="sqrt")),
        dict(parallel=dict(cp=2), context=dict(method="ulysses"), recompute=dict(mode="full")),
        dict(parallel=dict(pp=2, dp_shard=2), pipeline=dict(schedule="1f1b")),
        dict(parallel=dict(pp=2), pipeline=dict(schedule="interleaved-1f1b"), recompute=dict(mode="full")),
    )
] + [case("inductor", train=dict(compile="inductor", attention="math", loss_chunks=3), model=dict(n_layers=1))]


@pytest.mark.parametrize("sections", DATA + RECOMPUTE + TENSOR + CONTEXT + PIPELINE + MIXES + LOSS_CHUNKS + COMPILE)
def test_gradients_are_those_of_one_process(ranks: Ranks, sections: Sections) -> None:
    recipe = small_recipe(**sections)
    differences, sabotaged = ranks(recipe.world_size, parity, recipe)[0]
    assert differences["max_rel_grad_diff"] <= TOLERANCE
    assert differences["max_abs_loss_diff"] <= TOLERANCE
    assert sabotaged["max_rel_grad_diff"] > 1e-3
