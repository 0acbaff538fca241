"""Measure this machine, or hold runs against a cluster; writes a cluster file."""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.compare import visible_gpus
from launch.folder import PREDICTED
from launch.page import find_records
from launch.starting import Starter
from launch.supervisor import MAX_LOCAL_RANKS, run_program
from launch.terminal import CommandError, Status, printable, progress, progress_stream
from parallel.foresight.calibration import Calibration, Run, cluster_of, held_against, predicted_seconds
from parallel.foresight.clusters import Cluster, cluster_toml, load_cluster
from parallel.measure.record import available_cores, record_json
from parallel.recipe import RecipeError, recipe_from_tables

SECONDS = 60.0  # of measuring; beginning and ending come on top
MOST_SECONDS = 3600.0
START_SECONDS = 120.0  # for imports, the first call of everything, and the end


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    ranks = "processes that measure their links; default: a rank a GPU, on CPUs one a core and at least 2"
    add("--ranks", metavar="N", type=int, help=ranks)
    add("--seconds", metavar="S", type=float, default=SECONDS, help=f"of measuring, about; default: {SECONDS:g}")
    matmul = "float32 products on a CPU, as in lab run; default: highest"
    add("--matmul", choices=("highest", "medium"), default="highest", help=matmul)
    runs = "measure nothing: fit the constants of --cluster to the runs in these folders"
    add("--from", dest="runs", metavar="DIR", type=Path, nargs="+", help=runs)
    add("--cluster", metavar="CLUSTER", help="of --from: a name of the catalogue, or a .toml file (docs/foresight.md)")
    add("--name", metavar="NAME", help="of the cluster; default: here, with --from that of the cluster")
    add("--out", metavar="FILE", type=Path, help="the cluster file; default: NAME.toml")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.runs is None) != (arguments.cluster is None):
        raise CommandError("--from and --cluster go together: runs are held against a cluster, as one of lab calibrate")
    before = None if arguments.cluster is None else load_cluster(arguments.cluster)
    name = arguments.name or (f"{before.name}-by-runs" if before else "here")
    if not name.isprintable() or not 0 < len(name) <= 100 or "/" in name:
        raise RecipeError("--name", name, "give a short name, without /")
    out = arguments.out or Path(f"{name}.toml")
    if out.exists():
        raise RecipeError("--out", str(out), "is there already; give a new file")
    found = None
    if before is None:
        cluster = _measured(arguments, name)
        head = f"By lab calibrate on {cluster.accelerator}."
    else:
        runs, left_out = runs_in(arguments.runs, before)
        found = held_against(runs, before)
        cluster = dataclasses.replace(found.cluster, name=name)
        head = f"By lab calibrate --from {len(runs)} runs, held against the cluster {before.name}."
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(cluster_toml(cluster, head=printable(head)), encoding="utf-8")
    if arguments.json:
        print(record_json(_as_json(cluster, found)))
    elif found is None:
        print(_cluster_in_words(cluster))
    else:
        print("\n".join([*_runs_in_words(found, on_cpu=cluster.accelerator == "cpu"), *left_out]))
    progress(arguments)(f"\n{out}")
    return 0


# ---- by measuring --------------------------------------------------------------------------------------------------


def _measured(arguments: argparse.Namespace, name: str) -> Cluster:
    ranks = arguments.ranks if arguments.ranks is not None else visible_gpus() or max(2, available_cores())
    if not 1 <= ranks <= MAX_LOCAL_RANKS:
        raise RecipeError("--ranks", ranks, f"give how many processes, 1 to {MAX_LOCAL_RANKS}")
    if not 1 <= arguments.seconds <= MOST_SECONDS:
        raise RecipeError("--seconds", arguments.seconds, f"give seconds, 1 to {MOST_SECONDS:g}")
    limit = START_SECONDS + 3 * arguments.seconds  # more ranks than cores take turns
    with tempfile.TemporaryDirectory() as folder, Starter() as starter, Status(progress_stream(arguments)) as status:
        written = Path(folder) / "measured.json"
        given = ["--write", str(written), "--seconds", repr(arguments.seconds), "--limit", repr(limit)]
        failure = run_program(
            "launch.calibration",
            [*given, "--matmul", arguments.matmul],
            n_ranks=ranks,
            folder=Path(folder),
            limit_seconds=limit,
            starter=starter,
            echo=lambda line: status.say(f"  {printable(line)}"),
        )
        if failure is not None:
            raise ChildProcessError(f"nothing was measured: {failure[1]}")
        found = json.loads(written.read_text(encoding="utf-8"))
    return cluster_of(found, name=name, when=datetime.now(UTC).date().isoformat())


