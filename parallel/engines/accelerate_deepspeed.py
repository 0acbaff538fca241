"""Accelerate with its DeepSpeed plugin as the engine: ZeRO, prepared and called by Accelerate.

It takes the optimizer's step at the end of the last backward; here that is put off, for gradients are looked at between
the two.
"""

from typing import Any

import accelerate
import deepspeed
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from parallel.engines.accelerate import accumulated, anew
from parallel.engines.deepspeed import DeepSpeedEngine, config_of


class AccelerateDeepSpeedEngine(DeepSpeedEngine):
    """See Engine."""

    name = f"accelerate {accelerate.__version__} with deepspeed {deepspeed.__version__}"

    def _initialized(self, model: nn.Module, mpu: Any) -> Any:
        recipe = self.recipe
        with anew(recipe, ACCELERATE_USE_DEEPSPEED="true"):
            plugin = DeepSpeedPlugin(hf_ds_config=config_of(recipe))
            steps = recipe.n_microbatches
            self._accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=steps)
            engine, _ = self._accelerator.prepare(model, self.optimizer)
        self._take_step = engine.step
        engine.step = lambda *_, **__: None
        return engine

    def _microbatch(self, i: int, tokens: Tensor, targets: Tensor) -> Tensor:
        return accumulated(self._accelerator, self._engine, tokens, targets)

    def _step(self) -> None:
        self._take_step()
