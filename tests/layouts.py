"""What the tests of whole layouts run on each rank."""

from typing import Any

import torch
import torch.distributed as dist

from parallel.assemble import assemble
from parallel.batches import rows_of_replica, token_batch
from parallel.corpus import open_corpus
from parallel.measure.parity import compare_with_reference, reference_gradients
from parallel.mesh import build_mesh, local_part
from parallel.recipe import Recipe, recipe_from_tables

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "model": dict(preset="none", n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=68),
    "data": dict(source="synthetic"),
    "train": dict(seq_len=16, global_batch=8),
}


def small_recipe(dtype: str = "float64", **sections: dict[str, Any]) -> Recipe:
    """A model of a few thousand weights; `sections` override its keys, as in parallel=dict(tp=2)."""
    tables = {key: dict(table) for key, table in SMALL.items()}
    for key, table in sections.items():
        tables[key] = tables.get(key, {}) | table
    tables["train"] = {"dtype": dtype} | tables["train"]
    return recipe_from_tables(tables)


def batch_of(recipe: Recipe, rows: range, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    train = recipe.train
    corpus = open_corpus(recipe.data, seq_len=train.seq_len, vocab_size=recipe.model.vocab_size, seed=train.seed)
    return token_batch(corpus, recipe, step, rows, CPU)


def parity(recipe: Recipe) -> tuple[dict[str, float], dict[str, float]] | None:
    """On rank 0: the differences of step 1 from one process, as they are, and after one gradient has been doubled."""
    mesh = build_mesh(recipe, "cpu")
    reference = None
    if dist.get_rank() == 0:
        reference = reference_gradients(recipe, *batch_of(recipe, range(recipe.train.global_batch)))
    model = assemble(recipe, mesh=mesh, device=CPU)
    model.zero_gradients()
    loss = model.forward_backward(*batch_of(recipe, rows_of_replica(recipe, mesh))).item()
    differences = compare_with_reference(model.gradient, loss, reference, device=CPU)
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                assert parameter.grad is not None
                gradient = local_part(parameter.grad)
                if gradient.count_nonzero() > 0:  # this rank may hold an empty shard
                    gradient.mul_(2.0)
                    break
    sabotaged = compare_with_reference(model.gradient, loss, reference, device=CPU)
    return (differences, sabotaged) if differences and sabotaged else None
