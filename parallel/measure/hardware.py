"""What the hardware can do: the dense peak of a device by its exact name, and the fastest matrix product measured.

Nothing here is guessed, for that makes an MFU that is wrong by a factor of two or three without a word.
"""

import itertools
import time
from typing import NamedTuple

import torch

from parallel.measure.record import available_cores

CEILING_SECONDS = 0.3  # per measurement; long enough to catch a moment in which nothing else runs
CPU_SIZES = (256, 512, 1024)
CUDA_SIZES = (4096, 8192)
REMEDY = "give the dense FLOP/s of one device, without sparsity, with --peak-flops"


class Peak(NamedTuple):
    flops: float | None  # FLOP/s of one rank's device; None where it is not known
    source: str  # where it is from, or why there is none


class Accelerator(NamedTuple):
    flops: dict[str, float]  # FLOP/s by type: dense, with sums in float32
    memory_bytes: int  # as built in; drivers keep some of it, and error correction takes a sixteenth of GDDR
    source: str


def _part(source: str, memory_gib: int, **teraflops: float) -> Accelerator:
    return Accelerator({dtype: tera * 1e12 for dtype, tera in teraflops.items()}, memory_gib * 2**30, source)


# Where the figures were read, each at the commit named.
_STAS = "github.com/stas00/ml-engineering@744d01e compute/accelerator/README.md, from the vendors' pages"
_LIGHTNING = "github.com/Lightning-AI/pytorch-lightning@7f0c343 fabric/utilities/throughput.py, of NVIDIA's datasheets"
_COMPOSER = "github.com/mosaicml/composer@6405188 callbacks/speed_monitor.py, of NVIDIA's datasheets"
_TITAN = "github.com/pytorch/torchtitan@b5bcd76 torchtitan/tools/utils.py, from the vendors' pages"
_NANOCHAT = "github.com/karpathy/nanochat@92d63d4 nanochat/common.py"

# By the name that torch.cuda.get_device_name gives. What sources disagree about is left out, as docs/measures.md says;
# of an H20, all but bfloat16. float32 is the rate without tensor cores on NVIDIA, tfloat32 that with them.
ACCELERATORS: dict[str, Accelerator] = {
    "Tesla V100-SXM2-16GB": _part(_LIGHTNING, 16, float32=15.7),
    "Tesla V100-SXM2-32GB": _part(_LIGHTNING, 32, float32=15.7),
    "Tesla V100-PCIE-16GB": _part(_LIGHTNING, 16, float32=14.0),
    "Tesla V100-PCIE-32GB": _part(_LIGHTNING, 32, float32=14.0),
    "Tesla T4": _part(_LIGHTNING, 16, float32=8.1),
    "NVIDIA A100-SXM4-40GB": _part(_STAS, 40, float32=19.5, tfloat32=156, bfloat16=312),
    "NVIDIA A100-SXM4-80GB": _part(_STAS, 80, float32=19.5, tfloat32=156, bfloat16=312),
    "NVIDIA A100-PCIE-40GB": _part(_STAS, 40, float32=19.5, tfloat32=156, bfloat16=312),
    "NVIDIA A100 80GB PCIe": _part(_STAS, 80, float32=19.5, tfloat32=156, bfloat16=312),
    "NVIDIA A10": _part(_LIGHTNING, 24, float32=31.2, tfloat32=62.5, bfloat16=125),
    "NVIDIA A40": _part(_COMPOSER, 48, float32=37.4, tfloat32=74.8, bfloat16=149.7),
    "NVIDIA RTX A6000": _part(_TITAN, 48, float32=38.7, tfloat32=77.4, bfloat16=154.85),  # 309.7 is with sparsity
    "NVIDIA L4": _part(_LIGHTNING, 24, float32=30.3, tfloat32=60, bfloat16=121),
    "NVIDIA L40": _part(_LIGHTNING, 48, float32=90.5, tfloat32=90.5, bfloat16=181),
    "NVIDIA L40S": _part(_STAS, 48, float32=91.6, tfloat32=183, bfloat16=362),
    "NVIDIA GeForce RTX 3090": _part(_NANOCHAT, 24, float32=35.6, tfloat32=35.6, bfloat16=71),
    "NVIDIA GeForce RTX 4090": _part(_NANOCHAT, 24, float32=82.58, tfloat32=82.58, bfloat16=165.2),
    "NVIDIA GeForce RTX 5090": _part(_NANOCHAT, 32, float32=104.8, bfloat16=209.5),
    "NVIDIA H20": _part(_TITAN, 96, bfloat16=148),
    "NVIDIA H100 80GB HBM3": _part(_STAS, 80, float32=67, tfloat32=494.5, bfloat16=989),  # SXM5; 1979 is with sparsity
    "NVIDIA H100 PCIe": _part(_STAS, 80, float32=51, tfloat32=378, bfloat16=756),
    "NVIDIA H100 NVL": _part(_TITAN, 94, float32=60, tfloat32=417.5, bfloat16=835),
    "NVIDIA H200": _part(_STAS, 141, float32=67, tfloat32=494.5, bfloat16=989),
    "NVIDIA GH200 480GB": _part(_STAS, 96, float32=67, tfloat32=494.5, bfloat16=989),  # 480 GB are the host's
    "NVIDIA B200": _part(_STAS, 180, bfloat16=2250),
    "NVIDIA GB200": _part(_STAS, 186, bfloat16=2500),  # one of the two GPUs of a superchip, as torch sees them
    "NVIDIA B300 SXM6 AC": _part(_STAS, 288, bfloat16=2250),
    "NVIDIA GB300": _part(_STAS, 288, bfloat16=2500),
    "AMD Instinct MI250X": _part(_TITAN, 64, bfloat16=191.5),  # a torch device is one of its two dies
    "AMD Instinct MI300X": _part(_STAS, 192, float32=163.4, bfloat16=1307.4),
    "AMD Instinct MI300X OAM": _part(_STAS, 192, float32=163.4, bfloat16=1307.4),
    "AMD Instinct MI325X": _part(_STAS, 256, float32=163.4, bfloat16=1307.4),
    "AMD Instinct MI350X": _part(_STAS, 288, float32=144.2, bfloat16=2300),
    "AMD Instinct MI355X": _part(_STAS, 288, float32=157.3, bfloat16=2500),
}


def peak_flops(device_name: str, dtype: str) -> Peak:
    """The dense datasheet peak of the device that torch calls exactly `device_name`, by type, tfloat32 too."""
    accelerator = ACCELERATORS.get(device_name)
    if accelerator is None:
        return Peak(None, f"no peak is known for a device called {device_name!r}; {REMEDY}")
    if dtype not in accelerator.flops:
        return Peak(None, f"no certain {dtype} peak is known for {device_name}; {REMEDY}")
    without_tensor_cores = dtype == "float32" and "AMD" not in device_name
    note = " (not TF32, which torch leaves off by default)" if without_tensor_cores else ""
    return Peak(accelerator.flops[dtype], f"{device_name}, dense {dtype}{note}: {accelerator.source}")


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


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest product of two square matrices seen within CEILING_SECONDS on `device`, in FLOP/s.

    The best of many, because whatever else runs can only slow one down; other ranks on a CPU must wait meanwhile.
    """
    sizes, calls = (CUDA_SIZES, 10) if device.type == "cuda" else (CPU_SIZES, 1)  # a GPU is asked for several at once
    factors = [torch.randn(2, n, n, device=device).to(dtype) for n in sizes]
    synchronize = torch.get_device_module(device).synchronize
    best, deadline = 0.0, time.perf_counter() + CEILING_SECONDS
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
