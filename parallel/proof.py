"""The proof that a layout trains as one process would: gradients of step 1 against its, in float64.

An engine that has no float64 gives its gradients in float32; the one process computes in float64 all the same.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.batches import corpus_of, rows_of_replica, token_batch
from parallel.corpus import Corpus
from parallel.engines import engine_of
from parallel.measure.parity import TOLERANCE, compare_with_reference, kept_reference, parity_recipe
from parallel.measure.record import Parity, available_cores
from parallel.process import say
from parallel.recipe import Recipe

PROOF_TOLERANCE = {"float32": 1e-5, "float64": TOLERANCE}  # rounding in float32 gives some 1e-6
TRAINED_TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-3, "float64": TOLERANCE}


def prove(recipe: Recipe, *, corpus: Corpus, mesh: DeviceMesh, device: torch.device) -> Parity:
    """Empty on all ranks but 0. corpus: the recipe's. Collective.

    float64 runs on other kernels than bfloat16 does, and on CUDA than float32: there the gradients that training itself
    computes are held against the same reference too, as near as their precision allows.
    """
    proof, reference_is = parity_recipe(recipe, on_cuda=device.type == "cuda")
    exact = proof.train.dtype
    say(f"parity: {exact} gradients of step 1 against {reference_is}")
    if (proof.model, proof.train.seq_len) != (recipe.model, recipe.train.seq_len):  # a smaller one
        corpus = corpus_of(proof)
    reference = None
    if dist.get_rank() == 0:
        with _threads(available_cores()):  # the other ranks wait
            batch = token_batch(corpus, proof, 0, range(proof.train.global_batch), device)
            reference = kept_reference(proof, *batch)

    def differences(as_: Recipe) -> dict[str, Any] | None:
        engine = engine_of(as_, mesh=mesh, device=device)
        batch = token_batch(corpus, as_, 0, rows_of_replica(as_, mesh), device)
        with _threads(available_cores() // dist.get_world_size() if recipe.train.compile == "none" else 1):
            loss = engine.gradients(*batch).item()
        return compare_with_reference(engine.gradient, loss, reference, device=device)

    parity = Parity()
    if (found := differences(proof)) is not None:
        passed = found["max_rel_grad_diff"] <= PROOF_TOLERANCE[exact]
        parity = Parity(reference=reference_is, dtype=exact, passed=passed, **found)
        if exact != "float64":
            parity.note = f"proven in {exact}, the most exact type of deepspeed: passed is at most 1e-05"
        say(f"parity: {_verdict(passed)}, largest relative gradient difference {found['max_rel_grad_diff']:.1e}")
    dtype, attention = recipe.train.dtype, recipe.train.attention
    if dtype == "bfloat16" or device.type == "cuda":
        trained = replace(proof, train=replace(proof.train, dtype=dtype, attention=attention))
        if (found := differences(trained)) is not None:
            parity.trained_dtype, parity.trained_max_rel_grad_diff = dtype, found["max_rel_grad_diff"]
            parity.trained_passed = found["max_rel_grad_diff"] <= TRAINED_TOLERANCE[dtype]
            say(f"parity in {dtype}: {_verdict(parity.trained_passed)}, {found['max_rel_grad_diff']:.1e}")
    return parity


@contextlib.contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """Within, this rank computes with so many threads, or as many as it had: none of this is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(wanted, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"
