"""Weights: where a model that was split on the meta device gets its memory and its initial values."""

from functools import partial

import torch

from parallel.mesh import local_part, slice_like
from parallel.recipe import Recipe
from parallel.transformer import Transformer, initial_weight, weight_name


def load_no_weights(model: Transformer, recipe: Recipe, device: torch.device) -> None:
    """Moves `model` from meta to `device`, and leaves its weights and tables as the memory happens to be."""
    model.to_empty(device=device)
    model.tie()  # to_empty made them two


def load_initial_weights(model: Transformer, recipe: Recipe, device: torch.device) -> None:
    """Moves `model`, whole or this rank's part of it, from meta to `device`, and gives it its first weights."""
    load_no_weights(model, recipe, device)
    model.rotary.reset_buffers()
    first_value = partial(initial_weight, seed=recipe.train.seed, n_layers=recipe.model.n_layers, device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = first_value(weight_name(name, model.shape), parameter.shape)
            local_part(parameter).copy_(slice_like(whole, parameter))
