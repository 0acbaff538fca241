"""FLOPs: what a model needs, what a step executed, and both over what the hardware could do.

docs/measures.md derives each formula. One multiplication and one addition are 2 FLOPs; only matrix products count.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.measure.accelerators import Peak
from parallel.measure.model_flops import model_flops_per_token
from parallel.measure.record import Flops
from parallel.measure.traffic import by_name
from parallel.recipe import Recipe

aten = torch.ops.aten

DEFINITION = (
    "model FLOPs per token = 6 x (weights of the attention, MLP and output matrices; not the embedding look-up)"
    " + attention: 12·L·d·s in mfu (PaLM), 6·L·d·s, the half that the causal mask leaves, in mfu_causal (Megatron)."
    " hardware FLOPs = matrix products that ran, summed over ranks, by their shapes; a causal attention call is half"
    " of queries x keys, 2 products forward and 5 backward (it computes the scores again)."
    " mfu, mfu_causal, hfu = FLOPs of a step / (median step seconds x ranks x peak FLOP/s of a rank's device)."
)


# ---- what ran ------------------------------------------------------------------------------------------------------


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs that this rank executes.

        with FlopCounter() as counter:
            model.forward_backward(tokens, targets)
        counter.flops

    Works on real and on fake tensors, and through backward: autograd hands modes on to the threads of its devices. Of
    a DTensor operation this rank's part is counted (and a new product of DTensors, of which this lab has none, once
    more, for torch first tries it on fake tensors). Operations not in COUNTS below count zero.
    """

    supports_higher_order_operators = True  # torch.compile wraps some operations in these

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.attention: set[str] = set()  # kernels, as torch calls them

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this torch would run compiled blocks eagerly in here, and from then on for good."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(type_, DTensor) for type_ in types):
            return NotImplemented  # DTensor calls the operation again on its local part
        kwargs = kwargs or {}
        call = (func, *args)
        for i, operation in enumerate(call):  # wrapped, the operation and its arguments are the wrapper's last ones
            if isinstance(operation, OpOverload):
                if count := COUNTS.get(operation._overloadpacket):
                    if operation._opname.startswith(ATTENTION):
                        self.attention.add(operation._opname.removeprefix(ATTENTION).removesuffix("_backward"))
                    self.flops += count(by_name(operation, call[i + 1 :], kwargs))
                break
        return func(*args, **kwargs)


Call = dict[str, Any]  # the arguments of one, by name


def _product(left: str, right: str) -> Callable[[Call], int]:
    """(..., m, k) x (..., k, n), which are arguments of these names: 2·m·k·n each."""
    return lambda call: 2 * call[left].numel() * call[right].shape[-1]


def _attention(*, keys: int, values: int) -> Callable[[Call], int]:
    """So many products of queries x keys over the width of heads of q, and over that of v; half of them if causal."""

    def count(call: Call) -> int:
        q, k, v = call["query"], call["key"], call["value"]  # (B, H, t, E), (B, K, t', E), (B, K, t', E')
        pairs = math.prod(q.shape[:3]) * k.shape[2]  # each of the K heads of keys serves H/K heads of queries
        return (1 if call["is_causal"] else 2) * pairs * (keys * q.shape[3] + values * v.shape[3])

    return count


COUNTS = {
    aten.mm: _product("self", "mat2"),
    aten.bmm: _product("self", "mat2"),
    aten.addmm: _product("mat1", "mat2"),
    aten.baddbmm: _product("batch1", "batch2"),
}
ATTENTION = "_scaled_dot_product_"
for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    operation = getattr(aten, ATTENTION + kernel)
    COUNTS[operation] = _attention(keys=1, values=1)  # scores, and their product with v
    operation = getattr(aten, f"{ATTENTION}{kernel}_backward")
    COUNTS[operation] = _attention(keys=3, values=2)  # scores again, dQ, dK; dV, and the gradient of the scores


# ---- the record ----------------------------------------------------------------------------------------------------


def flops_section(
    recipe: Recipe, *, hardware_flops: int | None, step_seconds: float | None, peak: Peak, ceiling: float | None
) -> Flops:
    """What was not measured is None.

    hardware_flops: counted in one step, summed over all ranks. step_seconds: its steady median. peak: of one rank's
    device. ceiling: FLOP/s of the fastest product. Raises ValueError where more ran than the hardware can do.
    """
    tokens = recipe.train.global_batch * recipe.train.seq_len
    model_flops = model_flops_per_token(recipe.model, seq_len=recipe.train.seq_len)
    section = Flops(
        definition=DEFINITION,
        model_flops_per_token=model_flops.full,
        model_flops_per_token_causal=model_flops.causal,
        hardware_flops_per_token=None if hardware_flops is None else hardware_flops / tokens,
        peak_flops=peak.flops,
        peak_source=peak.source,
        matmul_ceiling_flops=ceiling,
    )
    if step_seconds is None or peak.flops is None:
        return section
    possible = step_seconds * recipe.world_size * peak.flops / tokens  # FLOPs a token
    section.mfu, section.mfu_causal = model_flops.full / possible, model_flops.causal / possible
    if section.hardware_flops_per_token is not None:
        section.hfu = section.hardware_flops_per_token / possible
    for key, value in (("mfu_causal", section.mfu_causal), ("hfu", section.hfu)):
        if value is not None and value > 1:
            raise ValueError(
                f"flops.{key} = {value:.3g}: above 1, with {step_seconds:.3g} s a step, {recipe.world_size} ranks and"
                f" {peak.flops:.4g} FLOP/s a rank ({peak.source}); give the dense {recipe.train.dtype} peak of one"
                " device with --peak-flops or, where it was measured, run again while nothing else does"
            )
    if section.mfu > 1:
        # Half of the attention that it counts was never run: long sequences get there on honest hardware.
        why = f"mfu is null: with attention in full it would be {section.mfu:.3g}, and says nothing."
        section.definition, section.mfu = f"{DEFINITION} {why}", None
    return section
