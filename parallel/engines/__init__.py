"""Who executes a step: the lab itself, or a library that splits the same model in its own way."""

import os

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallel.engines.engine import Engine
from parallel.engines.native import NativeEngine
from parallel.recipe import Recipe


def engine_of(recipe: Recipe, *, mesh: DeviceMesh, device: torch.device) -> Engine:
    """The one that the recipe names, which must be installed: see refuse_missing_packages. Collective."""
    if recipe.engine.by_deepspeed:
        os.environ["DS_ACCELERATOR"] = device.type  # which it chooses when it is imported
    if recipe.engine.name == "accelerate" and recipe.engine.by_deepspeed:
        from parallel.engines.accelerate_deepspeed import AccelerateDeepSpeedEngine

        return AccelerateDeepSpeedEngine(recipe, mesh=mesh, device=device)
    if recipe.engine.name == "accelerate":
        from parallel.engines.accelerate import AccelerateEngine

        return AccelerateEngine(recipe, mesh=mesh, device=device)
    if recipe.engine.name == "deepspeed":
        if recipe.parallel.pp > 1:
            from parallel.engines.deepspeed_pipeline import DeepSpeedPipelineEngine

            return DeepSpeedPipelineEngine(recipe, mesh=mesh, device=device)
        from parallel.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(recipe, mesh=mesh, device=device)
    return NativeEngine(recipe, mesh=mesh, device=device)
