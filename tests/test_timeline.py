"""Where the seconds of a step go: its parts, the pipeline's actions and bubble, and traces."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from layouts import CPU, batch_of, small_recipe
from ranks import Ranks

from launch.cli import main
from parallel import torch_private
from parallel.actions import Action
from parallel.assemble import assemble
from parallel.batches import rows_of_replica
from parallel.dryrun import dry_run, dry_run_rank
from parallel.engines.engine import read_step, run_step
from parallel.engines.native import NativeEngine
from parallel.measure.clock import Clock
from parallel.measure.observer import Step
from parallel.measure.timeline import Timeline, ideal_bubble
from parallel.measure.trace import parts_of_trace
from parallel.mesh import build_mesh
from parallel.recipe import Recipe
from parallel.training import train_in_group

RECIPES = Path(__file__).parents[1] / "recipes"

# ---- the ideal -----------------------------------------------------------------------------------------------------

# Of 4 ranks and 8 microbatches, a forward of 1 and a backward of 2 units. GPipe and 1F1B: (p-1)/(m+p-1); with v stages
# per rank (p-1)/(v·m+p-1) (arXiv:2104.04473); where backward is split one forward remains to be waited for.
IDEALS = {
    "gpipe": 3 / 11,
    "1f1b": 3 / 11,
    "interleaved-1f1b": 3 / 19,
    "looped-bfs": 3 / 19,
    "interleaved-zero-bubble": 1 / 17,
    "zbv": 1 / 17,
    "dualpipev": 1 / 17,
}


@pytest.mark.parametrize("schedule", IDEALS)
def test_the_ideal_bubble_of_each_schedule(schedule: str) -> None:
    recipe = small_recipe(
        "float32",
        parallel=dict(pp=4),
        train=dict(global_batch=8, micro_batch=1),
        pipeline=dict(schedule=schedule),
        model=dict(n_layers=8),
    )
    orders = [dry_run_rank(recipe, rank=rank).actions for rank in range(4)]
    assert ideal_bubble(orders) == pytest.approx(IDEALS[schedule])


def test_an_ideal_needs_all_ranks_and_a_pipeline() -> None:
    recipe = small_recipe("float32", parallel=dict(pp=2), train=dict(micro_batch=2))
    assert dry_run(recipe, ranks=[1])["pipeline"]["bubble_fraction_ideal"] is None
    assert dry_run(small_recipe("float32"), ranks=[0])["pipeline"]["bubble_fraction_ideal"] is None


def test_ideal_bubbles_by_hand() -> None:
    def order(stage: int, *names: str) -> list[Action]:
        return [Action({"F": "forward", "B": "backward"}[name[0]], stage, int(name[1])) for name in names]

    # Two stages, one microbatch: F . . . B B  over  . F B B . .  is half idle.
    assert ideal_bubble([order(0, "F0", "B0"), order(1, "F0", "B0")]) == pytest.approx(1 / 2)
    one_of_two = [order(0, "F0", "F1", "B0", "B1"), order(1, "F0", "B0", "F1", "B1")]
    assert ideal_bubble(one_of_two) == pytest.approx(1 / 3)
    with pytest.raises(AssertionError, match="every rank waits"):
        ideal_bubble([order(0, "B0", "F0"), order(1, "F0", "B0")])


# ---- real steps ----------------------------------------------------------------------------------------------------


def timed_steps(recipe: Recipe) -> tuple[dict[str, Any], list[float], int]:
    mesh = build_mesh(recipe, "cpu")
    engine = NativeEngine(recipe, mesh=mesh, device=CPU)
    rows = rows_of_replica(recipe, mesh)
    seconds, waits = [], (dist.Work.wait, functional.wait_tensor)
    clock = Clock(recipe, CPU)
    timeline = Timeline(recipe, CPU, mesh=mesh, clock=clock)
    engine.observers += [timeline, clock]
    for number in range(3):
        run_step(engine, step := Step(number), lambda _: batch_of(recipe, rows))
        read_step(engine, step)
        seconds.append(step.seconds)
    assert (dist.Work.wait, functional.wait_tensor) == waits
    n_waits = len(timeline._steps[-1].waits)
    return timeline.sections(steps=range(3)), seconds, n_waits


@pytest.mark.parametrize(
    "sections",
    [
        dict(parallel=dict(dp_replicate=2)),
        dict(parallel=dict(dp_shard=2)),
        dict(parallel=dict(tp=2)),
        dict(parallel=dict(cp=2)),
        dict(parallel=dict(pp=2), train=dict(micro_batch=2)),
        dict(parallel=dict(pp=2, dp_shard=2), train=dict(micro_batch=2), pipeline=dict(schedule="interleaved-1f1b")),
    ],
    ids=lambda sections: "·".join(sections["parallel"]),
)
def test_the_parts_add_up_to_a_step(ranks: Ranks, sections: dict[str, Any]) -> None:
    recipe = small_recipe("float32", **sections)
    measured = ranks(recipe.world_size, timed_steps, recipe)
    parts, timeline = measured[0][0]["step_parts"], measured[0][0]["timeline"]
    assert all(result[0] == measured[0][0] for result in measured)  # every rank knows
    steps = list(zip(*(seconds for _, seconds, _ in measured), strict=True))
    assert any(sum(parts.values()) == pytest.approx(sum(step) / len(step), rel=1e-6) for step in steps)
    assert parts["compute_seconds"] > 0 and parts["communication_seconds"] > 0
    assert all(n_waits > 0 for *_, n_waits in measured)
    if recipe.parallel.pp == 1:
        assert (parts["idle_seconds"], timeline, measured[0][0]["bubble_fraction"]) == (0, None, None)
    else:
        assert parts["idle_seconds"] > 0 and 0 < measured[0][0]["bubble_fraction"] < 1


def test_alone_nothing_is_waited_for(ranks: Ranks) -> None:
    parts = ranks(1, timed_steps, small_recipe("float32"))[0][0]["step_parts"]
    assert parts["compute_seconds"] > 0 and parts["idle_seconds"] == 0


@pytest.mark.parametrize("schedule", IDEALS)
def test_the_timeline_is_a_pipeline(ranks: Ranks, schedule: str) -> None:
    """Each stage does each microbatch once, none before its neighbour, and no rank two things at a time."""
    recipe = small_recipe(
        "float32",
        parallel=dict(pp=2, dp_replicate=2),
        train=dict(micro_batch=1),
        pipeline=dict(schedule=schedule),
    )
    rows = ranks(4, timed_steps, recipe)[0][0]["timeline"]
    by_action = {(row["action"], row["stage"], row["microbatch"]): row for row in rows}
    assert len(by_action) == len(rows)
    assert {row["rank"] for row in rows} == {0, 2}  # of the first replica
    assert min(row["start_seconds"] for row in rows) == 0
    for stage in range(recipe.n_stages):
        for microbatch in range(recipe.n_microbatches):
            forward = by_action["forward", stage, microbatch]
            whole = by_action.get(("backward", stage, microbatch))
            backward = whole or by_action["backward_input", stage, microbatch]
            assert whole is not None or ("backward_weight", stage, microbatch) in by_action
            assert forward["end_seconds"] <= backward["start_seconds"]
            if stage > 0:
                assert by_action["forward", stage - 1, microbatch]["end_seconds"] <= forward["start_seconds"]
    for rank in (0, 2):
        mine = sorted((row["start_seconds"], row["end_seconds"]) for row in rows if row["rank"] == rank)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(mine))


def test_dry_runs_and_real_ranks_do_the_same_in_the_same_order(ranks: Ranks) -> None:
    recipe = small_recipe("float32", parallel=dict(pp=2), train=dict(micro_batch=2), pipeline=dict(schedule="zbv"))
    rows = ranks(2, timed_steps, recipe)[0][0]["timeline"]
    for rank in (0, 1):
        real = [Action(row["action"], row["stage"], row["microbatch"]) for row in rows if row["rank"] == rank]
        assert dry_run_rank(recipe, rank=rank).actions == real


# Two ranks of a pipeline, by hand: rank 0 works from 1 to 3 and from 5 to 8, rank 1 from 3 to 5. The window is 1 to 8.
HANDS = {
    0: dict(seconds=10.0, busy=[(1.0, 3.0), (5.0, 8.0)], waits=[(2.0, 2.5), (3.0, 5.0), (8.0, 9.0)]),
    1: dict(seconds=10.0, busy=[(3.0, 5.0)], waits=[(0.5, 3.0), (0.6, 2.9), (4.0, 4.25), (5.0, 9.0)]),
}


def by_hand() -> dict[str, Any]:
    recipe = small_recipe(parallel=dict(pp=2), train=dict(micro_batch=2))
    timeline = Timeline(recipe, CPU, mesh=build_mesh(recipe, "cpu"), clock=Clock(recipe, CPU))
    for number, scale in enumerate((1.0, 2.0, 3.0, 0.0)):  # of 10, 20, 30 and 0 s
        hand: Any = HANDS[dist.get_rank()]
        with timeline.step(step := Step(number)):
            timeline._step.actions = [
                (Action("forward", 0, i), start * scale, end * scale) for i, (start, end) in enumerate(hand["busy"])
            ]
            timeline._step.waits = [(start * scale, end * scale) for start, end in hand["waits"]]
            step.seconds = hand["seconds"] * scale
        timeline.read(step)
    return timeline.sections(steps=[0, 1, 2])


def test_parts_and_bubble_by_hand(ranks: Ranks) -> None:
    sections = ranks(2, by_hand)[0]
    # Of the step of 20 s. Rank 0: idle 2·2, exposed 2·(0.5 in an action, 1 after the window). Rank 1: idle 2·5, exposed
    # 2·(0.5 before the window, 0.25 in the action, 1 after it).
    assert sections["step_parts"] == pytest.approx(
        {
            "compute_seconds": (13.0 + 6.5) / 2,
            "communication_seconds": (3.0 + 3.5) / 2,
            "idle_seconds": (4.0 + 10.0) / 2,
        }
    )
    assert sections["bubble_fraction"] == pytest.approx(1 - (5 + 2) / (2 * 7))
    assert [(row["rank"], row["start_seconds"], row["end_seconds"]) for row in sections["timeline"]] == [
        *((0, 0.0, 4.0), (0, 8.0, 14.0)),
        (1, 4.0, 8.0),
    ]


# ---- runs ----------------------------------------------------------------------------------------------------------


def run(recipe: Recipe, out: str, compiled_in_step: int | None) -> dict[str, Any] | None:
    n_graphs = iter([7 + (i > 2 * (compiled_in_step or 99)) for i in range(100)])
    fake = mock.patch.object(torch_private, "n_compiled_graphs", lambda: next(n_graphs))
    with fake:
        return train_in_group(recipe, out=Path(out), device=CPU, profile=compiled_in_step is not None)


def test_steps_that_compile_or_profile_are_left_out_and_counted(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe("float32", parallel=dict(dp_replicate=2), train=dict(steps=9, parity=False))
    throughput = ranks(2, run, recipe, str(tmp_path), 6)[0]["throughput"]
    assert throughput["steps_left_out"] == {"warm-up": 3, "profile": 1, "compile": 1}
    assert throughput["steps_timed"] == 4
    assert sum(throughput["step_parts"].values()) > 0


def test_a_run_of_warm_up_alone_times_nothing(ranks: Ranks, tmp_path: Path) -> None:
    throughput = ranks(1, run, small_recipe("float32", train=dict(steps=3, parity=False)), str(tmp_path), None)[0][
        "throughput"
    ]
    assert (throughput["steps_timed"], throughput["steps_left_out"]) == (0, {"warm-up": 3})
    assert throughput["step_parts"] is None and throughput["step_seconds"]["median"] is None


def graphs_after_compiling() -> int:
    torch.compiler.reset()  # an earlier test may have compiled the same
    recipe = small_recipe("float32", train=dict(compile="aot_eager"))
    mesh = build_mesh(recipe, "cpu")
    model = assemble(recipe, mesh=mesh, device=CPU)
    before = torch_private.n_compiled_graphs()
    model.forward_backward(*batch_of(recipe, range(8)))
    return torch_private.n_compiled_graphs() - before


def test_compilations_are_noticed(ranks: Ranks) -> None:
    assert ranks(1, graphs_after_compiling)[0] > 0


def test_profile_writes_traces_with_named_spans(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "strategies/fsdp.toml")
    small = ["parallel.dp_shard=2", "model.n_layers=2", "train.seq_len=32", "train.steps=5", "train.parity=false"]
    settings = [part for setting in small for part in ("--set", setting)]
    assert main(["run", recipe, *settings, "--profile", "--out", str(tmp_path)]) == 0
    assert "ui.perfetto.dev" in capfd.readouterr().out
    for rank in (0, 1):
        path = tmp_path / f"fsdp/trace-rank-{rank}.json.gz"
        with gzip.open(path, "rt") as file:
            names = {event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"}
        assert {"step 4", "forward", "backward", "optimizer"} <= names
        assert {"gloo:all_gather", "gloo:all_reduce"} <= names
        assert parts_of_trace(path, pipeline="") is None  # no GPU
    assert main(["run", recipe, *settings, "--out", str(tmp_path)]) == 0
    assert not list((tmp_path / "fsdp").glob("trace-*"))  # an earlier run's


def test_parts_of_a_gpu_trace(tmp_path: Path) -> None:
    """As Kineto writes them, in microseconds: computing from 10 to 40, NCCL beside it and beyond, and a pipeline."""

    def event(category: str, name: str, start: float, end: float, group: str = "mesh_tp") -> dict[str, Any]:
        args = {"Process Group Description": group} if name.startswith("nccl") else {}
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "args": args}

    events = [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "name": "no category", "ts": 0, "dur": 1},
        event("user_annotation", "step 4", 0, 100),
        event("gpu_user_annotation", "step 4", 10, 90),
        event("kernel", "gemm", 10, 30),
        event("kernel", "flash", 20, 38),
        event("gpu_memcpy", "Memcpy DtoD", 38, 40),
        event("kernel", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 35, 50),
        event("kernel", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 45, 60),
        event("kernel", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 60, 90, group="mesh_pp"),
    ]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert parts_of_trace(tmp_path / "trace.json.gz", pipeline="mesh_pp") == pytest.approx((30e-6, 20e-6, 50e-6))
    # The same messages of a ring, or of an all-to-all, are communication.
    assert parts_of_trace(tmp_path / "trace.json.gz", pipeline="") == pytest.approx((30e-6, 50e-6, 20e-6))
