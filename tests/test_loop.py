"""The loop and who watches it: where a run begins, when it must end, what it keeps, and whom its time is billed to."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import CPU, batch_of, small_recipe
from ranks import Ranks

import parallel.measure.hardware as hardware
import parallel.training as training
from parallel.actions import Action
from parallel.batches import rows_of_replica
from parallel.engines.engine import run_step
from parallel.engines.native import NativeEngine
from parallel.measure import clock, journal
from parallel.measure.clock import Clock, busy_ticks
from parallel.measure.journal import Diverged, FiniteCheck, Journal
from parallel.measure.observer import Observer, Step, nested
from parallel.measure.record import Record
from parallel.mesh import build_mesh
from parallel.recipe import Recipe
from parallel.training import train_in_group
from parallel.transformer import Transformer, cross_entropy
from parallel.weights import load_initial_weights


def run_from(recipe: Recipe, out: str, first_step: int) -> dict[str, Any] | None:
    with mock.patch.object(hardware, "CEILING_SECONDS", 0.01):
        return train_in_group(recipe, out=Path(out), device=CPU, first_step=first_step)


def test_a_run_may_begin_at_any_step(ranks: Ranks, tmp_path: Path) -> None:
    """Tokens are those of its steps; warming up and what is counted go by the steps that this run does."""
    recipe = small_recipe(parallel=dict(dp_shard=2), train=dict(steps=9, parity=False))
    record = ranks(2, run_from, recipe, str(tmp_path), 5)[0]
    assert [step["step"] for step in record["steps"]] == [5, 6, 7, 8, 9]
    assert record["throughput"]["steps_left_out"] == {"warm-up": 3} and record["throughput"]["steps_timed"] == 2
    assert record["memory"]["step"] == 6 and record["traffic"]
    with torch.device("meta"):
        model = Transformer(recipe.model, seq_len=16, compute_dtype=torch.float64).double()
    load_initial_weights(model, recipe, CPU)
    tokens, targets = batch_of(recipe, range(8), step=4)
    assert record["steps"][0]["loss"] == pytest.approx(cross_entropy(model(tokens), targets).item() / 128, rel=1e-9)


def diverged(recipe: Recipe, out: str) -> str:
    with pytest.raises(Diverged) as error:
        run_from(recipe, out, 1)
    return str(error.value)


def test_a_run_that_diverges_ends_on_every_rank_with_the_step(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe("float32", parallel=dict(dp_shard=2), train=dict(steps=50, learning_rate=1e3, parity=False))
    reasons = ranks(2, diverged, recipe, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert None in (rows[-1]["loss"], rows[-1]["grad_norm"]) and not any(None in row.values() for row in rows[:-1])
    assert reasons[0] == reasons[1] and reasons[0].startswith(f"step {len(rows)} gave loss ")
    assert not (tmp_path / "record.json").exists()  # whoever started it records the failure, without a speed


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_what_is_no_finite_number_ends_the_run(loss: float, norm: float) -> None:
    with pytest.raises(Diverged, match=rf"step 7 gave loss {loss:g} and gradient norm {norm:g}"):
        do_step([FiniteCheck()], 7, loss=loss, norm=norm)
    do_step([FiniteCheck()], 8)


def test_steps_that_are_left_out_end_the_run_when_they_are_too_many_in_a_row() -> None:
    check = FiniteCheck(skips=True)
    with mock.patch.object(journal, "say") as said:
        for number in (*range(1, 11), *range(12, 22)):
            do_step([check], number, loss=math.nan, norm=math.nan)
            if number == 10:
                do_step([check], 11)
        with pytest.raises(Diverged, match="step 22 gave loss nan"):
            do_step([check], 22, loss=math.nan, norm=math.nan)
        with pytest.raises(Diverged, match="step 23 gave loss inf"):  # the weights have taken that step
            do_step([check], 23, loss=math.inf, norm=1.0)
    assert len(said.mock_calls) == 20 and "step 21 is left out: loss nan" in str(said.mock_calls[-1])


def do_step(observers: list[Observer], number: int, *, loss: float = 1.0, norm: float = 1.0) -> Step:
    """A step in which nothing is computed."""
    step = Step(number)
    with nested(observer.step(step) for observer in observers):
        step.loss, step.grad_norm, step.seconds = torch.tensor(loss), torch.tensor(norm), 0.25
    for observer in reversed(observers):
        observer.read(step)
    return step


class Listening(Observer):
    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        self.heard.append(f"{self.name} begins")
        try:
            yield
            if self.name == "bad":
                raise ValueError
        finally:
            self.heard.append(f"{self.name} ends")

    def read(self, step: Step) -> None:
        self.heard.append(f"{self.name} reads")


def test_observers_are_nested_as_they_are_listed_and_all_end_when_one_raises() -> None:
    heard: list[str] = []
    with pytest.raises(ValueError):
        do_step([Listening("a", heard), Listening("bad", heard), Listening("b", heard)], 1)
    assert heard == ["a begins", "bad begins", "b begins", "b ends", "bad ends", "a ends"]
    heard.clear()
    with pytest.raises(Diverged):
        do_step([Listening("a", heard), FiniteCheck(), Listening("b", heard)], 1, loss=math.nan)
    assert heard == ["a begins", "b begins", "b ends", "a ends", "b reads"]
    observer = Observer()
    with observer.step(Step(1)), observer.around(Action("forward", 0, 0)):
        observer.report(Record())


class Event:
    """One of CUDA's: the device comes to it at `when`, in seconds."""

    now = 0.0

    def __init__(self, when: float) -> None:
        self.when = when

    def query(self) -> bool:
        return Event.now >= self.when

    def synchronize(self) -> None:
        Event.now = max(Event.now, self.when)

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.when - self.when)


