"""The lab's own engine: the model as `assemble` splits it, and AdamW."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from parallel.actions import Action
from parallel.assemble import assemble
from parallel.engines.engine import adamw
from parallel.measure.observer import Observer, nested
from parallel.recipe import Recipe
from parallel.transformer import Transformer
from parallel.weights import load_initial_weights


class NativeEngine:
    """See Engine and Resumable. load: moves a stage of the model from meta to the device."""

    name, settled_step, waits_in_python = "native", 2, True  # the first step makes the optimizer's state

    def __init__(
        self,
        recipe: Recipe,
        *,
        mesh: DeviceMesh,
        device: torch.device,
        load: Callable[[Transformer, Recipe, torch.device], None] = load_initial_weights,
    ) -> None:
        observers: list[Observer] = []

        def around(action: Action) -> AbstractContextManager[None]:
            return nested(observer.around(action) for observer in observers)

        self.recipe, self.mesh, self.observers = recipe, mesh, observers
        self.model = assemble(recipe, mesh=mesh, device=device, load=load, around=around)
        self.named_parameters, self.gradient = self.model.named_parameters, self.model.gradient
        self.optimizer = adamw(recipe, (parameter for _, parameter in self.named_parameters()))

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.model.zero_gradients()
        return self.model.forward_backward(tokens, targets)

    def update(self) -> Tensor:
        norm = self.model.gradient_norm()
        if self.recipe.train.non_finite == "skip" and not norm.isfinite():  # the same number on every rank
            return norm
        if self.recipe.train.grad_clip:
            self.model.clip_gradients(norm=norm, largest=self.recipe.train.grad_clip)
        with record_function("optimizer"):
            self.optimizer.step()
        return norm

    def holds(self) -> dict[str, list[Tensor]]:
        return {}

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            state[name] = parameter
            state |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return state

    @torch.no_grad()
    def load_state(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        if not self.optimizer.state:  # a step makes it, whatever AdamW is; what it does to the weights is overwritten
            for _, parameter in self.named_parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.model.zero_gradients()
        state = self.state()
        read({name: value.detach() for name, value in state.items()})
        for name, parameter in self.named_parameters():
            if state[name] is not parameter:  # the other copy of a tied weight, on the turn of a V
                parameter.copy_(state[name])
                for key, value in self.optimizer.state[parameter].items():
                    value.copy_(state[f"{name}.{key}"])
