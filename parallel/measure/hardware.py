"""What the hardware at hand can do: the peak of a rank's device, and the fastest matrix product measured."""

import contextlib
import itertools
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from parallel.measure.accelerators import Peak, peak_flops
from parallel.measure.record import available_cores

PRECISIONS = ("highest", "medium")  # of float32 products in torch; on a CPU "medium" lets oneDNN do them
LONGEST_ATTENTION = 1024  # tokens; its products are large then
LARGEST_ERROR = 1e-6  # relative, against float64
CEILING_SECONDS = 0.15  # per measurement; long enough to catch a moment in which nothing else runs
CPU_SIZES = (256, 512, 1024)
CUDA_SIZES = (4096, 8192)


def peak_of_rank(
    device: torch.device, dtype: str, *, matmul_ceiling_flops: float, local_ranks: int, given_flops: float | None = None
) -> Peak:
    """The peak against which a rank on `device`, one of `local_ranks` on this host, is measured.

    given_flops: the user's --peak-flops, which goes before all else. On a CPU it is `matmul_ceiling_flops`, measured
    with the threads of one rank, or this rank's share of it where the ranks have more threads than the host has cores.
    """
    if given_flops is not None:
        return Peak(given_flops, "given with --peak-flops")
    if device.type == "cuda":
        in_tf32 = dtype == "float32" and torch.get_float32_matmul_precision() != "highest"
        return peak_flops(torch.cuda.get_device_name(device), "tfloat32" if in_tf32 else dtype)
    threads, cores = torch.get_num_threads(), available_cores()
    source = f"measured: the fastest {dtype} matrix product on {threads} thread{'s' * (threads > 1)} of this CPU"
    share = min(1.0, cores / (local_ranks * threads))
    if share < 1:
        source += f", x {share:.3g}, as {local_ranks} ranks share {cores} core{'s' * (cores > 1)}"
    return Peak(matmul_ceiling_flops * share, source)


@contextlib.contextmanager
def float32_matmul(precision: str) -> Iterator[None]:
    """Within, products of float32 are done in this one of PRECISIONS."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def faster_float32_matmul(*, heads: int, seq_len: int, head_dim: int) -> str:
    """That one of PRECISIONS which is clearly faster on this CPU, if it is as exact as float32 should be.

    And if it is not slower in the small products of a rank's attention, (1, heads, seq_len, head_dim): there oneDNN can
    take ten times as long, with what it does before each.

    Where a CPU does "medium" in bfloat16, its error tells.
    """
    a, b = torch.randn(2, 512, 512)
    exact = a.double() @ b.double()
    rates, seconds = {}, {}
    shape = (1, heads, min(seq_len, LONGEST_ATTENTION), head_dim)
    for precision in PRECISIONS:
        with float32_matmul(precision):
            error = ((a @ b).double() - exact).norm() / exact.norm()
            rates[precision] = matmul_ceiling(torch.device("cpu"), torch.float32, seconds=CEILING_SECONDS / 5)
            seconds[precision] = attention_seconds(shape)
    faster = rates["medium"] > 1.1 * rates["highest"] and seconds["medium"] <= 1.1 * seconds["highest"]
    return "medium" if error <= LARGEST_ERROR and faster else "highest"


def attention_seconds(shape: tuple[int, int, int, int]) -> float:
    """Of causal attention in float32 on this CPU: the least of several. shape: (B, H, T, E)."""
    q, best = torch.randn(shape), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        best = min(best, time.perf_counter() - start)
    return best


def matmul_ceiling(device: torch.device, dtype: torch.dtype, *, seconds: float | None = None) -> float:
    """The fastest product of two square matrices seen within CEILING_SECONDS, or `seconds`, on `device`, in FLOP/s.

    The best of many, because whatever else runs can only slow one down; other ranks on a CPU must wait meanwhile.
    """
    sizes, calls = (CUDA_SIZES, 10) if device.type == "cuda" else (CPU_SIZES, 1)  # a GPU is asked for several at once
    factors = [torch.randn(2, n, n, device=device).to(dtype) for n in sizes]
    synchronize = torch.get_device_module(device).synchronize
    best, deadline = 0.0, time.perf_counter() + (seconds or CEILING_SECONDS)
    for a, b in itertools.cycle(factors):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            a @ b
        synchronize(device)
        end = time.perf_counter()
        best = max(best, calls * 2 * len(a) ** 3 / (end - start))
        if end > deadline:
            break
    del factors, a, b
    torch.cuda.empty_cache()  # a measure of memory may follow
    return best