def _cluster_in_words(cluster: Cluster) -> str:
    device, links, software = cluster.device, cluster.links, cluster.software
    unit, unit_name = (1e-3, "GFLOP/s") if device.matmul_float32_tflops < 1 else (1.0, "TFLOP/s")
    rows = [
        ("products in float32", device.matmul_float32_tflops / unit, unit_name),
        ("products in bfloat16", device.matmul_tflops / unit, unit_name),
        ("memory", device.memory_gb_per_s, "GB/s"),
        ("a launch", software.launch_us, "us"),
    ]
    if links.origin == "measured":
        rows += [("all-reduce, large", links.inside_gb_per_s, "GB/s"), ("all-reduce, empty", links.inside_us, "us")]
    per = " (CPU seconds of a rank)" if cluster.accelerator == "cpu" else ""
    head = f"{cluster.name}: {cluster.accelerator}, {cluster.ranks_per_node} to a node{per}"
    return "\n".join(["", head, *(f"  {what:<24}{value:>10.4g} {unit}" for what, value, unit in rows)])


# ---- by runs -------------------------------------------------------------------------------------------------------


def runs_in(folders: Sequence[Path], cluster: Cluster) -> tuple[list[Run], list[str]]:
    """Those that can be held against the cluster; and in words, why others cannot. Raises CommandError."""
    runs, left_out = [], []
    for folder in folders:
        if not folder.is_dir():
            raise CommandError(f"--from: {folder} is no folder; give one that holds runs")
        for name, record in find_records(folder):
            if PREDICTED in name.split("/")[:-1] or record["kind"] == "dry-run":
                continue
            try:
                runs.append(_run_of(name, record, cluster))
            except RecipeError as error:
                left_out.append(f"left out: {printable(error)}")
    if not runs:
        why = f" ({left_out[0]})" if left_out else ""
        raise CommandError(f"--from: no run that ended well on {cluster.accelerator} in {folders[0]}{why}")
    return runs, left_out


def _run_of(name: str, record: dict[str, Any], cluster: Cluster) -> Run:
    """Raises RecipeError where the closed form cannot foretell it, or nothing was measured."""
    device, speed, on_cpu = record["environment"]["device"], record["throughput"], cluster.accelerator == "cpu"
    if record["status"] != "ok":
        raise RecipeError(name, record["status"], "is no run that ended well")
    if device != cluster.accelerator:
        raise RecipeError(name, device, f"ran on another device than {cluster.accelerator}")
    seconds = speed["cpu_seconds_per_step"] if on_cpu else speed["step_seconds"]["median"]
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        raise RecipeError(name, seconds, "has no step that was timed; give it more steps")
    recipe = recipe_from_tables(record["recipe"])
    if recipe.engine.name != "native":
        raise RecipeError(name, recipe.engine.name, "is no engine that the closed form knows; native is")
    predicted_seconds(recipe, cluster)  # the cluster has a rate for its type
    return Run(name=name, recipe=recipe, seconds=float(seconds))


def _runs_in_words(found: Calibration, *, on_cpu: bool) -> list[str]:
    what = "CPU seconds of a step, all ranks" if on_cpu else "seconds of a step"
    rows: list[tuple[str, ...]] = [("", "measured", "before", "%", "after", "%", "without it", "%")]
    errors: list[list[float]] = []
    for held in found.runs:
        foretold = (held.before, held.after, held.without)
        errors.append([seconds / held.run.seconds - 1 for seconds in foretold])
        cells = [
            text
            for seconds, error in zip(foretold, errors[-1], strict=True)
            for text in (f"{seconds:.4g}", f"{100 * error:+.1f}")
        ]
        rows.append((printable(held.run.name)[:40], f"{held.run.seconds:.4g}", *cells))
    means = [100 * sum(abs(error) for error in column) / len(column) for column in zip(*errors, strict=True)]
    rows.append(("mean of |error|", "", "", f"{means[0]:.1f}", "", f"{means[1]:.1f}", "", f"{means[2]:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    moved = [f"{name} x {factor:.3g}" for name, factor in found.cluster.constants.items() if abs(factor - 1) > 0.005]
    return [
        *lines,
        "",
        f"{what}. after: foretold with the constants fitted to all of these runs; without it: to all the others.",
        f"constants: {', '.join(moved) or 'as they were'}",
    ]


def _as_json(cluster: Cluster, found: Calibration | None) -> dict[str, Any]:
    runs = None
    if found is not None:
        runs = [
            {"name": held.run.name, "measured_seconds": held.run.seconds}
            | {f"{when}_seconds": getattr(held, when) for when in ("before", "after", "without")}
            for held in found.runs
        ]
    return {"cluster": dataclasses.asdict(cluster), "runs": runs}
