"""DeepSpeed's pipeline: a stage on each rank, 1F1B, and ZeRO-1 over the ranks that hold the same stage.

Its train_batch takes a whole step; here the same instructions are executed one by one, the optimizer's apart. The scale
of gradients is that of DeepSpeed without a pipeline.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep, TrainSchedule
from torch import Tensor, nn
from torch.profiler import record_function

from parallel.actions import Action
from parallel.assemble import attention_kernel, plain_model
from parallel.engines.deepspeed import DeepSpeedEngine
from parallel.engines.engine import scale_of_averages
from parallel.measure.observer import nested
from parallel.transformer import cross_entropy


class DeepSpeedPipelineEngine(DeepSpeedEngine):
    """See Engine."""

    def _model(self, device: torch.device) -> tuple[nn.Module, Any]:
        recipe, pp_rank = self.recipe, self.mesh.get_local_rank("pp")
        scale = scale_of_averages(recipe, self._averaged)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(logits, targets) * scale

        stage = plain_model(recipe, device=device, scale=scale, pp_rank=pp_rank, recomputed=self._recomputed)
        # Each layer of theirs is a stage of ours; of other ranks' nothing is needed but their number.
        layers = [stage if i == pp_rank else nn.Identity() for i in range(recipe.n_stages)]
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds, which nothing here draws from
            model = PipelineModule(layers, num_stages=recipe.n_stages, loss_fn=loss, partition_method="uniform")
        return model, None

    def _names(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name.partition(".")[2], parameter) for name, parameter in model.named_parameters()]

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        engine, size = self._engine, self.recipe.micro_batch
        engine.set_dataiterator(iter(zip(tokens.split(size), targets.split(size), strict=True)))
        engine.total_loss, engine._compute_loss, engine.fwd_outputs = None, True, []
        schedule = TrainSchedule(engine.micro_batches, engine.num_stages, engine.stage_id)
        engine._reserve_pipe_buffers(schedule.num_pipe_buffers())
        done = {ForwardPass: 0, BackwardPass: 0}
        with attention_kernel(self.recipe.train.attention):
            for instruction in (instruction for together in schedule for instruction in together):
                if isinstance(instruction, OptimizerStep):
                    continue
                execute: Callable[..., None] = engine._INSTRUCTION_MAP[type(instruction)]
                with self._observed(type(instruction), done):
                    execute(engine, **instruction.kwargs)
        loss: Tensor = engine._aggregate_total_loss()
        return loss

    @contextlib.contextmanager
    def _observed(self, kind: type, done: dict[type, int]) -> Iterator[None]:
        """done: how many microbatches have gone forward and backward."""
        if kind not in done:
            yield
            return
        name = "forward" if kind is ForwardPass else "backward"
        action = Action(name, self._engine.stage_id, done[kind])
        done[kind] += 1
        with record_function(name), nested(observer.around(action) for observer in self.observers):
            yield

    def _step(self) -> None:
        self._engine._exec_optimizer_step()
