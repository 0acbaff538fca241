"""A dry run priced operator by operator: by hand, against what schedules are known for, and against the closed form."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from layouts import small_recipe

from launch.cli import main
from launch.compare import is_comparison
from parallel.actions import Action
from parallel.dryrun import dry_run_rank
from parallel.foresight.clusters import load_cluster
from parallel.foresight.constants import CONSTANTS, values_of
from parallel.foresight.operators import own_bytes, own_operators
from parallel.foresight.prediction import Prediction, predict
from parallel.foresight.price import FIXED_SECONDS, Rates
from parallel.foresight.replay import Done, Walk, makespan, played
from parallel.foresight.workload import of_recipe
from parallel.kinds import alike_in_pipeline, priced_ranks
from parallel.measure.tape import Begin, End, Event, Mark, Message, Operator, Wait
from parallel.measure.timeline import UNITS, ideal_bubble
from parallel.recipe import SCHEDULES, ContextMethod, Recipe, Schedule, load_recipe, read_toml
from parallel.strategies.pipeline import schedule_orders

RECIPES = Path(__file__).parents[1] / "recipes"
H100 = load_cluster("h100")
H100 = dataclasses.replace(H100, device=dataclasses.replace(H100.device, matmul_float32_tflops=51.0))

# ---- by hand -------------------------------------------------------------------------------------------------------

# A byte takes a second, through memory and through a link, and nothing else takes time; what overlaps costs nothing.
UNIT = Rates(
    **dict.fromkeys(("matmul_flops", "attention_gain", "wave_elements"), 1.0),
    memory_bytes_per_s=1 / 0.8,
    node_ranks=8,
    **dict.fromkeys(("inside_bytes_per_s", "across_bytes_per_s", "operator_share", "data_hidden"), 1.0),
    **dict.fromkeys(("inside_seconds", "across_seconds", "launch_seconds", "launches", "logit_bytes"), 0.0),
    **dict.fromkeys(("tensor_hidden", "pipeline_hidden"), 0.0),
)
ONES = dict.fromkeys(CONSTANTS, 1.0)


def operator(seconds: int, stream: int = 0) -> Operator:
    return Operator(stream, "bytes", n_bytes=seconds)


def gather(seconds: int, point: int, *, stream: int = 1, blocks: bool = True) -> Message:
    """Among two ranks each half is sent once."""
    return Message(stream, "dp_shard", "all_gather", 2 * seconds, 2, 1, point, blocks)


def seconds_of(*tape: Event, rates: Rates = UNIT, **constants: float) -> dict[str, float]:
    """By part, those of a part that takes more than the latency of a link."""
    parts = played(tape, rates, ONES | constants).parts
    parts["optimizer"] -= FIXED_SECONDS
    return {name: round(seconds, 4) for name, seconds in parts.items() if seconds > 1e-4}


def test_a_message_travels_while_two_operators_run() -> None:
    tape = gather(6, 1), Mark(1, 2), operator(10), operator(4), Wait(0, 2), operator(3)
    assert seconds_of(*tape) == {"other_operators": 17}
    # They share memory and multiprocessors: a quarter of the time that both take is lost.
    assert seconds_of(*tape, overlap=0.75) == {"other_operators": 17, "data_messages": 1.5}


def test_of_a_message_longer_than_its_window_the_rest_is_exposed() -> None:
    tape = gather(30, 1), Mark(1, 2), operator(10), operator(4), Wait(0, 2), operator(3)
    assert seconds_of(*tape) == {"other_operators": 17, "data_messages": 16}
    assert seconds_of(*tape, overlap=0.75) == {"other_operators": 17, "data_messages": 16 + 3.5}


def test_a_message_that_its_own_stream_waits_for_is_exposed_and_those_of_a_group_follow_each_other() -> None:
    assert seconds_of(operator(2), gather(5, 1, stream=0), operator(2)) == {"other_operators": 4, "data_messages": 5}
    both = gather(5, 1), gather(5, 2), operator(1), Wait(0, 2)
    assert seconds_of(*both) == {"other_operators": 1, "data_messages": 9}


def test_an_operator_starts_when_the_host_has_come_to_it() -> None:
    rates = dataclasses.replace(UNIT, launch_seconds=2.0)
    # The host gives them out at 2, 4, 6 and 8; the third waits for the second, of 5 seconds, and the last for it.
    tape = operator(1), operator(5), operator(1), operator(1)
    assert seconds_of(*tape, rates=rates) == {"other_operators": 8, "launches": 3}
    assert seconds_of(*tape, Operator(0, "view"), rates=rates) == {"other_operators": 8, "launches": 3}


def test_products_and_attention_take_their_flops() -> None:
    rates = dataclasses.replace(UNIT, memory_bytes_per_s=1e9, wave_elements=0.0)
    product = Operator(0, "product", (3, 2, 5, 7), 2)
    assert seconds_of(product, rates=rates) == {"products": 2 * 3 * 2 * 5 * 7}
    attention = Operator(0, "attention", (2, 512, 512, 128, 1), 2)
    assert seconds_of(attention, rates=rates) == {"attention": 2 * 4 * 2 * 512 * 512 * 128 / 2}


def test_the_messages_of_stages_are_left_to_the_whole_pipeline() -> None:
    action = Action("forward", 0, 0)
    received = Message(0, "pp", "recv", 100, 2, 1, 1, False)
    tape = operator(1), received, Begin(action), operator(2), Wait(0, 1), End(action), operator(3)
    one = played(tape, UNIT, ONES)
    assert one.actions == ((action, pytest.approx(2.0), 0.0),)
    assert one.around == pytest.approx(4.0 + FIXED_SECONDS)


# ---- pipelines -----------------------------------------------------------------------------------------------------


def piped(schedule: str, pp: int = 4, m: int = 8) -> Recipe:
    return small_recipe(
        "float32",
        parallel=dict(pp=pp),
        train=dict(global_batch=m, micro_batch=1),
        pipeline=dict(schedule=schedule),
        model=dict(n_layers=8),
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_alike_make_the_bubble_of_the_schedule(schedule: Schedule) -> None:
    """tests/test_timeline.py holds the same against the literature."""
    orders = schedule_orders(piped(schedule))
    ends, waited = makespan([[Done(it, float(UNITS[it.name])) for it in order] for order in orders], hop=0.0)
    busy = sum(UNITS[it.name] for order in orders for it in order)
    assert 1 - busy / (len(orders) * max(ends)) == pytest.approx(ideal_bubble(orders))
    assert waited == [0.0] * 4


def test_a_pipeline_with_messages_by_hand() -> None:
    """Of two stages and one microbatch: forward, message, forward and backward, message, backward."""
    steps = ("forward", 1.0), ("backward", 2.0)
    orders = [[Done(Action(name, stage, 0), seconds) for name, seconds in steps] for stage in (0, 1)]
    assert makespan(orders, hop=0.5) == ([7.0, 4.5], [0.5, 0.5])
    # What the first rank does meanwhile costs nothing until it takes longer than the second's turn: from 1 to 5.
    for before, end in ((3.0, 7.0), (5.0, 8.0)):
        orders[0][1] = orders[0][1]._replace(before=before)
        assert makespan(orders, hop=0.5)[0][0] == end


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-zero-bubble", "dualpipev"])
def test_orders_are_those_of_a_dry_run(schedule: Schedule) -> None:
    recipe = piped(schedule, pp=2, m=4)
    assert schedule_orders(recipe)[1] == dry_run_rank(recipe, rank=1).actions


def test_ranks_that_are_alike_are_taped_once() -> None:
    assert alike_in_pipeline(piped("1f1b")) == [0, 1, 1, 3]
    assert alike_in_pipeline(small_recipe("float32")) == [0]


# ---- tapes of recipes ----------------------------------------------------------------------------------------------


def walked(recipe: Recipe) -> Walk:
    recipe = H100.would_run(recipe)
    tapes = {place: dry_run_rank(recipe, rank=rank, taped=True).tape for place, rank in priced_ranks(recipe).items()}
    return Walk(tapes, alike_in_pipeline(recipe), schedule_orders(recipe) if recipe.parallel.pp > 1 else ())


def test_a_tape_has_a_block_as_a_device_would_run_it() -> None:
    """Seven products and their 14 gradients, attention each way; the norms are one operator each."""
    few, many = (
        Counter(event.kind for event in dry_run_rank(recipe, rank=0, taped=True).tape if isinstance(event, Operator))
        for recipe in (small_recipe("float32", model=dict(n_layers=n), train=dict(device="cuda")) for n in (2, 3))
    )
    block = many - few
    assert (block["product"], block["attention"], block["attention_backward"]) == (21, 1, 1)
    counted = own_operators(of_recipe(small_recipe("float32")))
    n_updates = 27
    assert block.total() == counted.forward + counted.backward - 9 + n_updates  # gradients that are there are added to


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", get_args(ContextMethod))
def test_operators_and_bytes_of_context_parallelism_are_those_of_its_busiest_rank(method: str, dtype: str) -> None:
    counts, n_bytes = [], []
    for n_layers in (1, 2):
        model, train = dict(n_layers=n_layers, n_heads=8, n_kv_heads=2, d_model=256), dict(device="cuda", seq_len=256)
        recipe = small_recipe(dtype, model=model, train=train, parallel=dict(cp=4), context=dict(method=method))
        tape = dry_run_rank(recipe, rank=priced_ranks(recipe)[0], taped=True).tape
        operators = [event for event in tape if isinstance(event, Operator) and not event.updates]
        counts.append(len(operators) + sum(isinstance(event, Message) and event.dim == "cp" for event in tape))
        n_bytes.append(sum(event.n_bytes for event in operators))
    work = of_recipe(recipe)
    block, operators = own_bytes(work, tokens=work.micro_batch * 64), own_operators(work)
    assert n_bytes[1] - n_bytes[0] == pytest.approx(block.forward + block.backward, rel=0.02)
    moved_into_buckets = 18 - 9
    assert counts[1] - counts[0] == pytest.approx(operators.forward + operators.backward + moved_into_buckets, abs=6)


def test_fsdp_gathers_the_next_block_while_this_one_computes() -> None:
    """So two blocks more add messages, but none that is waited for."""
    rates, seconds, exposed = dataclasses.replace(UNIT, matmul_flops=1e3, inside_bytes_per_s=10.0), [], []
    for n_layers in (2, 4):
        sections = {"model": dict(n_layers=n_layers), "train": dict(seq_len=1024, global_batch=2)}
        tape = walked(small_recipe("bfloat16", parallel=dict(dp_shard=2), **sections)).tapes[0]
        messages = [event for event in tape if isinstance(event, Message) and event.n_bytes > 8]
        # Blocks and embedding are gathered twice, norm and output once; all are reduced.
        assert [event.collective for event in messages].count("all_gather") == 2 * (n_layers + 1) + 1
        assert all(event.blocks and event.stream != 0 for event in messages)
        seconds.append(sum(event.n_bytes / 2 / 10 for event in messages))
        exposed.append(played(tape, rates, ONES).parts["data_messages"])
    assert exposed[1] == pytest.approx(exposed[0], abs=1e-3) and seconds[1] > 1.3 * seconds[0] > exposed[0]


def test_who_tapes_counts_the_same() -> None:
    recipe = small_recipe("bfloat16", parallel=dict(dp_replicate=2, dp_shard=2), model=dict(n_layers=2))
    plain, taped = (dry_run_rank(recipe, rank=1, taped=taped) for taped in (False, True))
    assert plain.tape == () and plain == taped._replace(tape=())


def test_a_walk_is_the_same_in_whatever_order_its_tapes_come() -> None:
    walk = walked(piped("1f1b"))
    rates, constants = H100.rates("float32"), values_of("hopper")
    backwards = dataclasses.replace(walk, tapes=dict(reversed(walk.tapes.items())))
    parts = walk.seconds(rates, constants, hop=1e-5)
    assert parts == backwards.seconds(rates, constants, hop=1e-5)
    assert all(seconds >= 0 for seconds in parts.values()) and parts["bubble"] > 0


# ---- against the closed form ---------------------------------------------------------------------------------------

SHIPPED = sorted(
    path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml") if not is_comparison(read_toml(path))
)
# One of each kind in CI.
SAMPLE = (
    *("vocabulary.toml", "strategies/fsdp-bf16.toml", "strategies/cp-ring.toml", "strategies/tp-sp.toml"),
    *("strategies/pp-1f1b.toml", "mixes/fsdp-tp.toml"),
)
FEWER = {"large/llama3-70b.toml": ["train.global_batch=128"]}  # of 64 microbatches 16: all are alike


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SAMPLE)) for name in SHIPPED]
)
def test_the_closed_form_agrees_with_the_operators(name: str) -> None:
    prediction = both(load_recipe(RECIPES / name, FEWER.get(name, [])))
    assert prediction.method == "operators of a dry run"
    assert prediction.closed_form_seconds == pytest.approx(prediction.step_seconds, rel=0.05)


def both(recipe: Recipe) -> Prediction:
    return predict(recipe, H100, walked(recipe))


def test_they_agree_where_a_device_is_busy() -> None:
    """Layers of Llama 3 8B, sharded."""
    settings = ["model.n_layers=4", "train.global_batch=8"]
    prediction = both(load_recipe(RECIPES / "large/llama3-8b-fsdp.toml", settings))
    assert prediction.closed_form_seconds == pytest.approx(prediction.step_seconds, rel=0.05)
    assert prediction.seconds_of("products", "attention") > 0.6 * prediction.step_seconds


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.toml"
    file.write_text('name = "small"\n[model]\npreset = "tiny"\nn_layers = 2\n[train]\ndtype = "bfloat16"\n')
    assert main(["dry-run", str(file), "--cluster", "h100", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    record: dict[str, Any] = json.loads((tmp_path / "small" / "record.json").read_text())
    foretold, seconds = record["prediction"], record["throughput"]["step_seconds"]["median"]
    assert foretold["method"] == "operators of a dry run" and "foretold for h100, by operators of a dry run" in printed
    assert f"closed form: {foretold['closed_form_seconds']:.4g} s" in printed
    assert sum(term["seconds"] for term in foretold["terms"]) == pytest.approx(seconds)
    assert foretold["low_seconds"] < seconds < foretold["high_seconds"]
    compiled = ["--set", 'train.compile="inductor"', "--json"]
    assert main(["dry-run", str(file), "--cluster", "h100", *compiled]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["method"].startswith("closed form")
