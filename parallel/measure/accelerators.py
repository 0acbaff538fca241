"""The dense peak of a device by its exact name, and its memory; read without torch.

Nothing here is guessed, for that makes an MFU that is wrong by a factor of two or three without a word.
"""

import tomllib
from importlib.resources import files
from typing import NamedTuple

REMEDY = "give the dense FLOP/s of one device, without sparsity, with --peak-flops"


class Peak(NamedTuple):
    flops: float | None  # FLOP/s of one rank's device; None where it is not known
    source: str  # where it is from, or why there is none


class Accelerator(NamedTuple):
    flops: dict[str, float]  # FLOP/s by type: dense, with sums in float32
    memory_bytes: int
    source: str


def _accelerators() -> dict[str, Accelerator]:
    tables = tomllib.loads(files("parallel.measure").joinpath("accelerators.toml").read_text(encoding="utf-8"))
    parts = {}
    for name, part in tables["accelerators"].items():
        source, memory_bytes = tables["sources"][part.pop("source")], part.pop("memory_gib") * 2**30
        parts[name] = Accelerator({dtype: tera * 1e12 for dtype, tera in part.items()}, memory_bytes, source)
    return parts


ACCELERATORS = _accelerators()  # by the name that torch.cuda.get_device_name gives


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
