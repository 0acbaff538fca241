"""Runs over time: those that can be compared are a series, and a drop below the runs before it is found in each.

A series is one cluster, number of devices, strategy (a run's name), model and batch. Its value is MFU, or tokens per
second where one of its runs has no MFU. A run is a drop where it is below every one of the runs before it (the last
WINDOW that were none), and below their mean by more than SPREADS standard deviations and LEAST_DROP of it.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from launch.table import number_in, picked, table_in, text_in
from parallel.measure.record import Flops, Throughput

WINDOW = 10  # runs that a run is held against; after as many low ones in turn, their level is the usual one
FEWEST_BEFORE = 4  # with fewer, nobody knows their spread
SPREADS = 4
LEAST_DROP = 0.03  # where runs before were alike by chance


@dataclass(frozen=True, kw_only=True)
class Drop:
    """The first of the runs that are low, what came of the others, and what was usual before."""

    run: str  # identifier
    series: tuple[str, ...]
    time_utc: str
    commit: str | None
    commit_before: str | None  # of the last run that was as usual
    unit: str
    usual: float
    value: float  # median of the low runs
    lasts: bool  # no run since has been as usual

    @property
    def share(self) -> float:
        """By how much of the usual it is lower."""
        return 1 - self.value / self.usual


def find_drops(found: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Drop]:
    """Of (identifier, record) in any order; the largest first, those that last before the others."""
    series: dict[tuple[str, ...], list[tuple[datetime, str, Mapping[str, Any]]]] = {}
    for identifier, record in found:
        time = time_of(record)
        if time and record["status"] == "ok" and record["kind"] == "measured" and _speed(record) is not None:
            series.setdefault(series_of(record), []).append((time, identifier, record))
    drops = [drop for key, runs in series.items() for drop in _drops(key, sorted(runs, key=lambda run: run[:2]))]
    return sorted(drops, key=lambda drop: (not drop.lasts, -drop.share))


def _drops(series: tuple[str, ...], runs: Sequence[tuple[datetime, str, Mapping[str, Any]]]) -> Iterator[Drop]:
    by_mfu = all(_mfu(record) is not None for *_, record in runs)
    values = [(_mfu if by_mfu else _speed)(record) or 0.0 for *_, record in runs]
    for low in low_stretches(values):
        time, identifier, record = runs[low.first]
        yield Drop(
            run=identifier,
            series=series,
            time_utc=time.isoformat(timespec="seconds"),
            commit=text_in(record["environment"]["git_commit"]),
            commit_before=text_in(runs[low.before][2]["environment"]["git_commit"]),
            unit="MFU" if by_mfu else "tokens/s",
            usual=low.usual,
            value=statistics.median(low.values),
            lasts=low.lasts,
        )


@dataclass(kw_only=True)
class LowStretch:
    first: int  # index
    before: int  # of the last value that was as usual
    usual: float
    values: list[float]
    lasts: bool = True


def low_stretches(values: Sequence[float]) -> list[LowStretch]:
    """Where values, in the order of time, are lower than those before them; larger is better."""
    stretches: list[LowStretch] = []
    usual: deque[float] = deque(maxlen=WINDOW)
    before, low = 0, None
    for i, value in enumerate(values):
        if len(usual) >= FEWEST_BEFORE:
            mean = statistics.fmean(usual)
            if value < min(min(usual), mean - max(SPREADS * statistics.stdev(usual), LEAST_DROP * mean)):
                if low is None:
                    low = LowStretch(first=i, before=before, usual=mean, values=[])
                    stretches.append(low)
                low.values.append(value)
                if len(low.values) < WINDOW:
                    continue
                usual.clear()  # from here on this is the usual level
                usual.extend(low.values)
        if low is not None:
            low.lasts, low = False, None
        before = i
        usual.append(value)
    return stretches


# ---- what belongs together -----------------------------------------------------------------------------------------


def series_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """(cluster, devices, strategy, model and batch), in words; a strategy's engine, too, where it is not the lab's."""
    devices = f"{number_in(record['layout']['world_size']) or 0:.0f}"
    name, engine = text_in(record["recipe"].get("name")), engine_of(record)
    strategy = str(name) if engine == "native" else f"{name} by {engine}"
    return cluster_of(record) or "unknown", devices, strategy, shape_of(record)


def engine_of(record: Mapping[str, Any]) -> str:
    return str(table_in(record["recipe"].get("engine")).get("name", "native"))[:100]


def cluster_of(record: Mapping[str, Any]) -> str | None:
    """As "alpha, NVIDIA H200": the name that was given and the device; without one the host's hardware.

    None where neither is known, as in a run that was refused before it chose a device.
    """
    name, hardware = text_in(record["environment"]["cluster"]), hardware_of(record["environment"])
    if name is None or hardware is None:
        return name or hardware
    devices = _accelerators(record["environment"]) or [text_in(record["environment"]["cpu"]) or "unknown processor"]
    return f"{name[:100]}, {' and '.join(dict.fromkeys(devices))}"


def hardware_of(environment: Mapping[str, Any]) -> str | None:
    """As "8 × NVIDIA H200" or "AMD EPYC, 2 cores". None where the run had chosen no device yet."""
    if environment["device"] is None:
        return None
    names = _accelerators(environment)
    kinds = dict.fromkeys(names)
    counted = (f"{names.count(kind)} × {kind}" if names.count(kind) > 1 else kind for kind in kinds)
    return _where(environment, ", ".join(counted)) if names else cpu_of(environment)


def _where(environment: Mapping[str, Any], hardware: str) -> str:
    """As "4 × 8 × NVIDIA H200 (our cluster)": of all hosts, and where they are."""
    hosts, cluster = environment["hosts"], environment["cluster"]
    n_hosts = len(set(map(str, hosts))) if isinstance(hosts, list) else 1
    of_all = f"{n_hosts} × {hardware}" if n_hosts > 1 else hardware
    return f"{of_all} ({str(cluster)[:100]})" if cluster else of_all


def _accelerators(environment: Mapping[str, Any]) -> list[str]:
    """The names of those that a run used; none where it ran on a CPU."""
    device, accelerators = environment["device"], environment["accelerators"]
    if device is None or str(device).startswith("cpu") or not isinstance(accelerators, list):
        return []
    return [str(name)[:100] for name in accelerators]


def cpu_of(environment: Mapping[str, Any]) -> str:
    cpu, cores = environment["cpu"], number_in(environment["cores"])
    name = str(cpu)[:100] if cpu else "unknown processor"
    return _where(environment, f"{name}, {cores:.0f} cores" if cores else name)


def model_of(record: Mapping[str, Any]) -> str:
    """Model, precision and sequence in words: what makes MFU comparable, whatever the batch."""
    model, train = table_in(record["recipe"].get("model")), table_in(record["recipe"].get("train"))
    name = model.get("preset", "tiny") if model.get("preset") != "none" else "own model"
    layers, width, length = model.get("n_layers"), model.get("d_model"), train.get("seq_len")
    shape = f" ({layers} layers, d_model {width})" if layers and width else ""
    return f"{name}{shape}, {train.get('dtype', 'float32')}{f', {length} tokens' if length else ''}"[:200]


def shape_of(record: Mapping[str, Any]) -> str:
    """The same with the global batch: what makes two runs' speeds comparable."""
    batch = table_in(record["recipe"].get("train")).get("global_batch")
    return f"{model_of(record)}{f' × {batch}' if batch else ''}"[:250]


