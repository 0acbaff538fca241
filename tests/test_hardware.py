"""Peaks come from exact names, and a CPU's from a measurement."""

import pytest
import torch

from parallel.measure import hardware
from parallel.measure.accelerators import ACCELERATORS, peak_flops
from parallel.measure.hardware import matmul_ceiling, peak_of_rank

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),  # not 156, which is TF32
        ("NVIDIA A100-SXM4-80GB", "tfloat32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),  # not 1979, which is with sparsity
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA H200", "bfloat16", 989),  # its name says neither SXM nor NVL
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40", "bfloat16", 181),  # begins like L4
        ("NVIDIA L40S", "bfloat16", 362),  # begins like L4 and L40, and has a capital S
        ("NVIDIA RTX A6000", "bfloat16", 154.85),  # not 38.7, which is float32
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),  # with sums in float32
        ("NVIDIA B200", "bfloat16", 2250),
        ("AMD Instinct MI250X", "bfloat16", 191.5),  # one die of two
    ],
)
def test_dense_peak_of_the_exact_device(name: str, dtype: str, teraflops: float) -> None:
    peak = peak_flops(name, dtype)
    assert peak.flops == teraflops * 1e12
    assert name in peak.source and "github.com" in peak.source


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100", "bfloat16"),  # which one?
        ("nvidia l40s", "bfloat16"),
        ("NVIDIA L40S-48Q", "bfloat16"),  # a part of one
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("NVIDIA A10G", "bfloat16"),  # sources disagree
        ("Tesla V100-SXM2-32GB", "bfloat16"),  # has no such units
        ("NVIDIA B200", "float32"),  # sources disagree
        ("NVIDIA H200", "float64"),
        ("cpu", "float32"),
    ],
)
def test_no_peak_is_guessed(name: str, dtype: str) -> None:
    peak = peak_flops(name, dtype)
    assert peak.flops is None
    assert name in peak.source and "--peak-flops" in peak.source


def test_float32_says_that_it_is_not_tf32() -> None:
    assert "not TF32" in peak_flops("NVIDIA H200", "float32").source
    assert "TF32" not in peak_flops("AMD Instinct MI300X", "float32").source


def test_rates_of_the_table_are_of_one_order() -> None:
    """Tensor cores double, quadruple or better; a sparse or mistyped rate would stand out."""
    for name, part in ACCELERATORS.items():
        for slower, faster in (("float32", "tfloat32"), ("tfloat32", "bfloat16")):
            if slower in part.flops and faster in part.flops:
                assert 1 <= part.flops[faster] / part.flops[slower] <= 8.1, name
        assert all(5e12 < flops < 3e15 for flops in part.flops.values()), name
        assert 2**34 <= part.memory_bytes <= 288 * 2**30, name


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_in_tf32_have_the_peak_of_tf32(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        peaks = {
            dtype: peak_of_rank(torch.device("cuda"), dtype, matmul_ceiling_flops=1e12, local_ranks=8).flops
            for dtype in ("float32", "bfloat16")
        }
    finally:
        torch.set_float32_matmul_precision(before)
    assert peaks == {"float32": 67e12 if precision == "highest" else 494.5e12, "bfloat16": 989e12}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_user_s_peak_goes_first(device: str) -> None:
    peak = peak_of_rank(torch.device(device), "bfloat16", matmul_ceiling_flops=1e12, local_ranks=8, given_flops=7e13)
    assert peak == (7e13, "given with --peak-flops")


@pytest.mark.parametrize(
    ("local_ranks", "threads", "cores", "share"), [(1, 1, 2, 1), (2, 1, 2, 1), (4, 1, 2, 0.5), (2, 4, 4, 0.5)]
)
def test_ranks_share_the_cores_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, local_ranks: int, threads: int, cores: int, share: float
) -> None:
    monkeypatch.setattr(hardware, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    peak = peak_of_rank(CPU, "float32", matmul_ceiling_flops=100e9, local_ranks=local_ranks)
    assert peak.flops == share * 100e9
    assert peak.source.startswith("measured")
    assert (f"{local_ranks} ranks share {cores} cores" in peak.source) == (share < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ceiling_is_the_rate_of_the_products_it_ran(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """On a clock that advances by n³ / 10 nanoseconds for each product."""
    now, products = 0.0, []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal now
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        products.append(len(a))
        now += 1e-10 * len(a) ** 3
        return a

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now)
    assert matmul_ceiling(CPU, dtype) == pytest.approx(2e10)  # 2·n³ FLOPs in that time
    assert set(products) == set(hardware.CPU_SIZES)
    assert 0 <= now - hardware.CEILING_SECONDS <= 1e-10 * max(hardware.CPU_SIZES) ** 3  # bounded


def test_ceiling_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CEILING_SECONDS", 0.1)
    assert 1e8 < matmul_ceiling(CPU, torch.float32) < 1e13


@pytest.mark.parametrize(
    ("rates", "attention", "exact_to", "chosen"),
    [
        ({"highest": 100e9, "medium": 240e9}, {"highest": 2e-5, "medium": 2e-5}, 1e-6, "medium"),
        ({"highest": 100e9, "medium": 240e9}, {"highest": 2e-5, "medium": 2e-4}, 1e-6, "highest"),  # many small ones
        ({"highest": 100e9, "medium": 105e9}, {"highest": 2e-5, "medium": 2e-5}, 1e-6, "highest"),  # noise
        # As where "medium" is bfloat16.
        ({"highest": 100e9, "medium": 240e9}, {"highest": 2e-5, "medium": 2e-5}, 1e-9, "highest"),
    ],
)
def test_float32_products_are_the_faster_ones_that_are_exact(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, float], attention: dict[str, float], exact_to: float, chosen: str
) -> None:
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(hardware, "LARGEST_ERROR", exact_to)
    monkeypatch.setattr(hardware, "matmul_ceiling", lambda *_, seconds: rates[torch.get_float32_matmul_precision()])
    seen = []

    def seconds(shape: tuple[int, ...]) -> float:
        seen.append(shape)
        return attention[torch.get_float32_matmul_precision()]

    monkeypatch.setattr(hardware, "attention_seconds", seconds)
    assert hardware.faster_float32_matmul(heads=8, seq_len=4096, head_dim=16) == chosen
    assert seen == [(1, 8, 1024, 16)] * 2
    assert torch.get_float32_matmul_precision() == before
