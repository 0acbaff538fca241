"""The search: every layout of a recipe's model on so many ranks, judged by the closed form; the best that fit.

The model, its batch and its type stay as the recipe has them. Searched are the five dimensions of the mesh, schedules
and stages a rank, the micro-batch, recompute, whether weights stay gathered, and the method of cp.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.foresight.clusters import Cluster
from parallel.foresight.memory import LAB, ON_CPU, peak_bytes
from parallel.foresight.prediction import Prediction, parts_of, predict, sensitivity
from parallel.foresight.uncertainty import NINETY, RUN_DEVIATION
from parallel.foresight.workload import Number, Workload, laid_out, of_recipe
from parallel.recipe import (
    MESH_DIMS,
    SCHEDULES,
    SINGLE_STAGE_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    ContextMethod,
    Recipe,
    RecipeError,
    Recompute,
    choices,
)

ROOM = 0.9  # of an accelerator's memory: the rest is for its context, buffers of messages, fragments
STAGES_PER_RANK = (2, 3, 4, 6, 8)  # of schedules with several
RECOMPUTES: tuple[Recompute, ...] = (
    Recompute(),
    Recompute(mode="selective"),
    Recompute(mode="selective", save=["attention"]),  # type: ignore[arg-type]  # it becomes a tuple
    Recompute(mode="full"),
)
LARGEST_MICRO_BATCH = 64
MOST_TIED = 1000  # candidates of one kind of mesh that are looked at, for one that a recipe takes

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Choice:
    recipe: Recipe
    prediction: Prediction
    peak_bytes: float  # of the fullest rank, by the closed form
    state_bytes: float  # those of them that no shorter sequence would save: weights, gradients, moments
    tied: bool = False  # not slower than the best, as far as can be told


@dataclass(frozen=True)
class Plan:
    considered: int  # layouts
    fitting: int
    room_bytes: float
    best: tuple[Choice, ...]  # of different meshes, the fastest first
    too_large: tuple[Choice, ...]  # faster than the best, and do not fit
    rule: Choice | None  # what a rule of thumb takes; None where no recipe can be made of that
    rule_says: str


def plan(recipe: Recipe, cluster: Cluster, *, ranks: int, n_best: int = 8, filled: float = 1.0) -> Plan:
    """filled: the part of the room that the closed form may fill, where a dry run has shown that it says too little.

    Raises RecipeError where nothing fits, or the cluster has no rate for the recipe's type.
    """
    if recipe.engine.name != "native":
        raise RecipeError("engine.name", recipe.engine.name, "cannot be planned; only native can: set it to that")
    room = ROOM * cluster.memory_gib * 2**30
    groups = list(_judged(recipe, cluster, ranks))
    considered = sum(len(group.seconds) for group in groups)
    seconds = np.concatenate([group.seconds for group in groups]) if groups else np.zeros(0)
    memory = np.concatenate([group.memory for group in groups]) if groups else np.zeros(0)
    where = [(group, i) for group in groups for i in range(len(group.seconds))]
    order = np.argsort(seconds, kind="stable")
    fits = memory <= room * filled

    def first_of_each_mesh(candidates: Array, n: int) -> list[Recipe]:
        found: dict[tuple[int, ...], Recipe] = {}
        tried: dict[tuple[int, ...], int] = {}
        for index in candidates:
            group, i = where[index]
            mesh = tuple(int(group.columns[dim][i]) for dim in MESH_DIMS)
            if mesh in found or tried.setdefault(mesh, 0) > MOST_TIED:
                continue
            tried[mesh] += 1
            if (candidate := group.recipe_at(recipe, i)) is not None:
                found[mesh] = candidate
                if len(found) == n:
                    break
        return list(found.values())

    chosen = first_of_each_mesh(order[fits[order]], n_best)
    if not chosen:
        least = f"; the leanest needs {memory.min() / 2**30:.4g} GiB a rank" if len(memory) else ""
        remedy = (
            f"no layout of {recipe.model.preset} on so many ranks of {cluster.name} fits its {room / 2**30:.4g} GiB"
        )
        raise RecipeError("--ranks", ranks, f"{remedy}{least}; use more ranks, or another train.global_batch")
    best = _tied([_choice(candidate, cluster) for candidate in chosen], cluster)
    limit = best[0].prediction.step_seconds
    faster = order[~fits[order] & (seconds[order] < limit)]
    too_large = tuple(_choice(candidate, cluster) for candidate in first_of_each_mesh(faster, 3))
    says, thumb = rule_of_thumb(recipe, cluster, ranks=ranks, room=room)
    rule = None if thumb is None else _choice(thumb, cluster)
    return Plan(considered, int(fits.sum()), room, tuple(best), too_large, rule, says)


def _choice(recipe: Recipe, cluster: Cluster) -> Choice:
    work = of_recipe(recipe)
    memory, states = (float(_peak_bytes(w, cluster)) for w in (work, dataclasses.replace(work, seq_len=0)))
    return Choice(recipe, predict(recipe, cluster), memory, states)


def _peak_bytes(work: Workload, cluster: Cluster) -> Number:
    return peak_bytes(work, ON_CPU if cluster.accelerator == "cpu" else LAB)


def _tied(choices: Sequence[Choice], cluster: Cluster) -> list[Choice]:
    """What two layouts of one program have in common cancels: constants that move both, and the program itself."""
    dtype = choices[0].recipe.train.dtype
    sensitive = np.concatenate([sensitivity(of_recipe(c.recipe), cluster, dtype) for c in choices])
    deviation = np.sqrt(((sensitive - sensitive[0]) ** 2).sum(axis=1) + 2 * RUN_DEVIATION**2)
    slower = np.log([c.prediction.step_seconds / choices[0].prediction.step_seconds for c in choices])
    tied = slower <= NINETY * deviation
    return [dataclasses.replace(c, tied=bool(tied[i] and i > 0)) for i, c in enumerate(choices)]


# ---- every layout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Layouts that have their schedule, recompute and method of cp in common, as columns."""

    schedule: str
    recompute: Recompute
    method: str
    columns: dict[str, Array]
    seconds: Array
    memory: Array

    def recipe_at(self, base: Recipe, i: int) -> Recipe | None:
        """None where `lab check` would refuse it."""
        at = {key: int(column[i]) for key, column in self.columns.items()}
        several = at["pp"] > 1 and self.schedule not in SINGLE_STAGE_SCHEDULES
        sections: dict[str, dict[str, Any]] = {
            "parallel": {dim: at[dim] for dim in MESH_DIMS},
            "train": {"micro_batch": at["micro_batch"]},
            "sharding": {"reshard_after_forward": not at["keeps_weights"]},
            "pipeline": {"schedule": self.schedule, "stages_per_rank": at["stages_per_rank"] if several else 0},
            "context": {"method": self.method},
        }
        try:
            changed = {key: dataclasses.replace(getattr(base, key), **table) for key, table in sections.items()}
            return dataclasses.replace(base, **changed, recompute=self.recompute)
        except RecipeError:
            return None


