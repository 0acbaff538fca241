"""One rank's process: its device, its process group, and how both end."""

import contextlib
import ctypes
import gc
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.recipe import Recipe, RecipeError
from parallel.torch_private import one_thread_per_gloo_group

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES, LARGEST_KEPT_BYTES = 2**31 - 1, 2**30


def choose_device(recipe: Recipe, store: dist.Store | None = None) -> tuple[torch.device, str | None]:
    """CUDA where every rank of the run has a GPU of its own, else the CPU; or what the recipe asks for. And why GPUs
    were left unused, where some were.

    store: of the run's ranks, which all must call this; None for a run of one. A process that sees one GPU beside
    others on its host may have been given its own (`srun --gpus-per-task=1`): ranks tell each other which they see.
    Raises RecipeError where the recipe asks for CUDA and it cannot be had, or for a kernel that the device lacks, and
    where the ranks' GPUs are of several models.
    """
    train, attention, gpus = recipe.train, recipe.train.attention, torch.cuda.device_count()
    index, lack = 0, None if gpus else "this host has no GPU"
    if store is not None and train.device != "cpu":  # who asks for the CPU need not wake a GPU
        index, lack = _gpu_among_ranks(gpus, store, recipe.world_size)
    if train.device == "cuda" and lack:
        raise RecipeError("train.device", "cuda", f"{lack}; use auto, or give each rank a GPU")
    on_cpu = train.device == "cpu" or lack is not None
    if on_cpu and attention == "cudnn":
        raise RecipeError("train.attention", attention, "needs CUDA, and this run is on a CPU; use auto, flash or math")
    if not on_cpu and attention in ("flash", "cudnn") and train.dtype != "bfloat16":
        remedy = f"has no {train.dtype} kernel on CUDA; use bfloat16, or auto or math"
        raise RecipeError("train.attention", attention, remedy)
    if not on_cpu:
        return torch.device("cuda", index), None
    unused = f"on the CPU though this host has {gpus} GPU{'s' * (gpus > 1)}: {lack}"
    return torch.device("cpu"), unused if gpus and train.device == "auto" else None


def _gpu_among_ranks(gpus: int, store: dist.Store, world_size: int) -> tuple[int, str | None]:
    """This rank's GPU, by its number; and what some rank lacks for each to have its own, the same on every rank."""
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if local_rank is None and gpus:
        raise RecipeError("LOCAL_RANK", None, "set it, as torchrun does: the place of a rank among those of its host")
    host = socket.gethostname()
    store.add(host, 1)
    _meet(store, "counted", world_size)
    local_ranks = store.add(host, 0)
    index = int(local_rank or 0) if gpus >= local_ranks else 0
    if gpus < local_ranks and gpus != 1:
        store.set("lack", f"{local_ranks} of the ranks are on a host with {gpus} GPUs")
    else:
        gpu = torch.cuda.get_device_properties(index)
        store.add(gpu.name, 1)
        if store.add(f"{host} {gpu.uuid}", 1) > 1:
            store.set("lack", f"two of the {local_ranks} ranks of a host see the same GPU")
    _meet(store, "looked", world_size)
    if store.check(["lack"]):
        return index, store.get("lack").decode()
    if store.add(gpu.name, 0) < world_size:
        remedy = f"the ranks have GPUs of several models ({gpu.name} and others), which draw other initial weights and"
        raise RecipeError("train.device", "cuda", f"{remedy} have no common peak; give all ranks the same")
    return index, None


def _meet(store: dist.Store, place: str, world_size: int) -> None:
    if store.add(place, 1) == world_size:
        store.set(f"all {place}", "")
    store.wait([f"all {place}"])


@contextlib.contextmanager
def process_group(recipe: Recipe) -> Iterator[tuple[torch.device, str | None]]:
    """Joins the ranks of torchrun's environment variables, by NCCL on CUDA and gloo on a CPU; a run of one needs none.

    Gives the device of this rank, and a note: see choose_device. Raises RecipeError.
    """
    timeout = timedelta(seconds=recipe.train.time_limit_seconds)
    store, rank = None, 0
    if "WORLD_SIZE" in os.environ:
        store, rank = _rendezvous(timeout)
    device, unused = choose_device(recipe, dist.PrefixStore("devices", store) if store else None)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    with one_thread_per_gloo_group():
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.PrefixStore("group", store) if store else dist.HashStore(),
            rank=rank,
            world_size=recipe.world_size,
            timeout=timeout,
            # Told its device, a group has all its messages on one stream, where what a stage waits for holds up what
            # it sends: of a pipeline each pair of neighbours has a communicator of its own (pytorch/pytorch#175712).
            device_id=device if on_cuda and recipe.parallel.pp == 1 else None,
        )
        try:
            yield device, unused
        except BaseException:
            # NCCL ends a group only with all its ranks, and after kernels that may wait for ever for the one that
            # raised. Whoever started this process ends it, and the error is told now.
            if not on_cuda:
                _leave_group()
            raise
        _leave_group()


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int]:
    """The store of this life of the run, and the rank. Raises RecipeError."""
    try:
        store, rank, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        remedy = "something else listens on it; give a free one"
        raise RecipeError("MASTER_PORT", os.environ.get("MASTER_PORT"), remedy) from None
    store.set_timeout(timeout)
    # torchrun keeps its store when it restarts the ranks, and in it the addresses of the dead (pytorch/pytorch#135712).
    return dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank


def _keep_freed_memory() -> None:
    """glibc would give what large tensors leave back to the system, which fills it with zeros again in the next step:
    1 or 2 % of a step on a CPU. mallopt(3); elsewhere there is none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _leave_group() -> None:
    # gloo's threads free Python objects: everything that collectives have touched must be gone before they end,
    # or the interpreter aborts on its way out (pytorch/pytorch#190489).
    gc.collect()
    dist.destroy_process_group()


def say(line: str) -> None:
    """Prints `line` on rank 0 alone."""
    if dist.get_rank() == 0:
        print(line, flush=True)
