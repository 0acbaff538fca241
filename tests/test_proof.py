"""The reference of the proof is computed once for all rows that have the same, and for no others."""

import os
from pathlib import Path
from subprocess import run
from sys import executable

import pytest
from layouts import batch_of, small_recipe

from parallel.measure import parity
from parallel.recipe import Recipe

TWO_ROWS = """
import os
from layouts import batch_of, small_recipe
from parallel.measure import parity

recipe = small_recipe()
batch = batch_of(recipe, range(8))
child = os.fork()
if child == 0:
    parity.kept_reference(recipe, *batch)
    os._exit(0)
os.waitpid(child, 0)
expected = parity.reference_gradients(recipe, *batch)
parity.reference_gradients = None
found = parity.kept_reference(recipe, *batch)
assert found.loss == expected.loss
assert all(found.gradients[name].equal(gradient) for name, gradient in expected.gradients.items())
"""


def test_a_forked_process_leaves_it_to_the_next() -> None:
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1]))
    done = run([executable, "-c", TWO_ROWS], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_seed_batch_or_model_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Recipe] = []

    def reference_gradients(recipe: Recipe, *batch: object) -> parity.Reference:
        computed.append(recipe)
        return parity.Reference(float(len(computed)), {})

    monkeypatch.setattr(parity, "reference_gradients", reference_gradients)
    monkeypatch.setattr(parity, "_kept", bytearray(1000))
    base = small_recipe(parallel=dict(dp_shard=2))
    rows = batch_of(base, range(8))

    def loss(recipe: Recipe, step: int = 0) -> float:
        return parity.kept_reference(recipe, *batch_of(recipe, range(8), step)).loss

    assert [loss(base), loss(small_recipe(parallel=dict(tp=2))), loss(base, step=1), loss(base)] == [1, 1, 2, 3]
    assert loss(small_recipe(model=dict(d_ff=64))) == 4
    others = small_recipe(train=dict(seed=1))
    assert parity.kept_reference(others, *rows).loss == 5  # the same tokens, other weights
    assert parity.kept_reference(others, rows[0], rows[1].flip(0)).loss == 6
    assert parity.kept_reference(others, rows[0], rows[1].flip(0)).loss == 6


def test_what_is_too_large_to_be_kept_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe()
    batch = batch_of(recipe, range(8))
    monkeypatch.setattr(parity, "KEPT_BYTES", 1000)  # of some 300,000
    monkeypatch.setattr(parity, "_kept", bytearray(1000))
    first, second = (parity.kept_reference(recipe, *batch) for _ in range(2))
    assert first is not second and first.loss == second.loss and not any(parity._kept)
