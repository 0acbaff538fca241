"""One rank's process: its device, its process group, and how both end."""

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.recipe import Recipe, RecipeError


def choose_device(recipe: Recipe) -> torch.device:
    """CUDA where every rank of this host has a GPU of its own, else the CPU; or what the recipe asks for.

    Raises RecipeError where the recipe asks for CUDA and it cannot be had, or for a kernel that the device lacks.
    """
    train, attention = recipe.train, recipe.train.attention
    gpus, local_ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cpu = train.device == "cpu" or gpus < local_ranks
    if train.device == "cuda" and on_cpu:
        raise RecipeError("train.device", "cuda", f"needs {local_ranks} GPUs on this host, which has {gpus}; use auto")
    if on_cpu and attention == "cudnn":
        raise RecipeError("train.attention", attention, "needs CUDA, and this run is on a CPU; use auto, flash or math")
    if not on_cpu and attention in ("flash", "cudnn") and train.dtype != "bfloat16":
        remedy = f"has no {train.dtype} kernel on CUDA; use bfloat16, or auto or math"
        raise RecipeError("train.attention", attention, remedy)
    return torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_seconds: float) -> Iterator[None]:
    """NCCL for CUDA, gloo for CPU, from torchrun's environment variables; a world of one needs none of them."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        # gloo's threads free Python objects: everything that collectives have touched must be gone before they end,
        # or the interpreter aborts on its way out (pytorch/pytorch#190489).
        gc.collect()
        dist.destroy_process_group()


def say(line: str) -> None:
    """Prints `line` on rank 0 alone."""
    if dist.get_rank() == 0:
        print(line, flush=True)
