"""The constants of the closed form, from constants.toml: fitted to published runs, by generation of accelerator."""

import tomllib
from importlib.resources import files
from typing import Literal, NamedTuple

Generation = Literal["ampere", "hopper", "blackwell", "other"]


class Constant(NamedTuple):
    before: float  # any run was seen
    spread: float  # of its logarithm, among programs and machines
    value: float


def _constants() -> dict[str, dict[str, Constant]]:
    tables = tomllib.loads(files("parallel.foresight").joinpath("constants.toml").read_text(encoding="utf-8"))
    return {name: {key: Constant(**table) for key, table in by.items()} for name, by in tables.items()}


CONSTANTS = _constants()  # by name and generation; "all" where there is one for all


def constant(name: str, generation: str) -> Constant:
    by = CONSTANTS[name]
    return by["all"] if "all" in by else by[generation]


def values_of(generation: str) -> dict[str, float]:
    """By name, as `price` takes them."""
    return {name: constant(name, generation).value for name in CONSTANTS}


def spreads_of(generation: str) -> dict[str, float]:
    return {name: constant(name, generation).spread for name in CONSTANTS}
