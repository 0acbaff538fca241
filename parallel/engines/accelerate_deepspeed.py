"""Accelerate with its DeepSpeed plugin as the engine: ZeRO, prepared and called by Accelerate.

It takes the optimizer's step at the end of the last backward; here that is put off, for gradients are looked at between
the two.
"""

import os
from typing import Any

import accelerate
import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.profiler import record_function

from parallel.engines.deepspeed import DeepSpeedEngine, config_of
from parallel.engines.engine import environment


class AccelerateDeepSpeedEngine(DeepSpeedEngine):
    """See Engine."""

    name = f"accelerate {accelerate.__version__} with deepspeed {deepspeed.__version__}"

    def _initialized(self, model: nn.Module, mpu: Any) -> Any:
        recipe = self.recipe
        AcceleratorState._reset_state(reset_partial_state=True)  # else what the proof has set holds for training
        GradientState._reset_state()
        with environment(RANK=dist.get_rank(), WORLD_SIZE=recipe.world_size, ACCELERATE_USE_DEEPSPEED="true"):
            os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it changes that
            plugin = DeepSpeedPlugin(hf_ds_config=config_of(recipe))
            steps = recipe.n_microbatches
            self._accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=steps)
            engine, _ = self._accelerator.prepare(model, self.optimizer)
        self._take_step = engine.step
        engine.step = lambda *_, **__: None
        return engine

    def _microbatch(self, i: int, tokens: Tensor, targets: Tensor) -> Tensor:
        with self._accelerator.accumulate(self._engine):
            with record_function("forward"):
                loss: Tensor = self._engine(tokens, targets)
            with record_function("backward"):
                self._accelerator.backward(loss)
        return loss

    def _step(self) -> None:
        self._take_step()
