"""Which tokens a rank trains on: those of its replica."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import gathered
from parallel.corpus import Corpus, open_corpus
from parallel.mesh import REPLICA_DIMS, size_of
from parallel.recipe import Recipe, RecipeError


def corpus_of(recipe: Recipe) -> Corpus:
    """The recipe's corpus, in its order. Raises RecipeError."""
    train = recipe.train
    return open_corpus(recipe.data, seq_len=train.seq_len, vocab_size=recipe.model.vocab_size, seed=train.seed)


def refuse_different_data(recipe: Recipe, corpus: Corpus) -> None:
    """RecipeError where hosts hold different files, or different Pythons, under one name. Collective."""
    seen = gathered(corpus.description)
    for rank, description in enumerate(seen):
        if description != seen[0]:
            what = f"rank {rank} reads other data ({description}) than rank 0 ({seen[0]}); give all hosts the same"
            raise RecipeError("data.source", recipe.data.source, what)


def rows_of_replica(recipe: Recipe, mesh: DeviceMesh) -> range:
    """The rows of the global batch that this rank's replica trains on: ranks of one (pp, cp, tp) read the same."""
    replica = 0
    for dim in REPLICA_DIMS:
        replica = replica * size_of(mesh, dim) + mesh.get_local_rank(dim)
    return range(replica * recipe.replica_batch, (replica + 1) * recipe.replica_batch)


def token_batch(corpus: Corpus, recipe: Recipe, step: int, rows: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets of some rows of the global batch of a step, counted from 0: int64 (len(rows), seq_len)."""
    sequences = corpus.sequences(step=step, global_batch=recipe.train.global_batch, rows=rows)
    tokens = torch.from_numpy(sequences)
    if device.type == "cuda":  # out of pinned memory, or the copy would wait for all that is queued
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