def test_a_device_s_steps_are_where_its_own_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host queues the first at once, the second while that runs; then it is late, and so is the device."""
    watch, steps = Clock(small_recipe(), CPU), [Step(number) for number in range(1, 5)]
    queued, on_device = (0.0, 1.0, 2.0, 9.0), ((0.0, 3.0), (3.0, 5.0), (5.0, 6.0), (9.0, 11.0))
    events = iter([Event(when) for ends in on_device for when in ends])
    monkeypatch.setattr(clock.time, "time", lambda: Event.now)
    monkeypatch.setattr(Clock, "_event", lambda self: next(events))
    for i, step in enumerate(steps):
        Event.now = max(Event.now, queued[i])
        with watch.step(step):
            pass
        if i:
            watch.read(steps[i - 1])  # a step later, for the third when it has long been over
    watch.read(steps[-1])
    assert [(step.began, step.began + step.seconds) for step in steps] == [*on_device]


def late(recipe: Recipe, out: str, unread: int) -> str | None:
    """With so many steps queued before one is read; and how it ended, if that was not well."""
    with mock.patch.dict(training.UNREAD_STEPS, cpu=unread):
        try:
            run_from(recipe, out, 1)
        except Diverged as error:
            return str(error)
    return None


def test_a_step_that_is_read_when_the_next_is_queued_is_the_same(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe(
        parallel=dict(dp_shard=2), train=dict(steps=5, parity=False), checkpoint=dict(every=2, keep=3)
    )
    wild = small_recipe("float32", train=dict(steps=50, learning_rate=1e3, parity=False), checkpoint=dict(every=1))
    found = {}
    for unread in (0, 1):
        out, diverging = tmp_path / f"{unread}", tmp_path / f"wild{unread}"
        for folder in (out, diverging):
            folder.mkdir()
        assert ranks(2, late, recipe, str(out), unread) == [None, None]
        [reason] = ranks(1, late, wild, str(diverging), unread)
        rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
        saved = {path.relative_to(out): path.read_bytes() for path in out.glob("checkpoints/*/part-*")}
        good = sorted(folder.name for folder in diverging.glob("checkpoints/step-*"))
        found[unread] = [(row["step"], row["loss"], row["grad_norm"]) for row in rows], saved, reason, good
    assert found[0] == found[1]
    rows, saved, reason, good = found[1]
    assert [step for step, *_ in rows] == [1, 2, 3, 4, 5] and len(saved) == 6
    assert reason is not None and good and f"step {int(good[-1][5:]) + 1} gave" in reason


class Slow(Observer):
    """Reports for a hundred seconds, by a clock that stands still otherwise."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        yield
        self.clock[0] += 100.0


def test_what_is_reported_after_a_step_is_not_billed_to_the_next() -> None:
    now = [0.0]
    watch = Clock(small_recipe(), CPU)
    with mock.patch.object(Clock, "_now", lambda self: (now[0], now[0])):
        seconds = []
        for number in range(1, 4):
            step = Step(number)
            with nested(observer.step(step) for observer in (Slow(now), watch)):
                now[0] += number
            seconds.append(step.seconds)
    assert seconds == [1.0, 2.0, 3.0] and now[0] == 306.0


