"""Every collective of a step, on real gloo ranks, held to the textbook's volume to the byte."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import CPU, batch_of, small_recipe
from ranks import Ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.assemble import assemble
from parallel.batches import rows_of_replica
from parallel.measure.counters import largest_traffic
from parallel.measure.traffic import TrafficLog
from parallel.mesh import build_mesh
from parallel.recipe import Recipe
from parallel.strategies.pipeline import stages_of_rank

Rows = dict[tuple[str, str], tuple[int, int]]  # (mesh_dim, collective) -> (calls, bytes_per_rank)

E, S = 4, 8  # bytes of a float32 weight or activation, and of the loss and of the norm, scalars in float64
L, D, F, V, HEADS, KV, HEAD_DIM = 4, 32, 48, 68, 4, 2, 8  # the small model
B, T = 8, 16  # sequences of the global batch, tokens
HIDDEN = B * T * D * E  # the residual stream of the whole batch
BLOCK = [(D, D), (D // 2, D), (D // 2, D), (D, D), (F, D), (F, D), (D, F), (D, 1), (D, 1)]
EMBEDDING, HEAD = [(V, D)], [(D, 1), (V, D)]


def n_bytes(weights: list[tuple[int, int]], *, ranks: int = 1) -> int:
    """FSDP splits rows, and pads them to a multiple of its ranks."""
    return sum(-(-rows // ranks) * ranks * columns * E for rows, columns in weights)


MODEL = EMBEDDING + L * BLOCK + HEAD


def observe(recipe: Recipe, sabotage: bool = False) -> Rows:
    """The traffic of this rank in the second step: in the first, a pipeline makes its connections."""
    mesh = build_mesh(recipe, "cpu")
    model, batch = assemble(recipe, mesh=mesh, device=CPU), batch_of(recipe, rows_of_replica(recipe, mesh))
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.named_parameters()], fused=True)

    def step() -> None:
        model.zero_gradients()
        model.forward_backward(*batch)
        model.clip_gradients(norm=model.gradient_norm(), largest=1.0)
        optimizer.step()

    step()
    with TrafficLog(mesh) as log:
        step()
        if sabotage:
            dist.all_reduce(torch.zeros(1), group=mesh.get_group("data"))
    return {(row["mesh_dim"], row["collective"]): (row["calls"], row["bytes_per_rank"]) for row in log.rows()}


def observed(ranks: Ranks, *, sabotage: bool = False, **sections: dict[str, Any]) -> list[Rows]:
    recipe = small_recipe("float32", **sections)
    return ranks(recipe.world_size, observe, recipe, sabotage)


def ring(n: int, ranks: int) -> int:
    """n·(N-1)/N: an all-gather or a reduce-scatter of n bytes in all; an all-reduce is both."""
    return round(n * (ranks - 1) / ranks)


def add(*counts: tuple[int, int]) -> tuple[int, int]:
    calls, sent = zip(*counts, strict=True)
    return sum(calls), sum(sent)


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_ddp_sends_two_models(ranks: Ranks, n: int) -> None:
    for rows in observed(ranks, parallel=dict(dp_replicate=n), train=dict(micro_batch=1)):
        assert rows == {("dp_replicate", "all_reduce"): (2, 2 * ring(n_bytes(MODEL) + S, n))}


def test_ddp_in_buckets_sends_the_same_in_more_calls(ranks: Ranks) -> None:
    (rows, _) = observed(ranks, parallel=dict(dp_replicate=2), ddp=dict(bucket_mib=0.001))
    calls, sent = rows["dp_replicate", "all_reduce"]
    assert (calls > 20, sent) == (True, n_bytes(MODEL) + S)


def test_thirds_of_bytes_are_rounded_once(ranks: Ranks) -> None:
    rows = observed(ranks, parallel=dict(dp_replicate=3), train=dict(global_batch=9))[0]
    assert rows == {("dp_replicate", "all_reduce"): (2, round(4 * (n_bytes(MODEL) + S) / 3))}


@pytest.mark.parametrize(("n", "m", "reshard"), [(2, 1, True), (2, 2, True), (3, 1, True), (2, 2, False)])
def test_fsdp_sends_three_models_and_zero2_two(ranks: Ranks, n: int, m: int, reshard: bool) -> None:
    """In each of m microbatches: gather for forward, gather again for backward (ZeRO-2: not), scatter gradients.

    The weights of the last unit, norm and output, stay gathered from forward to backward in either case. A third of
    the rows does not come out even: there the padding travels too.
    """
    units = L + 2
    again, units_again = (EMBEDDING + L * BLOCK, L + 1) if reshard else ([], 0)
    for rows in observed(
        ranks,
        parallel=dict(dp_shard=n),
        sharding=dict(reshard_after_forward=reshard),
        train=dict(global_batch=2 * n, micro_batch=2 // m),
    ):
        gathered, scattered = n_bytes(MODEL + again, ranks=n), n_bytes(MODEL, ranks=n)
        assert rows == {
            ("dp_shard", "all_gather"): (m * (units + units_again), m * ring(gathered, n)),
            ("dp_shard", "reduce_scatter"): (m * units, m * ring(scattered, n)),
            ("dp_shard", "all_reduce"): (2, round(2 * 2 * S * (n - 1) / n)),  # loss, norm
        }


def test_hsdp_reduces_shards_between_replicas_once_a_step(ranks: Ranks) -> None:
    m, units = 2, L + 2
    for rows in observed(ranks, parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1)):
        assert rows == {
            ("dp_shard", "all_gather"): (m * (2 * units - 1), m * ring(2 * n_bytes(MODEL) - n_bytes(HEAD), 2)),
            ("dp_shard", "reduce_scatter"): (m * units, m * ring(n_bytes(MODEL), 2)),
            ("dp_shard", "all_reduce"): (1, S),  # norm
            ("dp_replicate", "all_reduce"): (units, n_bytes(MODEL) // 2),
            ("dp_replicate·dp_shard", "all_reduce"): (1, 2 * ring(S, 4)),  # loss
        }


# ---- tensor --------------------------------------------------------------------------------------------------------

LOSS = 3 * B * T * E  # of each token, over all microbatches: the largest logit, then Σ exp and the target's logit


@pytest.mark.parametrize(("t", "recompute", "n_microbatches"), [(2, "none", 1), (4, "none", 2), (2, "full", 2)])
def test_tensor_parallel_without_sequence_parallel(ranks: Ranks, t: int, recompute: str, n_microbatches: int) -> None:
    """8·b·s·h·(t-1)/t a layer: 2 all-reduces in forward, 2 in backward. Recompute repeats one of them.

    It stops before the last matmul of a block, whose result backward does not need, and so before its all-reduce.
    """
    a_layer = 5 if recompute == "full" else 4
    for rows in observed(
        ranks,
        parallel=dict(tp=t),
        model=dict(n_kv_heads=4),
        tensor=dict(sequence_parallel=False),
        train=dict(micro_batch=B // n_microbatches),
        recompute=dict(mode=recompute),
    ):
        hidden = a_layer * L + 2  # the embedding in forward, the output projection in backward
        calls = n_microbatches * (hidden + 2) + 1
        assert rows == {("tp", "all_reduce"): (calls, 2 * ring(hidden * HIDDEN + LOSS + S, t))}


@pytest.mark.parametrize(("t", "recompute", "n_microbatches"), [(2, "none", 1), (4, "none", 2), (2, "full", 2)])
def test_tensor_parallel_with_sequence_parallel(ranks: Ranks, t: int, recompute: str, n_microbatches: int) -> None:
    """The same volume, as all-gathers and reduce-scatters; and the gradients of the norms' weights."""
    gathers, scatters = (6, 5) if recompute == "full" else (4, 4)
    norms = 2 * L + 1
    for rows in observed(
        ranks,
        parallel=dict(tp=t),
        model=dict(n_kv_heads=4),
        train=dict(micro_batch=B // n_microbatches),
        recompute=dict(mode=recompute),
    ):
        gathers_of_all, scatters_of_all = gathers * L + 2, scatters * L + 2
        reduced = n_microbatches * norms * D * E + LOSS + S
        assert rows == {
            ("tp", "all_gather"): (n_microbatches * gathers_of_all, ring(gathers_of_all * HIDDEN, t)),
            ("tp", "reduce_scatter"): (n_microbatches * scatters_of_all, ring(scatters_of_all * HIDDEN, t)),
            ("tp", "all_reduce"): (n_microbatches * (norms + 2) + 1, 2 * ring(reduced, t)),
        }


def test_without_loss_parallel_the_logits_travel(ranks: Ranks) -> None:
    (rows, _) = observed(
        ranks,
        parallel=dict(tp=2),
        model=dict(vocab_size=V - 1),  # padded to V
        tensor=dict(sequence_parallel=False, loss_parallel=False),
    )
    assert rows == {
        ("tp", "all_gather"): (1, ring(B * T * V * E, 2)),
        ("tp", "all_reduce"): (4 * L + 2 + 1, 2 * ring((4 * L + 2) * HIDDEN + S, 2)),
    }


# ---- context -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "method"), [*itertools.product((2, 4), ("ring", "all-gather", "ulysses"))])
def test_context_parallel(ranks: Ranks, c: int, method: str) -> None:
    kv = 2 * B * 4 * (T // c) * HEAD_DIM * E  # one rank's K and V, of 4 heads
    heads = B * (HEADS + 2 * 4 + HEADS) * (T // c) * HEAD_DIM * E  # its q, k, v, and the result
    gradients = {("cp", "all_reduce"): (2, 2 * ring(n_bytes(MODEL) + 2 * L * (D // 2) * D * E + S, c))}
    expected = {
        "ring": {  # K and V in forward, K and V and their gradients in backward
            ("cp", "send"): (3 * (c - 1) * L, 3 * (c - 1) * kv * L),
            ("cp", "recv"): (3 * (c - 1) * L, 0),
        },
        "all-gather": {
            ("cp", "all_gather"): (L, ring(c * kv * L, c)),
            ("cp", "reduce_scatter"): (L, ring(c * kv * L, c)),
        },
        "ulysses": {("cp", "all_to_all"): (2 * 2 * L, 2 * ring(heads * L, c))},
    }[method]
    for rows in observed(ranks, parallel=dict(cp=c), context=dict(method=method), model=dict(n_kv_heads=4)):
        assert rows == expected | gradients


# ---- pipeline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "pp"), [("gpipe", 2), ("1f1b", 4), ("interleaved-1f1b", 2), ("zbv", 2), ("dualpipev", 2)]
)
def test_pipeline_sends_the_residual_stream_over_each_boundary(ranks: Ranks, schedule: str, pp: int) -> None:
    n_microbatches, sections = 4, dict(pipeline=dict(schedule=schedule), train=dict(micro_batch=B // 4))
    recipe = small_recipe("float32", parallel=dict(pp=pp), **sections)
    held = [stages_of_rank(recipe, rank) for rank in range(pp)]
    for rank, rows in enumerate(observed(ranks, parallel=dict(pp=pp), **sections)):
        boundaries = range(recipe.n_stages - 1)  # between stage i and i + 1; at the turn of a V both are here
        forward = sum(i in held[rank] and i + 1 not in held[rank] for i in boundaries)
        backward = sum(i + 1 in held[rank] and i not in held[rank] for i in boundaries)
        messages = n_microbatches * (forward + backward)
        last = recipe.n_stages - 1 in held[rank]
        assert rows == {
            ("pp", "send"): (messages, (forward + backward) * HIDDEN),
            ("pp", "recv"): (messages, 0),
            ("pp", "broadcast"): (1, S if last else 0),  # loss
            ("pp", "all_reduce"): (1, 2 * ring(S, pp)),  # norm
        }


def test_tied_embeddings_of_a_pipeline_exchange_their_gradients(ranks: Ranks) -> None:
    sections = dict(parallel=dict(pp=2), train=dict(micro_batch=2))
    for plain, tied in zip(
        observed(ranks, **sections), observed(ranks, **sections, model=dict(tied_embeddings=True)), strict=True
    ):
        assert tied["pp", "send"] == add(plain["pp", "send"], (1, n_bytes(EMBEDDING)))


# ---- mixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "dims"),
    [
        (dict(dp_shard=2, cp=2), {"dp_shard·cp", "cp"}),
        (dict(dp_replicate=2, cp=2), {"dp_replicate·cp", "cp"}),
        (dict(pp=2, tp=2), {"pp", "tp"}),
    ],
)
def test_each_group_has_the_name_of_its_dimensions(ranks: Ranks, parallel: dict[str, int], dims: set[str]) -> None:
    for rows in observed(ranks, parallel=parallel, train=dict(micro_batch=1)):
        assert {dim for dim, _ in rows} == dims


def test_one_process_sends_nothing(ranks: Ranks) -> None:
    assert observed(ranks) == [{}]


def test_an_extra_all_reduce_is_found(ranks: Ranks) -> None:
    honest, sabotaged = (observed(ranks, sabotage=extra, parallel=dict(dp_replicate=2))[0] for extra in (False, True))
    assert sabotaged["dp_replicate", "all_reduce"] == add(honest["dp_replicate", "all_reduce"], (1, 4))


def row(mesh_dim: str, collective: str, calls: int, bytes_per_rank: int | None) -> dict[str, Any]:
    row = dict(mesh_dim=mesh_dim, collective=collective, calls=calls, bytes_per_rank=bytes_per_rank)
    return row | dict(bytes_across_hosts=None)


def collectives() -> list[dict[str, Any]]:
    """One of each kind on four ranks, with 12 bytes; the mesh has dp_replicate = 2 and tp = 2."""
    rank, x = dist.get_rank(), torch.arange(3.0)
    mesh = build_mesh(small_recipe(parallel=dict(dp_replicate=2, tp=2)), "cpu")
    tp, stranger = mesh.get_group("tp"), dist.new_group([0, 3])
    with TrafficLog(mesh) as log:
        dist.all_reduce(x)
        dist.all_gather([x.clone() for _ in range(2)], x, group=tp)
        dist.all_gather_into_tensor(torch.zeros(6), x, group=tp)
        dist.broadcast(x, 0)
        splits = [1, 2] if rank in (0, 2) else [2, 1]  # tp rank 0 keeps one of three elements, tp rank 1 one too
        dist.all_to_all_single(torch.zeros(3), x, splits, splits, group=tp)
        dist.reduce(x, 0)  # no strategy here uses it: what it sends is not known
        if rank in (0, 3):
            dist.all_reduce(x, group=stranger)
        if rank == 0:
            dist.send(x, 1)
        if rank == 1:
            dist.recv(x, 0)
        dist.all_reduce(x, group=mesh.get_group("pp"))  # alone
        dist.barrier()
    return log.rows()


def test_each_collective_counts_what_a_rank_sends(ranks: Ranks) -> None:
    first, second, _, last = ranks(4, collectives)
    of_all = [row("tp", "all_gather", 2, 24), row("tp", "all_to_all", 1, 8), row("world", "all_reduce", 1, 18)]
    stranger = row("none", "all_reduce", 1, 12)
    assert first == [
        stranger,
        *of_all,
        row("world", "broadcast", 1, 12),
        row("world", "reduce", 1, None),
        row("world", "send", 1, 12),
    ]
    assert second == [
        *of_all,
        row("world", "broadcast", 1, 0),
        row("world", "recv", 1, 0),
        row("world", "reduce", 1, None),
    ]
    assert last == [stranger, *of_all, row("world", "broadcast", 1, 0), row("world", "reduce", 1, None)]


HOSTS = [0, 0, 1, 1]


def across() -> dict[tuple[str, str], tuple[int, int]]:
    """(bytes_per_rank, bytes_across_hosts) where ranks 0 and 1 are on one host, 2 and 3 on another; 12 bytes go in."""
    rank, x = dist.get_rank(), torch.arange(3.0)
    mesh = build_mesh(small_recipe(parallel=dict(dp_replicate=2, tp=2)), "cpu")
    replicas = mesh.get_group("dp_replicate")
    with TrafficLog(mesh, HOSTS) as log:
        dist.all_reduce(x)
        dist.broadcast(x, 1)
        dist.all_reduce(x, group=mesh.get_group("tp"))
        dist.all_gather_into_tensor(torch.zeros(6), x, group=replicas)
        splits = [1, 2] if rank < 2 else [2, 1]  # ranks 0 and 1 keep one of three elements, the others one too
        dist.all_to_all_single(torch.zeros(3), x, splits, splits, group=replicas)
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4))
        for to in (1, 3):
            if rank == 0:
                dist.send(x, to)
            if rank == to:
                dist.recv(x, 0)
    return {
        (row["mesh_dim"], row["collective"]): (row["bytes_per_rank"], row["bytes_across_hosts"]) for row in log.rows()
    }


def test_what_goes_to_another_host_is_counted_apart(ranks: Ranks) -> None:
    alike = {("tp", "all_reduce"): (12, 0), ("dp_replicate", "all_gather"): (12, 12)}
    alike |= {("dp_replicate", "all_to_all"): (8, 8), ("world", "all_to_all"): (12, 8)}
    assert ranks(4, across) == [
        alike | {("world", "all_reduce"): (18, 0), ("world", "broadcast"): (0, 0), ("world", "send"): (24, 12)},
        alike | {("world", "all_reduce"): (18, 18), ("world", "broadcast"): (12, 12), ("world", "recv"): (0, 0)},
        alike | {("world", "all_reduce"): (18, 0), ("world", "broadcast"): (0, 0)},
        alike | {("world", "all_reduce"): (18, 18), ("world", "broadcast"): (0, 0), ("world", "recv"): (0, 0)},
    ]


def test_the_record_has_the_most_that_any_rank_sends_and_the_most_that_any_sends_to_another_host() -> None:
    inner, outer = (row("world", "all_reduce", 3, 18) | {"bytes_across_hosts": n_bytes} for n_bytes in (0, 18))
    assert largest_traffic([[inner], [outer], [inner]]) == [outer]
    assert largest_traffic([[row("tp", "send", 1, 5)], []]) == [row("tp", "send", 1, 5)]
    assert inner["bytes_across_hosts"] == 0


# ---- fake is real --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        dict(parallel=dict(dp_replicate=2)),
        dict(parallel=dict(dp_replicate=2, dp_shard=2), train=dict(micro_batch=1)),
        dict(parallel=dict(tp=2), recompute=dict(mode="full")),
        dict(parallel=dict(cp=2)),
        dict(parallel=dict(cp=2), context=dict(method="ulysses")),
    ],
)
def test_a_fake_group_gives_the_traffic_of_a_real_one(ranks: Ranks, sections: dict[str, dict[str, Any]]) -> None:
    recipe = small_recipe("float32", **sections)
    dist.init_process_group("fake", rank=0, world_size=recipe.world_size, store=FakeStore())
    try:
        fake = observe(recipe)
    finally:
        dist.destroy_process_group()
    assert fake == observed(ranks, **sections)[0]
