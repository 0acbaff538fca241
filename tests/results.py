"""Records of runs that never were: one with every key, one with none, and months of them on several clusters."""

import copy
import functools
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from layouts import small_recipe

from parallel.measure.record import new_record

Record = dict[str, Any]


@functools.cache
def _ended_well(sequences: int = 8, **parallel: int) -> Record:
    train = dict(micro_batch=1, global_batch=sequences)
    return new_record(small_recipe(train=train, parallel=parallel)) | {"status": "ok"}


def empty_record(name: str, sequences: int = 8, **parallel: int) -> Record:
    """A run that ended well and measured nothing."""
    record = copy.deepcopy(_ended_well(sequences, **parallel))
    record["recipe"]["name"] = name
    record["environment"] |= {
        "time_utc": "2026-11-01T12:00:00+00:00",  # one day for all, even around midnight
        "device": "cpu",
        "cpu": "Test CPU",
        "cores": 2,
        "accelerators": [],
        "git_commit": "a" * 40,
    }
    return record


def complete_record(name: str, factor: float = 1.0, sequences: int = 8, **parallel: int) -> Record:
    """A run with every key of the contract filled; `factor` tells runs apart."""
    record = empty_record(name, sequences, **parallel)
    ranks = record["layout"]["world_size"]
    record["steps"] = [
        {"step": n, "loss": 4.0 / n, "grad_norm": 1.0 / n, "seconds": 0.25 * factor} for n in range(1, 21)
    ]
    record["parity"] |= {
        "reference": "one process, same model and batch",
        "dtype": "float64",
        "max_rel_grad_diff": 3.5e-16 * factor,
        "max_abs_loss_diff": 8.9e-16,
        "passed": True,
    }
    record["throughput"] |= {
        "tokens_per_s": 512 / factor,
        "tokens_per_s_per_rank": 512 / factor / ranks,
        "step_seconds": {"median": 0.25 * factor, "p10": 0.2 * factor, "p90": 0.4 * factor},
        "cpu_seconds_per_step": 0.5 * factor,
        "step_parts": {
            "compute_seconds": 0.18 * factor,
            "communication_seconds": 0.05 * factor,
            "idle_seconds": 0.02 * factor,
        },
        "steps_timed": 16,
        "steps_left_out": {"warm-up": 3, "profile": 1, "save": 0},
    }
    record["flops"] |= {
        "definition": "PaLM, appendix B",
        "model_flops_per_token": 1.25e6,
        "model_flops_per_token_causal": 1.2e6,
        "hardware_flops_per_token": 1.6e6,
        "mfu": 0.42 / factor,
        "mfu_causal": 0.4 / factor,
        "hfu": 0.53 / factor,
        "peak_flops": 989e12,
        "peak_source": "datasheet of the device",
        "matmul_ceiling_flops": 791.2e12,
    }
    record["memory"] = memory(ranks, round(2**20 * factor))
    record["traffic"] = [
        {"mesh_dim": "dp_shard", "collective": "all_gather", "calls": 18, "bytes_per_rank": round(6 * 2**20 * factor)},
        {"mesh_dim": "dp_shard", "collective": "reduce_scatter", "calls": 9, "bytes_per_rank": 3 * 2**20},
        {"mesh_dim": "tp", "collective": "all_reduce", "calls": 40, "bytes_per_rank": 2**20},
    ]
    return record


def memory(ranks: int, unit: int) -> Record:
    parts = ("parameters", "gradients", "optimizer", "activations", "other")
    per_rank = []
    for rank in range(ranks):
        split = {f"{part}_bytes": unit * (i + 1) * (1 + rank) for i, part in enumerate(parts)}
        per_rank.append({"rank": rank, "peak_bytes": sum(split.values()), **split})
    peaks = [row["peak_bytes"] for row in per_rank]
    return {"per_rank": per_rank, "max_peak_bytes": max(peaks), "min_peak_bytes": min(peaks), "step": 2}


MFU = {"fsdp": 0.40, "hsdp": 0.44, "fsdp-tp": 0.37, "pp-fsdp": 0.35}
GPU = "NVIDIA H100 80GB HBM3"


def layout_of(strategy: str, devices: int, *, tp: int = 2) -> dict[str, int]:
    return {
        "fsdp": {"dp_shard": devices},
        "hsdp": {"dp_replicate": devices // 8, "dp_shard": 8},
        "fsdp-tp": {"dp_shard": devices // tp, "tp": tp},
        "pp-fsdp": {"pp": 4, "dp_shard": devices // 4},
    }[strategy]


def months(
    *,
    commits: int = 10,
    noise: float = 0.01,
    clusters: tuple[str, ...] = ("alpha", "beta", "gamma"),
    devices: tuple[int, ...] = (64, 128),
    drop: tuple[str, int, str, int, float] | None = ("beta", 64, "fsdp", 7, 0.18),
) -> dict[str, Record]:
    """One run a week of each strategy, cluster and number of devices, each week of another commit.

    drop: cluster, devices, strategy, commit from which on, and by which share MFU is lower there.
    """
    chance, found = random.Random(7), {}
    for number in range(commits):
        time = datetime(2026, 1, 5, 12, tzinfo=UTC) + timedelta(weeks=number)
        for i, cluster in enumerate(clusters):
            for n in devices:
                for strategy, usual in MFU.items():
                    mfu = usual * (1 - 0.06 * i) * (n / 64) ** -0.1 * chance.gauss(1, noise)
                    if drop and drop[:3] == (cluster, n, strategy) and number >= drop[3]:
                        mfu *= 1 - drop[4]
                    record = complete_record(strategy, 0.42 / mfu, sequences=n, **layout_of(strategy, n))
                    record["throughput"]["tokens_per_s"] *= n
                    record["throughput"]["tokens_per_s_per_rank"] *= n
                    record["environment"] |= {
                        **{"device": GPU, "accelerators": [GPU] * 8, "cpu": "Intel Xeon", "cores": 96},
                        **{"time_utc": time.isoformat(), "git_commit": f"{number:07x}" + "c" * 33},
                    }
                    record["environment"]["cluster"] = cluster
                    record["labels"]["job_id"] = str(1000 + len(found))
                    found[f"{cluster}/week-{number:03d}/{n}/{strategy}"] = record
    return found