def _judged(recipe: Recipe, cluster: Cluster, ranks: int) -> Iterator[_Group]:
    meshes = np.array(list(_meshes(recipe, cluster, ranks)), dtype=np.int64).reshape(-1, len(MESH_DIMS))
    base = of_recipe(recipe)
    for piped, split in itertools.product((False, True), repeat=2):
        here = meshes[((meshes[:, 0] > 1) == piped) & ((meshes[:, 3] > 1) == split)]
        methods = choices(ContextMethod) if split else ("ring",)
        schedules = SCHEDULES if piped else ("1f1b",)
        for schedule, method, recompute in itertools.product(schedules, methods, RECOMPUTES):
            if schedule in SPLIT_BACKWARD_SCHEDULES and piped and recompute.mode != "none":
                continue
            columns = _columns(recipe, here, schedule, piped=piped)
            if not len(columns["pp"]):
                continue
            work = laid_out(
                base,
                parallel={dim: columns[dim] for dim in MESH_DIMS},
                micro_batch=columns["micro_batch"],
                n_microbatches=columns["n_microbatches"],
                stages_per_rank=columns["stages_per_rank"],
                schedule=schedule,
                keeps_weights=columns["keeps_weights"],
                overlaps_ddp=int(recipe.ddp.overlap),
                method=method,
                recompute=recompute,
            )
            n = len(columns["pp"])
            seconds = sum(parts_of(work, cluster, recipe.train.dtype).values()) + np.zeros(n)
            yield _Group(schedule, recompute, method, columns, seconds, _peak_bytes(work, cluster) + np.zeros(n))