def test_what_others_take_is_counted_on_the_cores_of_this_process_alone() -> None:
    stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 800 900 8 16 32 5 5\ncpu1 100 0 0 7 7 0 0 0 0 0\nintr 1 2\n"
    assert busy_ticks(stat, {0}) == 63  # idle and waiting for a disk are not in it, a hypervisor's share is
    assert busy_ticks(stat, {0, 1}) == 163 and busy_ticks("", {0}) == 0


def crowded(ticks: float) -> float | None:
    """What a run of five steps says, if the cores were busy for so many seconds a step; it used none of them."""
    record, times = Record(), iter([*range(100)])
    watch = Clock(small_recipe(), CPU)
    with (
        mock.patch.object(Clock, "_now", lambda self: (next(times), 0.0)),
        mock.patch.object(Clock, "_busy_seconds", lambda self, seen=[0.0]: seen.append(seen[-1] + ticks) or seen[-1]),
    ):
        for number in range(1, 6):
            do_step([watch], number)
        watch.report(record)
    return record.throughput.cores_used_by_others


def test_a_busy_machine_is_in_the_record(ranks: Ranks) -> None:
    assert ranks(1, crowded, 1.5) == [1.5]  # steps of one second
    assert ranks(1, crowded, 0.0) == [None]  # where nobody counts


def long_run(out: str, n_steps: int) -> tuple[list[int], int, dict[str, Any], int]:
    """With room for eight steps in the record, and the time of the last five."""
    record = Record()
    with mock.patch.object(journal, "KEPT_STEPS", 8), mock.patch.object(clock, "KEPT_STEPS", 5):
        book, watch = Journal(Path(out) / "steps.jsonl"), Clock(small_recipe(), CPU)
        for number in range(1, n_steps + 1):
            do_step([book, watch], number)
            watch.leave_out(number, "odd") if number % 2 else None
        book.report(record)
        watch.report(record)
    kept = len(watch._steps) + len(watch._left_out)
    return [row["step"] for row in record.steps], len(book._rows), record.as_json()["throughput"], kept


def test_a_long_run_keeps_few_steps_in_memory_and_all_of_them_in_its_file(ranks: Ranks, tmp_path: Path) -> None:
    [(steps, n_rows, speed, kept)] = ranks(1, long_run, str(tmp_path), 100)
    assert steps == [1, 17, 33, 49, 65, 81, 97, 100] and n_rows <= 8 and kept <= 10
    assert speed["steps_timed"] == 3 and speed["steps_left_out"] == {"odd": 2}  # of 96 to 100
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 100
    assert ranks(1, long_run, str(tmp_path), 3)[0][0] == [1, 2, 3]


def states(recipe: Recipe) -> tuple[set[str], set[str], bool]:
    """Names in the engine's state before and after a step, and whether the step has changed every parameter."""
    mesh = build_mesh(recipe, "cpu")
    engine = NativeEngine(recipe, mesh=mesh, device=CPU)
    before = {name: value.detach().clone() for name, value in engine.state().items()}
    run_step(engine, Step(1), lambda number: batch_of(recipe, rows_of_replica(recipe, mesh)))
    after = engine.state()
    return set(before), set(after), all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "sections",
    [
        dict(parallel=dict(tp=2), recompute=dict(mode="sqrt")),
        dict(parallel=dict(cp=2), recompute=dict(mode="full")),
        dict(parallel=dict(dp_replicate=2), recompute=dict(mode="selective")),
        dict(parallel=dict(pp=2), train=dict(micro_batch=2), model=dict(tied_embeddings=True)),
    ],
    ids=lambda sections: "·".join(sections["parallel"]),
)
def test_an_engine_s_state_is_all_that_a_step_changes_under_the_names_of_the_whole_model(
    ranks: Ranks, sections: dict[str, Any]
) -> None:
    """Whatever a strategy has put in place of a module or of what it runs."""
    recipe = small_recipe(**sections)
    with torch.device("meta"):
        whole = {name for name, _ in Transformer(recipe.model, seq_len=16).named_parameters()}
    answers = ranks(2, states, recipe)
    for before, after, changed in answers:
        assert changed and after == before | {
            f"{name}.{key}" for name in before for key in ("exp_avg", "exp_avg_sq", "step")
        }
    assert set.union(*(before for before, *_ in answers)) == whole
