"""What one device and its links reach: products, attention, what lies between, a block's launches, collectives.

The numbers are as measured; parallel/foresight/calibration.py makes rates of them. Seconds are of the device. On a CPU
they are CPU seconds of the process, all threads of gloo included: other programs and other ranks take none of those.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import all_gather, all_reduce, exchange, reduce_scatter
from parallel.measure.record import available_cores
from parallel.recipe.sections import Model
from parallel.transformer import Block, Rotary, causal_attention, cross_entropy

REPEATS = 5  # of which the median counts
MOST_CALLS = 1000  # in one of them

# (m, n, inner) of products x (m, inner) · W (n, inner)ᵀ, each with the products of its two gradients; (B, H, T, E) of
# attention; tokens and a block's shape for what lies between products; bytes of messages.
CPU_SHAPES: Mapping[str, Any] = {
    "products": ((2048, 128, 128), (256, 352, 128), (2048, 128, 32), (2048, 384, 128), (1024, 1024, 1024)),
    "attention": ((4, 8, 64, 16), (4, 8, 256, 16), (4, 8, 64, 64), (2, 8, 256, 64), (1, 8, 1024, 64)),
    "between": (1024, dict(d_model=256, n_heads=8, n_kv_heads=8, d_ff=704, vocab_size=256)),
    "messages": (2**8, 2**14, 2**18, 2**20, 2**22),
}
CUDA_SHAPES: Mapping[str, Any] = {
    "products": ((2048, 2048, 2048), (4096, 6144, 4096), (4096, 4096, 14336), (16384, 8192, 8192), (8192, 8192, 8192)),
    "attention": ((4, 32, 2048, 128), (1, 32, 8192, 128), (1, 32, 8192, 64), (1, 8, 32768, 128)),
    "between": (8192, dict(d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, vocab_size=32000)),
    "messages": (2**8, 2**16, 2**20, 2**24, 2**28),
}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}  # more than any cache holds


class Clock:
    """Times calls on `device`; each measurement takes about `seconds`."""

    def __init__(self, device: torch.device, *, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._synchronize = torch.get_device_module(device).synchronize
        self._now = time.perf_counter if device.type == "cuda" else time.process_time

    def time(self, call: Callable[[], object], *, calls: int) -> float:
        """Seconds of each of so many `calls`."""
        self._synchronize(self.device)
        start = self._now()
        for _ in range(calls):
            call()
        self._synchronize(self.device)
        return (self._now() - start) / calls

    def calls_within(self, call: Callable[[], object]) -> int:
        """How many fit into a repeat; the first, which warms up, does not count."""
        call()
        start = time.perf_counter()
        self.time(call, calls=2)
        return max(1, min(MOST_CALLS, int(2 * self.seconds / REPEATS / (time.perf_counter() - start))))

    def median(self, call: Callable[[], object]) -> float:
        calls = self.calls_within(call)
        return statistics.median(self.time(call, calls=calls) for _ in range(REPEATS))


# ---- of one rank ---------------------------------------------------------------------------------------------------


def products(clock: Clock, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> list[tuple[float, ...]]:
    """(m, n, inner, seconds) of each product, and of those of its gradients."""
    measured: list[tuple[float, ...]] = []
    for m, n, inner in shapes:
        x, w, g = (torch.randn(size, device=clock.device).to(dtype) for size in ((m, inner), (n, inner), (m, n)))
        measured.append((m, n, inner, clock.median(lambda x=x, w=w: x @ w.T)))  # type: ignore[misc]
        measured.append((m, inner, n, clock.median(lambda g=g, w=w: g @ w)))  # type: ignore[misc]
        measured.append((n, inner, m, clock.median(lambda g=g, x=x: g.T @ x)))  # type: ignore[misc]
    return measured


def attention(clock: Clock, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int, int]]) -> list[list[float]]:
    """[B, H, T, E, seconds forward, seconds backward] of causal attention, as the lab's blocks call it."""
    measured = []
    for shape in shapes:
        q, k, v = (torch.randn(shape, device=clock.device).to(dtype).requires_grad_() for _ in range(3))
        measured.append([*shape, *forward_and_backward(clock, lambda q=q, k=k, v=v: causal_attention(q, k, v))])  # type: ignore[misc]
    return measured


