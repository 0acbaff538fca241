"""The proof that a layout trains as one process would: gradients of step 1 against its, in float64."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.batches import corpus_of, rows_of_replica, token_batch
from parallel.engines.native import NativeEngine
from parallel.measure.parity import TOLERANCE, compare_with_reference, parity_recipe, reference_gradients
from parallel.measure.record import Parity
from parallel.process import say
from parallel.recipe import Recipe


def prove(recipe: Recipe, *, mesh: DeviceMesh, device: torch.device) -> Parity:
    """Empty on all ranks but 0."""
    proof, reference_is = parity_recipe(recipe, on_cuda=device.type == "cuda")
    say(f"parity: float64 gradients of step 1 against {reference_is}")
    corpus = corpus_of(proof)
    reference = None
    if dist.get_rank() == 0:
        reference = reference_gradients(proof, *token_batch(corpus, proof, 0, range(proof.train.global_batch), device))
    engine = NativeEngine(proof, mesh=mesh, device=device)
    loss = engine.gradients(*token_batch(corpus, proof, 0, rows_of_replica(proof, mesh), device)).item()
    differences = compare_with_reference(engine.gradient, loss, reference, device=device)
    if differences is None:
        return Parity()
    passed = differences["max_rel_grad_diff"] <= TOLERANCE
    verdict = "passed" if passed else "FAILED"
    say(f"parity: {verdict}, largest relative gradient difference {differences['max_rel_grad_diff']:.1e}")
    return Parity(reference=reference_is, dtype="float64", passed=passed, **differences)
