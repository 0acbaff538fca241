"""Is there room on this machine for the ranks of a run? Asked before any starts: the kernel kills without a word."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from parallel.recipe import Recipe, RecipeError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
MARGIN = 2.0  # by which the estimate below may be wrong, so that a dry run is worth its seconds


def refuse_without_room(recipe: Recipe, *, n_gpus: Callable[[], int], say: Callable[[str], None]) -> None:
    """RecipeError where all ranks on this machine's CPU need more memory than it has available.

    By a dry run of each kind of rank, where the estimate says that it could matter; an engine that cannot be dry-run is
    not asked. n_gpus: of this host; ranks on GPUs of their own leave the machine's memory alone.
    """
    available = available_bytes()
    if available is None or MARGIN * estimated_bytes(recipe) < available or recipe.engine.name != "native":
        return
    if recipe.train.device == "cuda" or (recipe.train.device == "auto" and n_gpus() >= recipe.world_size):
        return
    from parallel.fit import bytes_of_all_ranks  # other runs are launched without torch

    say(f"{recipe.name}: a dry run, as its ranks may need more memory than this machine has")
    needed = bytes_of_all_ranks(recipe, enough=available, say=say)
    if needed > available:
        remedy = (
            f"is the world size, and these ranks need at least {needed / 2**30:.4g} GiB together, where this machine"
            f" has {available / 2**30:.4g} GiB available; take a smaller model or batch, or --force"
        )
        raise RecipeError("parallel", recipe.world_size, remedy)


def estimated_bytes(recipe: Recipe) -> float:
    """What all ranks hold, roughly, in closed form: four float32 a weight, and what blocks keep for backward."""
    model, parallel = recipe.model, recipe.parallel
    shards = parallel.dp_shard * parallel.cp if parallel.dp_shard > 1 else 1
    weights = 4 * model.n_parameters / (parallel.pp * parallel.tp * shards)
    in_flight = min(recipe.n_microbatches, parallel.pp)
    tokens = recipe.micro_batch * in_flight * recipe.train.seq_len / parallel.cp
    scores = model.n_heads * recipe.train.seq_len if recipe.train.attention == "math" else 0
    block = 16 * model.d_model + 6 * model.d_ff + scores
    a_token = model.n_layers * block / parallel.pp + 4 * model.vocab_size
    return 4 * recipe.world_size * (weights + tokens * a_token / parallel.tp)


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """What can be allocated here without swapping, by /proc/meminfo and the limits of control groups (version 2)."""
    try:
        available = re.search(r"^MemAvailable: +(\d+) kB", (proc / "meminfo").read_text(), re.M)
    except OSError:
        return None
    return min([1024 * int(available[1]), *_left_in_groups(proc, cgroups)]) if available else None


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of each group that this process is in and that has a limit; what only caches files is given up when asked for."""
    try:
        [path] = re.findall(r"^0::/(.*)$", (proc / "self" / "cgroup").read_text(), re.M)
    except (OSError, ValueError):
        return
    group = cgroups / path
    for folder in (group, *group.parents):
        if not folder.is_relative_to(cgroups):
            return
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
        except OSError:  # the group of all has none
            continue
        if limit != "max":
            yield int(limit) - int(used) + (int(cached[1]) if cached else 0)