def _meshes(recipe: Recipe, cluster: Cluster, ranks: int) -> Iterator[tuple[int, ...]]:
    """pp, dp_replicate, dp_shard, cp, tp: whose product is `ranks`, and which the model and the batch allow."""
    model, train = recipe.model, recipe.train
    for tp in _divisors(min(ranks, cluster.ranks_per_node)):  # between nodes it is never worth its messages
        if ranks % tp or model.n_kv_heads % tp or model.d_ff % tp:
            continue
        for cp in _divisors(ranks // tp):
            if train.seq_len % cp or train.seq_len // cp < 512 * (cp > 1):
                continue
            for pp in _divisors(ranks // tp // cp):
                replicas = ranks // tp // cp // pp
                if pp > model.n_layers or train.global_batch % replicas:
                    continue
                for dp_shard in _divisors(replicas):
                    yield pp, replicas // dp_shard, dp_shard, cp, tp


def _columns(recipe: Recipe, meshes: Array, schedule: str, *, piped: bool) -> dict[str, Array]:
    """Of each mesh: every number of stages a rank, micro-batch, and whether weights stay; as far as rules allow it.

    A sieve: the recipe's own rules have the last word.
    """
    if not piped or schedule in SINGLE_STAGE_SCHEDULES:
        stages: tuple[int, ...] = (1,)
    else:
        stages = (2,) if schedule in V_SCHEDULES else STAGES_PER_RANK
    largest = min(LARGEST_MICRO_BATCH, recipe.train.global_batch)
    micro_batches = [2**n for n in range(largest.bit_length())]
    options = np.array(list(itertools.product(stages, micro_batches, (0, 1))), dtype=np.int64)
    rows = np.concatenate([np.repeat(meshes, len(options), axis=0), np.tile(options, (len(meshes), 1))], axis=1)
    names = (*MESH_DIMS, "stages_per_rank", "micro_batch", "keeps_weights")
    columns = dict(zip(names, rows.T, strict=True))
    pp, v, b, keeps = (columns[key] for key in ("pp", "stages_per_rank", "micro_batch", "keeps_weights"))
    per_replica = recipe.train.global_batch // (columns["dp_replicate"] * columns["dp_shard"])
    m = per_replica // b
    good = (per_replica % b == 0) & (pp * v <= recipe.model.n_layers) & ((keeps == 0) | (columns["dp_shard"] > 1))
    if piped:
        good &= m >= {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
        if schedule.startswith("interleaved"):
            good &= m % np.maximum(1, m // pp) == 0
        if schedule in SPLIT_BACKWARD_SCHEDULES:
            good &= (columns["dp_shard"] == 1) | (keeps == 1)
    return {name: column[good] for name, column in (columns | {"n_microbatches": m}).items()}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# ---- a rule of thumb -----------------------------------------------------------------------------------------------


def rule_of_thumb(recipe: Recipe, cluster: Cluster, *, ranks: int, room: float) -> tuple[str, Recipe | None]:
    """What a lecture advises by scale, in words, and as a recipe where one can be made of it.

    Fill the memory; DP below 128 GPUs and a billion parameters, FSDP with recompute above, HSDP above 256 GPUs; tp, pp
    and cp, too, above 1,000 GPUs and 50 billion.
    """
    billions, node = recipe.model.n_parameters / 1e9, cluster.ranks_per_node
    mesh = dict.fromkeys(MESH_DIMS, 1)
    full = Recompute(mode="full")
    if billions < 1 and ranks < 128:
        says, mesh["dp_replicate"], full = "data parallel, below 1 billion parameters and 128 ranks", ranks, Recompute()
    elif ranks <= 256:
        says, mesh["dp_shard"] = "FSDP with recompute, above 1 billion parameters", ranks
    elif ranks <= 1000 or billions <= 50:
        says = "HSDP with recompute, above 256 ranks"
        mesh |= {"dp_shard": node, "dp_replicate": ranks // node}
    else:
        says = "all of them, above 1,000 ranks and 50 billion parameters"
        mesh |= {"tp": node, "pp": 16 if billions > 200 else 8}
        mesh["cp"] = max(1, recipe.train.seq_len // 8192)
        mesh["dp_shard"] = ranks // (mesh["tp"] * mesh["pp"] * mesh["cp"])
    found = None
    for micro_batch in (2**n for n in range(LARGEST_MICRO_BATCH.bit_length())):  # the largest that fits
        try:
            sharding = dataclasses.replace(recipe.sharding, reshard_after_forward=mesh["pp"] == 1)
            candidate = dataclasses.replace(
                recipe,
                parallel=dataclasses.replace(recipe.parallel, **mesh),
                train=dataclasses.replace(recipe.train, micro_batch=micro_batch),
                pipeline=dataclasses.replace(recipe.pipeline, schedule="1f1b", stages_per_rank=0),
                sharding=sharding,
                recompute=full,
            )
        except RecipeError:
            continue
        if candidate.world_size == ranks and (found is None or _peak_bytes(of_recipe(candidate), cluster) <= room):
            found = candidate
    return says, found
