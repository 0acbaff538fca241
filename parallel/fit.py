"""Does a recipe fit into memory? A dry run of each kind of rank tells."""

from collections.abc import Callable

from parallel.dryrun import measure_each
from parallel.kinds import distinct_ranks
from parallel.recipe import Recipe, RecipeError

REMEDIES = {
    "parameters": "more of dp_shard, tp or pp",
    "gradients": "more of dp_shard, tp or pp",
    "optimizer": "more of dp_shard, tp or pp",
    "activations": "a smaller train.micro_batch, recompute.mode, or more of tp or cp",
    "other": "sharding.reshard_after_forward, a smaller sharding.prefetch, or more of tp or pp",
}


def refuse_too_large(recipe: Recipe, *, memory_bytes: int, given: str, say: Callable[[str], None]) -> dict[str, int]:
    """The memory of the rank that needs most: {rank, peak_bytes, parameters_bytes, ...}, from a dry run of each kind.

    Ranks that may run on a CPU or a GPU are taken to run on a GPU, for it is an accelerator's memory that is asked for.
    given: what the user wrote for memory_bytes. Raises RecipeError for the first rank for which it is not enough.
    """
    if recipe.train.device == "auto":
        recipe = recipe.on("cuda")
    fullest: dict[str, int] = {"peak_bytes": 0}
    for rank, measures in measure_each(recipe, list(distinct_ranks(recipe)), say):
        memory = measures.memory
        if memory["peak_bytes"] > memory_bytes:
            parts = sorted(REMEDIES, key=lambda part: -memory[f"{part}_bytes"])
            split = ", ".join(f"{part} {memory[f'{part}_bytes'] / 2**30:.3g}" for part in parts)
            needs = f"rank {rank} of {recipe.name} needs {memory['peak_bytes'] / 2**30:.4g} GiB ({split})"
            remedy = f"{needs}, and an allocator takes some more; for {parts[0]} take {REMEDIES[parts[0]]}"
            raise RecipeError("--memory", given, remedy)
        if memory["peak_bytes"] > fullest["peak_bytes"]:
            fullest = {"rank": rank, **memory}
    return fullest


def bytes_of_all_ranks(recipe: Recipe, *, enough: int, say: Callable[[str], None]) -> int:
    """The peaks of all ranks together, by a dry run of each kind; once they are above `enough`, no other is asked."""
    kinds, total = distinct_ranks(recipe), 0
    for rank, measures in measure_each(recipe, list(kinds), say):
        total += kinds[rank] * measures.memory["peak_bytes"]
        if total > enough:
            break
    return total
