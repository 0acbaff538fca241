"""Ranks that are alike, so that one of each kind says everything; and a recipe on more or fewer ranks."""

import itertools
from typing import Any

from parallel.mesh import part_of, rank_at
from parallel.recipe import Recipe, RecipeError, recipe_from_tables
from parallel.strategies.pipeline import stage_layers, stages_of_rank


def scaled(recipe: Recipe, world_size: int) -> Recipe:
    """`recipe` on `world_size` ranks: dp_shard (dp_replicate where that is 1) changes, and global_batch with it.

    Every rank keeps its microbatches. Raises RecipeError where the other dimensions do not divide `world_size`.
    """
    dim = "dp_shard" if recipe.parallel.dp_shard > 1 else "dp_replicate"
    before = getattr(recipe.parallel, dim)
    others = recipe.world_size // before
    if world_size < 1 or world_size % others:
        raise RecipeError("--world-size", world_size, f"only {dim} is scaled; give a multiple of the rest, {others}")
    after = world_size // others
    tables = recipe.resolved()
    tables["parallel"][dim] = after
    tables["train"]["global_batch"] = recipe.train.global_batch // before * after
    return recipe_from_tables(tables)


def alike_in_pipeline(recipe: Recipe) -> list[int]:
    """Of each rank of the pipeline, the first like it: with stages of as many layers, and of the same ends."""
    layers = stage_layers(n_layers=recipe.model.n_layers, n_stages=recipe.n_stages)
    first: dict[tuple[Any, ...], int] = {}
    alike = []
    for pp in range(recipe.parallel.pp):
        kind = tuple((len(layers[i]), i == 0, i == recipe.n_stages - 1) for i in stages_of_rank(recipe, pp))
        alike.append(first.setdefault(kind, pp))
    return alike


def priced_ranks(recipe: Recipe) -> dict[int, int]:
    """By rank of the pipeline, the first of each kind: of its ranks the busiest.

    That has the last tokens of the sequence, for which attention comes in the most pieces.
    """
    last = recipe.parallel.cp - 1 if recipe.context.zigzag else 0
    return {place: rank_at(recipe, pp=place, cp=last) for place in alike_in_pipeline(recipe)}


def distinct_ranks(recipe: Recipe) -> dict[int, int]:
    """The first rank of each kind, and how many are of that kind. Ranks of a kind have equal figures.

    A kind is a rank of the pipeline; the sizes of this rank's parts where rows do not divide; and, for context
    parallelism by ring or all-gather, the first, the last or another place in the sequence. There, all ranks compute
    the same number of FLOPs, and the first and the last have the extremes of memory.
    """
    model, parallel = recipe.model, recipe.parallel
    split_by_tp = {model.d_ff, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim}
    rows = {model.d_model} | {n // parallel.tp for n in split_by_tp}  # of this rank's matrices, before FSDP
    n_shards = parallel.dp_shard * parallel.cp
    counts: dict[tuple[Any, ...], list[int]] = {}
    for pp in range(parallel.pp):
        stages = stages_of_rank(recipe, pp)
        has_vocabulary = 0 in stages or recipe.n_stages - 1 in stages
        for shard, cp, tp in itertools.product(range(parallel.dp_shard), range(parallel.cp), range(parallel.tp)):
            vocabulary = {len(part_of(model.vocab_size, parallel.tp, tp))} if has_vocabulary else set()
            parts = [part_of(n, n_shards, shard * parallel.cp + cp) for n in sorted(rows | vocabulary)]
            shapes = tuple(map(len, parts)) if parallel.dp_shard > 1 else ()
            place = (cp > 0) + (cp == parallel.cp - 1 > 0) if recipe.context.zigzag else 0
            rank = rank_at(recipe, pp=pp, dp_shard=shard, cp=cp, tp=tp)
            first_and_count = counts.setdefault((pp, place, *vocabulary, shapes), [rank, 0])
            first_and_count[1] += parallel.dp_replicate
    return {first: count for first, count in counts.values()}