def forward_and_backward(clock: Clock, call: Callable[[], Tensor]) -> tuple[float, float]:
    forward = clock.median(call)

    def both() -> None:
        out = call()
        out.backward(torch.ones_like(out))

    return forward, max(clock.median(both) - forward, 0.0)


def copy(clock: Clock) -> tuple[float, float]:
    """(bytes read and written, seconds) of a copy that no cache holds."""
    source = torch.ones(COPY_BYTES[clock.device.type] // 4, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes, clock.median(lambda: target.copy_(source))


def between_products(clock: Clock, dtype: torch.dtype, tokens: int, shape: Model) -> tuple[float, float]:
    """Seconds, forward and backward, of what a block computes between its products: norms, residuals, rotary, gate."""
    rotary = Rotary(shape, tokens).to(clock.device)
    rotary.reset_buffers()

    def tensor(*size: int) -> Tensor:
        return torch.randn(1, tokens, *size, device=clock.device).to(dtype).requires_grad_()

    x, gate, up = tensor(shape.d_model), tensor(shape.d_ff), tensor(shape.d_ff)
    q, k = (tensor(n, shape.head_dim) for n in (shape.n_heads, shape.n_kv_heads))

    def operators() -> Tensor:
        residual = x
        for _ in range(2):
            residual = residual + F.rms_norm(residual, (shape.d_model,))
        joined: Tensor = _Join.apply(residual, F.silu(gate) * up, rotary(q).to(dtype), rotary(k).to(dtype))
        return joined

    return forward_and_backward(clock, operators)


class _Join(torch.autograd.Function):
    """A scalar that gives each of its inputs a gradient of its own size, without computing anything."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.parts = [part.detach() for part in parts]
        return parts[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(ctx.parts)


def loss(clock: Clock, dtype: torch.dtype, tokens: int, vocab_size: int) -> float:
    """Seconds, forward and backward, of the cross-entropy of `tokens` x `vocab_size` logits."""
    logits = torch.randn(1, tokens, vocab_size, device=clock.device).to(dtype).requires_grad_()
    targets = torch.zeros(1, tokens, dtype=torch.long, device=clock.device)
    return sum(forward_and_backward(clock, lambda: cross_entropy(logits, targets)))


def launches(clock: Clock, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds, forward and backward, of one of the lab's blocks that has next to nothing to compute."""
    shape = Model(n_layers=1, d_model=4, n_heads=2, n_kv_heads=2, d_ff=4, vocab_size=2)
    block, rotary = Block(shape).to(clock.device, dtype), Rotary(shape, 2).to(clock.device)
    rotary.reset_buffers()
    x = torch.zeros(1, 2, shape.d_model, device=clock.device, dtype=dtype, requires_grad=True)
    return forward_and_backward(clock, lambda: block(x, rotary))


# ---- of all ranks --------------------------------------------------------------------------------------------------


def collectives(clock: Clock, dtype: torch.dtype, sizes: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """By name: (bytes, seconds) of each. Collective; bytes are of the whole tensor, and with a send of the message.

    On a CPU seconds are the mean over ranks, for some work more than others; on GPUs those of this rank.
    """
    group, n = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    rank = dist.get_rank()

    def all_to_all(x: Tensor) -> Tensor:
        return functional.wait_tensor(functional.all_to_all_single(x, None, None, group))

    # Each begins, and gives what ends it: a send travels while its rank computes, all others begin when that is done.
    # And of how many parts it takes one.
    calls: dict[str, tuple[Callable[[Tensor], Callable[[], Tensor]], int]] = {
        "all_reduce": (lambda x: lambda: all_reduce(x, group=group), 1),
        "all_gather": (lambda x: lambda: all_gather(x, dim=0, group=group), n),
        "reduce_scatter": (lambda x: lambda: reduce_scatter(x, dim=0, group=group), 1),
        "all_to_all": (lambda x: lambda: all_to_all(x), 1),
        "send": (lambda x: exchange(x, to=rank + 1, source=rank - 1, group=group), 1),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for n_bytes in sizes:
        elements = max(1, n_bytes // n // dtype.itemsize) * n
        for name, (call, parts) in calls.items():
            x = torch.ones(elements // parts, dtype=dtype, device=clock.device)
            seconds = _collective_median(clock, lambda call=call, x=x: call(x))  # type: ignore[misc]
            measured[name].append((elements * dtype.itemsize, seconds))
    return measured


def _collective_median(clock: Clock, begin: Callable[[], Callable[[], Tensor]]) -> float:
    """As Clock.median, with as many calls on every rank.

    On a CPU there is a product of matrices with each, whose seconds are taken off: ranks that have computed wait for
    each other, and find neither tensors in their caches nor threads awake, as one all-reduce after the other would.
    """
    on_cpu = clock.device.type == "cpu"
    a, b = torch.ones(2048, 256, device=clock.device), torch.ones(256, 256, device=clock.device)
    out = torch.empty_like(a)

    def compute() -> None:
        if on_cpu:
            torch.mm(a, b, out=out)

    def both() -> None:
        end = begin()
        compute()
        end()

    wanted = torch.tensor([float(clock.calls_within(both))], device=clock.device)  # three calls, on each rank
    dist.all_reduce(wanted, dist.ReduceOp.MIN)
    calls = int(wanted.item())
    found = []
    for _ in range(REPEATS):
        dist.barrier()
        found.append(clock.time(both, calls=calls) - (clock.time(compute, calls=calls) if on_cpu else 0.0))
    seconds = torch.tensor([statistics.median(found)], device=clock.device)
    if on_cpu:
        dist.all_reduce(seconds)
        seconds /= dist.get_world_size()
    return max(float(seconds.item()), 1e-7)


# ---- all of it -----------------------------------------------------------------------------------------------------


def measure(device: torch.device, *, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """All of the above, in about `seconds` and what the first call of each takes. Collective; by the default group.

    What one rank measures is of rank 0; on a CPU the others wait meanwhile, on GPUs each is as busy. Numbers and texts
    alone, so that they can be written as JSON. `say` gets a line before each part.
    """
    on_cuda = device.type == "cuda"
    shapes = CUDA_SHAPES if on_cuda else CPU_SHAPES
    dtype = torch.bfloat16 if on_cuda else torch.float32
    ranks = dist.get_world_size()
    of_one = 6 * len(shapes["products"]) + 2 * (len(shapes["attention"]) + 3) + 1
    of_all = 5 * len(shapes["messages"]) if ranks > 1 else 0
    clock = Clock(device, seconds=seconds / (of_one + of_all))
    found: dict[str, Any] = {"device": "cpu", "ranks": ranks, "cores": available_cores(), "torch": torch.__version__}
    found |= {"element_bytes": dtype.itemsize, "float32_matmul": torch.get_float32_matmul_precision()}
    found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // available_cores()
    if on_cuda:
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": torch.cuda.get_device_name(device),
            "gpus": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": [properties.major, properties.minor],
        }
    if on_cuda or dist.get_rank() == 0:
        found |= _of_one_rank(clock, dtype, shapes, say)
    found["collectives"] = None
    if ranks > 1:
        dist.barrier()
        say(f"messages among {ranks} ranks")
        found["collectives"] = collectives(clock, dtype, shapes["messages"])
    return found


def _of_one_rank(
    clock: Clock, dtype: torch.dtype, shapes: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {"products": {}}
    for name in ("float32", "bfloat16"):
        say(f"products of matrices in {name}")
        found["products"][name] = products(clock, getattr(torch, name), shapes["products"])
    say("attention")
    found["attention"] = attention(clock, dtype, shapes["attention"])
    say("memory, what lies between products, launches")
    tokens, keys = shapes["between"]
    shape = Model(n_layers=1, **keys)
    found["copy"] = copy(clock)
    found["between"] = {"tokens": tokens, **keys, "seconds": between_products(clock, dtype, tokens, shape)}
    found["loss"] = {"logits": tokens * shape.vocab_size, "seconds": loss(clock, dtype, tokens, shape.vocab_size)}
    found["launches"] = launches(clock, dtype)
    return found