def time_of(record: Mapping[str, Any]) -> datetime | None:
    """When the run was, UTC where it says no zone; None where it does not say."""
    try:
        time = datetime.fromisoformat(str(record["environment"]["time_utc"]))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _mfu(record: Mapping[str, Any]) -> float | None:
    value: float | None = picked(record["flops"], Flops)["mfu"]
    return value


def _speed(record: Mapping[str, Any]) -> float | None:
    value: float | None = picked(record["throughput"], Throughput)["tokens_per_s"]
    return value


def in_words(drop: Drop) -> str:
    """One line, as "alpha, H100, 64 devices, fsdp: MFU 41.9 % -> 34.4 % (-18 %) ..."."""
    cluster, devices, strategy, shape = drop.series
    scale, unit = (100, " %") if drop.unit == "MFU" else (1, "")
    since = f"since {(drop.commit or 'unknown commit')[:12]} of {drop.time_utc[:10]}"
    before = f"as usual until {(drop.commit_before or 'unknown commit')[:12]}"
    return (
        f"{strategy} on {devices} devices of {cluster} ({shape}): {drop.unit} {drop.value * scale:.4g}{unit} instead of"
        f" {drop.usual * scale:.4g}{unit}, {drop.share:.1%} lower, {since}, {before}"
        f"{'' if drop.lasts else '; made good since'}"
    )
