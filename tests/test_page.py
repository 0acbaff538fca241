"""The page, in a real headless Chromium without a network: what it shows, and what it never does."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from results import GPU, Record, complete_record, empty_record, memory, months

from launch.cli import main
from launch.page import find_records, page_data, page_html, write_page
from parallel.measure.record import write_record

CHARTS = ("utilisation", "speed", "memory", "traffic", "step", "loss", "bubble", "timeline")
READY = "html[data-ready=true]"  # every part is drawn
GENTLE = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
Open = Callable[..., Page]


# ---- records -------------------------------------------------------------------------------------------------------


def pipelined(record: Record) -> Record:
    """With a bubble and the timeline of two microbatches over its stages."""
    timeline, stages = [], record["layout"]["pp"]
    for rank in range(stages):
        for microbatch in range(2):
            forward = 0.01 * (rank + microbatch)
            backward = 0.01 * (2 * stages - rank + 2 * microbatch + 1)
            for action, start, length in (("forward", forward, 0.01), ("backward", backward, 0.02)):
                times = {"start_seconds": 5.0 + start, "end_seconds": 5.0 + start + length}
                timeline.append({"rank": rank, "stage": rank, "microbatch": microbatch, "action": action, **times})
    record["pipeline"] = {"bubble_fraction": 0.31, "bubble_fraction_ideal": 0.2, "timeline": timeline}
    return record


def complete_comparison() -> dict[str, Record]:
    """Six measured runs, three that were not to be, and the dry run of one."""
    found = {
        "single": complete_record("single"),
        "fsdp": complete_record("fsdp", 1.5, dp_shard=4),
        "fsdp-tp": complete_record("fsdp-tp", 2.0, dp_shard=2, tp=2),
        "pp-1f1b": pipelined(complete_record("pp-1f1b", 1.25, pp=2)),
        "wrong": complete_record("wrong", 1.1, dp_replicate=4),
        "unmeasured": empty_record("unmeasured", dp_shard=2),
    }
    found["wrong"]["parity"] |= {"max_rel_grad_diff": 0.75, "passed": False}
    for status, reason in (
        ("refused", "parallel.tp = 3: does not divide model.n_heads = 8"),
        ("oom", "rank 3 ran out of memory: 80 GiB in use"),
        ("timeout", "not done in 600 s"),
    ):
        found[status] = empty_record(status) | {"status": status, "reason": reason}
    found["dry/fsdp"] = complete_record("fsdp", dp_shard=4) | {"kind": "dry-run", "memory": memory(4, 2**20)}
    return found


# ---- the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=GENTLE)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of some records. Afterwards: nothing was asked of anyone, nothing said on the console."""
    contexts, said, asked = [], [], []

    def open_(records: dict[str, Record], *, hash: str = "", width: int = 1280, dark: bool = False) -> Page:
        shutil.rmtree(tmp_path / "results", ignore_errors=True)  # of another page of this test
        for folder, record in records.items():
            path = tmp_path / "results" / folder / "record.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_record(path, record)
        file = tmp_path / "page.html"
        assert write_page(tmp_path / "results", file) == len(records)
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri() + hash)
        page.wait_for_selector(READY)
        return page

    yield open_
    for context in contexts:
        context.close()
    if not contexts:
        return
    assert said == []
    assert {url.partition("#")[0] for url in asked} == {(tmp_path / "page.html").as_uri()}


def table_rows(table: Locator) -> list[dict[str, Any]]:
    """{head: number as it was measured, or text} of each row; None for what is shown as not measured."""
    rows: list[dict[str, Any]] = table.evaluate(
        """table => {
            const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
            const rows = [...table.tBodies].flatMap(body => [...body.rows]).filter(row => row.cells.length > 1);
            return rows.map(row => Object.fromEntries(
                [...row.cells].map((cell, i) => [heads[i], cell.classList.contains("null") ? null :
                    cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent])));
        }"""
    )
    return rows


def numbers_of(page: Page, chart: str) -> list[dict[str, Any]]:
    page.wait_for_selector(READY)
    numbers = page.locator(f"#chart-{chart} details")
    numbers.evaluate("details => details.open = true")  # it is filled when it is opened
    return table_rows(numbers.locator("table"))


def names_in_table(page: Page) -> list[str]:
    page.wait_for_selector(READY)
    return page.locator("#runs tbody tr[data-id] th").all_text_contents()


def found_in(page: Page) -> list[str]:
    """The sentences at the beginning."""
    page.wait_for_selector(READY)
    return [text.strip() for text in page.locator("#findings li").all_text_contents()]


# ---- charts --------------------------------------------------------------------------------------------------------


def test_every_chart_is_drawn_named_and_explained(open_page: Open) -> None:
    page = open_page(complete_comparison())
    for chart in CHARTS:
        drawing = page.locator(f"#chart-{chart} .drawing svg")
        expect(drawing).to_have_attribute("role", "img")
        assert drawing.locator("> title").text_content()
        assert drawing.locator("> desc").text_content()
        assert drawing.locator("rect, path, circle").count() > 0


def test_utilisation_shows_the_flops_of_each_record(open_page: Open) -> None:
    records = complete_comparison()
    page = open_page(records)
    rows = {row["run"]: row for row in numbers_of(page, "utilisation")}
    for name in ("single", "fsdp", "fsdp-tp", "pp-1f1b"):
        flops = records[name]["flops"]
        assert rows[name]["MFU, % of peak"] == pytest.approx(100 * flops["mfu"])
        assert rows[name]["MFU causal, %"] == pytest.approx(100 * flops["mfu_causal"])
        assert rows[name]["HFU, %"] == pytest.approx(100 * flops["hfu"])
        assert rows[name]["ceiling, %"] == pytest.approx(80.0)
        assert rows[name]["executed FLOPs per token"] == flops["hardware_flops_per_token"]
        assert rows[name]["source of the peak"] == "datasheet of the device"
    assert rows["unmeasured"]["MFU, % of peak"] is None
    assert "refused" not in rows


def test_a_measured_peak_is_the_ceiling(open_page: Open) -> None:
    record = complete_record("shared-cores")
    record["flops"] |= {
        "peak_flops": 5e10,
        "matmul_ceiling_flops": 1e11,
        "peak_source": "measured: x 0.5, as 4 share 2",
    }
    [row] = numbers_of(open_page({"shared-cores": record}), "utilisation")
    assert (row["ceiling, %"], row["measured ceiling, FLOP/s"]) == (100, 1e11)


def test_speed_has_its_spread_and_bars_of_its_size(open_page: Open) -> None:
    page = open_page(complete_comparison())
    rows = {row["run"]: row for row in numbers_of(page, "speed")}
    for name, factor in (("single", 1.0), ("fsdp", 1.5), ("fsdp-tp", 2.0)):
        assert rows[name]["tokens/s"] == pytest.approx(512 / factor)
        assert rows[name]["slow steps (p90), tokens/s"] == pytest.approx(512 / factor * 0.25 / 0.4)
        assert rows[name]["fast steps (p10), tokens/s"] == pytest.approx(512 / factor * 0.25 / 0.2)
        assert rows[name]["step median, s"] == pytest.approx(0.25 * factor)
    widths = page.locator("#chart-speed .drawing rect").evaluate_all("bars => bars.map(bar => bar.width.baseVal.value)")
    known = [row["tokens/s"] for row in rows.values() if row["tokens/s"] is not None]
    assert [width / widths[0] for width in widths] == pytest.approx([value / known[0] for value in known], rel=1e-3)


def test_a_step_that_was_foretold_is_laid_beside_the_measured_one(open_page: Open) -> None:
    """Two rows, by CPU seconds: 0.5 and 0.75 were measured."""
    records = {"alone": complete_record("alone"), "fsdp": complete_record("fsdp", 1.5, dp_shard=4)}
    assert open_page(records).locator("#chart-foretold").count() == 0
    for record, seconds in zip(records.values(), (0.55, 0.6), strict=True):
        record["prediction"] = {"cluster": "desk", "step_seconds": 9.0, "cpu_seconds_per_step": seconds}
    for dark in (False, True):
        page = open_page(records, dark=dark)
        figure = page.locator("#chart-foretold")
        about = figure.locator("figcaption")
        expect(about).to_contain_text("CPU seconds of a step, of all ranks")
        expect(about).to_contain_text("for the cluster desk. Off by 15 % in the mean of 2 rows, at most 20 %.")
        assert [label for label in figure.locator("svg text").all_text_contents() if "%" in label] == [
            "+10.0 %",
            "−20.0 %",
        ]
        bars = [float(bar.get_attribute("width") or 0) for bar in figure.locator(".drawing rect").all()]
        assert [bar / bars[0] for bar in bars] == pytest.approx([1, 1.1, 1.5, 1.2], abs=0.01)
    head = page.locator("#runs thead th")
    assert [text for text in head.all_text_contents() if text in ("foretold\ns", "off\n%")] == ["foretold\ns", "off\n%"]
    expect(page.locator("#legend")).to_contain_text("Foretold: a step by a closed form")


def test_memory_lays_measured_beside_predicted(open_page: Open) -> None:
    page = open_page(complete_comparison())
    rows = [row for row in numbers_of(page, "memory") if row["run"] == "fsdp"]
    assert [row["figure"] for row in rows] == [
        *("measured, largest rank", "predicted, largest rank"),
        *("measured, smallest rank", "predicted, smallest rank"),
    ]
    for row, (rank, unit) in zip(rows, ((3, 1.5), (3, 1.0), (0, 1.5), (0, 1.0)), strict=True):
        assert row["rank"] == rank
        assert row["peak, MiB"] == pytest.approx(15 * unit * (rank + 1))
        assert row["optimizer, MiB"] == pytest.approx(3 * unit * (rank + 1))
    others = [row["figure"] for row in numbers_of(page, "memory") if row["run"] == "fsdp-tp"]
    assert others == ["measured, largest rank", "measured, smallest rank"]
    about = page.locator("#chart-memory figcaption p")
    expect(about).to_contain_text("Peak in step 2")
    expect(about).to_contain_text("1 run has a prediction: 0 equal to the byte, the furthest off by 33.3 %.")


def test_a_prediction_is_equal_to_the_byte_or_said_not_to_be(open_page: Open) -> None:
    records = {}
    for name in ("exact", "near"):
        records[f"measured/{name}"] = complete_record(name, dp_shard=4)
        records[f"dry/{name}"] = complete_record(name, dp_shard=4) | {"kind": "dry-run"}
    page = open_page({name: record for name, record in records.items() if "near" not in name})
    for chart in ("memory", "traffic"):
        expect(page.locator(f"#chart-{chart} figcaption")).to_contain_text("it is equal to the byte")
    records["measured/near"]["memory"]["per_rank"][0]["peak_bytes"] += 1
    records["measured/near"]["traffic"][0]["mesh_dim"] = "dp_replicate"
    page = open_page(records)
    expect(page.locator("#chart-memory figcaption")).to_contain_text("1 equal to the byte, the furthest off by 0")
    expect(page.locator("#chart-traffic figcaption")).to_contain_text("1 equal to the byte, the furthest off in what")


def test_a_dry_run_of_another_recipe_predicts_nothing() -> None:
    record = complete_record("fsdp", dp_shard=4)
    for other in (complete_record("fsdp", dp_shard=2), complete_record("other", dp_shard=4)):
        data = page_data([("a/fsdp", record), ("b/fsdp", other | {"kind": "dry-run"})])
        assert data["runs"][0]["predicted"] is None
    old, new = (complete_record("fsdp", factor, dp_shard=4) | {"kind": "dry-run"} for factor in (1.0, 2.0))
    new["environment"]["time_utc"], old["environment"]["time_utc"] = "2026-01-02", "2026-01-01"
    for order in ((old, new), (new, old)):
        data = page_data([("a/fsdp", record), *((f"{i}/fsdp", dry) for i, dry in enumerate(order))])
        assert data["runs"][0]["predicted"]["memory"]["largest"]["peak_bytes"] == 15 * 2 * 2**20 * 4


def test_a_dry_run_of_one_rank_is_no_largest_rank(open_page: Open) -> None:
    dry = complete_record("fsdp", dp_shard=4) | {"kind": "dry-run"}
    dry["memory"] |= {"per_rank": dry["memory"]["per_rank"][1:2], "max_peak_bytes": None, "min_peak_bytes": None}
    page = open_page({"a/fsdp": complete_record("fsdp", dp_shard=4), "b/fsdp": dry})
    figures = [(row["figure"], row["rank"]) for row in numbers_of(page, "memory")]
    assert figures[-1] == ("predicted, rank 1, others unknown", 1) and len(figures) == 3
    expect(page.locator("#chart-memory figcaption")).not_to_contain_text("to the byte")


def test_traffic_lays_measured_beside_predicted(open_page: Open) -> None:
    records = complete_comparison()
    sent = {"mesh_dim": "cp", "collective": "send", "calls": 7, "bytes_per_rank": 2**21}
    records["dry/fsdp"]["traffic"] = [*records["dry/fsdp"]["traffic"][:2], sent]
    rows = [row for row in numbers_of(open_page(records), "traffic") if row["run"] == "fsdp"]
    assert [list(row.values())[1:] for row in rows] == [
        ["dp_shard", "all_gather", 18, 9, 18, 6],
        ["dp_shard", "reduce_scatter", 9, 3, 9, 3],
        ["tp", "all_reduce", 40, 1, None, None],
        ["cp", "send", None, None, 7, 2],
    ]


def test_traffic_steps_parity_and_bubble(open_page: Open) -> None:
    records = complete_comparison()
    page = open_page(records)
    traffic = [row for row in numbers_of(page, "traffic") if row["run"] == "fsdp"]
    assert [(row["mesh dimension"], row["collective"], row["calls per step"]) for row in traffic] == [
        (row["mesh_dim"], row["collective"], row["calls"]) for row in records["fsdp"]["traffic"]
    ]
    assert [row["MiB per rank"] for row in traffic] == [9, 3, 1]
    parts = {row["run"]: row for row in numbers_of(page, "step")}["fsdp"]
    assert [parts[f"{part}, s"] for part in ("compute", "exposed communication", "idle in the pipeline")] == [
        pytest.approx(value) for value in (0.27, 0.075, 0.03)
    ]
    parity = {row["run"]: row for row in numbers_of(page, "parity")}
    assert parity["fsdp"]["gradient difference"] == pytest.approx(5.25e-16)
    assert (parity["fsdp"]["parity"], parity["wrong"]["parity"]) == ("passed", "FAILED")
    expect(page.locator("#chart-parity .verdict")).to_have_text("✗ 1 of 5 FAILED worst: 7.5e-1, wrong · 1 not compared")
    [bubble] = numbers_of(page, "bubble")
    assert bubble == {"run": "pp-1f1b", "measured, %": 31, "ideal, %": 20}


def test_parts_of_a_step_that_nobody_timed_are_absent_and_not_zero(open_page: Open) -> None:
    half, none = complete_record("half"), complete_record("none")
    half["throughput"]["step_parts"]["idle_seconds"] = None
    none["throughput"]["step_parts"] = None
    page = open_page({"half": half, "none": none})
    rows = {row["run"]: list(row.values())[1:] for row in numbers_of(page, "step")}
    assert rows == {"half": [0.18, 0.05, None, pytest.approx(0.23), 0.25], "none": [None] * 4 + [0.25]}
    for text in ("≥ 0.23", "not measured"):
        expect(page.locator("#chart-step .drawing")).to_contain_text(text)


def test_traffic_of_unknown_size_is_no_zero(open_page: Open) -> None:
    record, silent = complete_record("one-unknown"), complete_record("silent")
    record["traffic"][2]["bytes_per_rank"] = None
    silent["traffic"] = []
    page = open_page({"one-unknown": record, "silent": silent})
    rows = {(row["run"], row["mesh dimension"], row["collective"]): row for row in numbers_of(page, "traffic")}
    assert rows["one-unknown", "tp", "all_reduce"]["MiB per rank"] is None
    assert rows["silent", "none", "none"]["MiB per rank"] == 0
    expect(page.locator("#chart-traffic .drawing")).to_contain_text("≥ 9.0")


def test_traffic_within_hosts_and_across_is_a_chart_of_its_own(open_page: Open) -> None:
    record = complete_record("two-hosts")
    for row, across in zip(record["traffic"], (0, 2**20, None), strict=True):
        row["bytes_across_hosts"] = across
    assert open_page({"one-host": complete_record("one-host")}).locator("#chart-hosts").count() == 0
    page = open_page({"two-hosts": record, "one-host": complete_record("one-host")})
    rows = [list(row.values()) for row in numbers_of(page, "hosts")]
    assert rows == [
        ["two-hosts", "dp_shard", "all_gather", 6, 0],
        ["two-hosts", "dp_shard", "reduce_scatter", 2, 1],
        ["two-hosts", "tp", "all_reduce", None, None],
    ]
    drawing = page.locator("#chart-hosts .drawing")
    for text in ("within", "≥ 8.00", "across", "≥ 1.00", "one-host", "not measured"):
        expect(drawing).to_contain_text(text)
    told = drawing.locator("rect title").all_text_contents()
    assert told == [
        *("dp_shard all_gather within hosts: 6.00", "dp_shard reduce_scatter within hosts: 2.00"),
        "dp_shard reduce_scatter to other hosts: 1.00",
    ]
    widths = drawing.locator("rect").evaluate_all("bars => bars.map(bar => bar.width.baseVal.value)")
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.02)


def test_loss_curves_and_the_pipeline_as_it_ran(open_page: Open) -> None:
    page = open_page(complete_comparison())
    loss = numbers_of(page, "loss")
    assert [row["step"] for row in loss] == [str(n) for n in range(1, 21)]
    assert [row["fsdp-tp"] for row in loss] == [pytest.approx(4.0 / n) for n in range(1, 21)]
    assert [row["largest difference"] for row in loss] == [0] * 20
    assert page.locator("#chart-loss .drawing .curve").count() == 1
    expect(page.locator("#chart-loss figcaption")).to_contain_text("All 5 rows train one model on the same tokens")
    expect(page.locator("#chart-loss figcaption")).to_contain_text("their losses are equal to the last digit")
    timeline = numbers_of(page, "timeline")
    assert len(timeline) == 8
    assert timeline[0]["start, ms"] == pytest.approx(0) and timeline[0]["end, ms"] == pytest.approx(10)
    assert {row["action"] for row in timeline} == {"forward", "backward"}
    drawing = page.locator("#chart-timeline .drawing")
    for text in ("pp-1f1b", "bubble 31 %, ideal 20 %", "rank 1, stage 1", "F0F1", "B0B1", "ms since"):
        expect(drawing).to_contain_text(text)
    lane = drawing.locator("rect").first
    lane.hover(position={"x": 5, "y": 9})
    assert lane.text_content() == "forward, microbatch 0, stage 0: 10.0 ms"


def test_split_backwards_of_several_stages_are_told_apart(open_page: Open) -> None:
    record = pipelined(complete_record("zbv", pp=2))
    record["pipeline"]["timeline"] = [
        {
            **{"rank": rank, "stage": stage, "microbatch": 3, "action": action},
            **{"start_seconds": 7 + at + 4 * (stage > 1), "end_seconds": 8 + at + 4 * (stage > 1)},
        }
        for rank, stages in ((0, (0, 3)), (1, (1, 2)))
        for stage in stages
        for at, action in enumerate(("forward", "backward_input", "backward_weight"))
    ]
    page = open_page({"zbv": record})
    key = page.locator("#chart-timeline .key li").all_text_contents()
    assert key == ["F: forward", "I: backward, inputs", "W: backward, weights"]
    drawing = page.locator("#chart-timeline .drawing")
    assert drawing.locator("path").count() == 2 * 2 * 3  # ranks, stages, actions
    assert drawing.locator("path.later").count() == 2 * 3
    colours = drawing.locator("path").evaluate_all("paths => paths.map(path => getComputedStyle(path).fill)")
    assert len(set(colours)) == 6
    assert drawing.locator(".label").all_text_contents() == ["F3", "I3", "W3"] * 4
    expect(drawing).to_contain_text("rank 0, stages 0, 3")


def test_a_long_timeline_stays_a_small_drawing(open_page: Open) -> None:
    record = complete_record("long", pp=4)
    record["pipeline"]["timeline"] = [
        {
            **{"rank": rank, "stage": rank // 16, "microbatch": n, "action": "forward"},
            **{"start_seconds": n / 100, "end_seconds": (n + 1) / 100},
        }
        for rank in range(64)
        for n in range(1000)
    ]
    page = open_page({"long": record})
    drawing = page.locator("#chart-timeline .drawing")
    for rank in (0, 16, 32, 48):  # one of each stage
        expect(drawing).to_contain_text(f"rank {rank}, stage")
    assert drawing.locator("path").count() == 4
    assert (drawing.locator("path").first.get_attribute("d") or "").count("z") == 1000
    assert drawing.locator("*").count() < 100
    assert len(numbers_of(page, "timeline")) == 500
    expect(page.locator("#chart-timeline caption")).to_have_text("The first 500 actions of each run.")


def test_what_was_not_measured_is_said_and_never_drawn_as_zero(open_page: Open) -> None:
    page = open_page({"a": empty_record("a"), "b": empty_record("b", dp_shard=2)})
    for chart in CHARTS:
        expect(page.locator(f"#chart-{chart} .none")).to_contain_text("ot measured")
        assert page.locator(f"#chart-{chart} .drawing").count() == 0
    expect(page.locator("#chart-parity .none")).to_contain_text("ot measured")
    assert list(table_rows(page.locator("#runs"))[0]) == ["compare", "name", "layout", "devices"]
    expect(page.locator("#same")).to_contain_text("Not measured in any: MFU %; causal %; HFU %; speed tokens/s;")
    assert "2 runs were not compared with one process." in found_in(page)


# ---- the table, the choice and its address -------------------------------------------------------------------------


def test_heads_sort_and_say_so(open_page: Open) -> None:
    page = open_page(complete_comparison())
    head = page.locator("th[data-key=tokens_per_s]")
    head.get_by_role("button").press("Enter")
    expect(head).to_have_attribute("aria-sort", "descending")
    ordered = ["single", "wrong", "pp-1f1b", "fsdp", "fsdp-tp"]  # what was not measured comes last
    assert names_in_table(page)[:5] == ordered
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    assert names_in_table(page)[0] == "fsdp-tp"
    assert numbers_of(page, "speed")[0]["run"] == "fsdp-tp"
    head.get_by_role("button").click()
    expect(head).not_to_have_attribute("aria-sort", re.compile("."))
    assert names_in_table(page)[0] == "fsdp"  # the order of folders again


def test_rows_are_found_by_text_and_status(open_page: Open) -> None:
    page = open_page(complete_comparison())
    page.get_by_label("Find").fill("fsdp tp2")
    assert names_in_table(page) == ["fsdp-tp"]
    page.get_by_label("Find").fill("80 GiB")
    assert names_in_table(page) == ["oom"]
    page.get_by_label("Find").fill("")
    page.locator("#status").select_option("refused")
    assert names_in_table(page) == ["refused"]
    expect(page.locator("#count")).to_have_text("1 of 9 runs; everything on this page is of these")


def test_reasons_of_rows_that_did_not_end_well_are_read_out(open_page: Open) -> None:
    records = complete_comparison()
    page = open_page(records)
    told = page.locator("#unfinished li").all_text_contents()
    for name in ("refused", "oom", "timeout"):
        assert f"{name} {name}: {records[name]['reason']}" in told
    assert any(line.startswith("wrong parity FAILED") for line in told) and len(told) == 4


def test_the_choice_and_the_order_survive_in_the_address(open_page: Open) -> None:
    page = open_page(complete_comparison())
    page.get_by_role("button", name="Compare none").click()
    page.wait_for_selector(READY)
    assert page.locator("#charts figure").count() == 0
    page.get_by_label("Compare fsdp-tp").check()
    page.get_by_label("Compare single").check()
    page.locator("th[data-key=step_seconds] button").click()
    assert [row["run"] for row in numbers_of(page, "speed")] == ["single", "fsdp-tp"]
    page.locator("th[data-key=step_seconds] button").click()
    page.get_by_label("Baseline").select_option(label="fsdp")
    address = page.evaluate("location.hash")
    page.reload()
    again = open_page(complete_comparison(), hash=address)
    for each in (page, again):
        assert [row["run"] for row in numbers_of(each, "speed")] == ["fsdp-tp", "single"]
        expect(each.locator("th[data-key=step_seconds]")).to_have_attribute("aria-sort", "descending")
        assert each.locator("#runs input:checked").count() == 2
        expect(each.get_by_label("Baseline")).to_have_value(re.compile("......"))


def test_a_link_says_what_it_names_and_the_page_does_not_have(open_page: Open) -> None:
    address = "#runs=nosuch.nosuc2&sort=no-such-column&cluster=delta&details=nosuch"
    page = open_page(complete_comparison(), hash=address)
    expect(page.locator("#notice")).to_have_text("This link names what is not on this page: 3 runs, cluster “delta”.")
    assert names_in_table(page)[:2] == ["single", "fsdp"] or len(names_in_table(page)) == 9
    page.goto(page.url.partition("#")[0])
    page.reload()
    expect(page.locator("#notice")).to_be_hidden()


def test_a_part_of_the_page_is_a_place_to_link_to(open_page: Open) -> None:
    page = open_page(complete_comparison(), hash="#chart-memory")
    expect(page.locator("#chart-memory")).to_be_in_viewport()
    assert page.locator("#runs input:checked").count() == 6
    page.get_by_label("Find").fill("fsdp")
    page.wait_for_selector(READY)
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(READY)
    assert names_in_table(page) == ["fsdp", "fsdp-tp", "unmeasured"]  # the filter is still there


def test_a_run_opens_beside_the_page_and_back_closes_it(open_page: Open) -> None:
    page = open_page(complete_comparison(), hash="#query=fsdp")
    link = page.locator("#runs").get_by_role("link", name="fsdp-tp")
    link.scroll_into_view_if_needed()
    before = page.evaluate("scrollY")
    link.click()
    details = page.locator("#details")
    expect(details).to_be_visible()
    expect(details.get_by_role("heading", level=2)).to_have_text("fsdp-tp")
    expect(details.get_by_role("heading", level=2)).to_be_focused()
    assert page.evaluate("scrollY") == before  # the page itself stays where it is
    address = page.evaluate("location.hash")
    page.locator("#runs").get_by_role("link", name="fsdp", exact=True).click()
    expect(details.get_by_role("heading", level=2)).to_have_text("fsdp")
    page.go_back()
    expect(details.get_by_role("heading", level=2)).to_have_text("fsdp-tp")
    page.go_back()
    expect(details).to_be_hidden()
    assert names_in_table(page) == ["fsdp", "fsdp-tp", "unmeasured"] and page.url.endswith("#query=fsdp")
    page.go_forward()
    expect(details).to_be_visible()
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()
    expect(page.locator("#runs").get_by_role("link", name="fsdp-tp")).to_be_focused()
    again = open_page(complete_comparison(), hash=address)
    expect(again.locator("#details")).to_contain_text("lab run fsdp-tp.toml")


def test_a_link_to_eighty_runs_is_short(open_page: Open) -> None:
    page = open_page({f"some/long/folder-{n}/strategy": empty_record(f"strategy-{n}") for n in range(81)})
    page.get_by_role("button", name="Compare all shown").click()
    page.get_by_label("Compare strategy-80").uncheck()
    assert len(page.evaluate("location.hash")) < 600


def test_each_run_tells_its_recipe_command_versions_and_hardware(open_page: Open) -> None:
    found = complete_comparison()
    costs = {"saves": 3, "bytes": 18_604_044, "waited_seconds": 0.3562, "background_seconds": 2.25}
    found["fsdp-tp"]["checkpoint"] = costs | {"lives": [{"first_step": 1, "last_step": 8}, {"first_step": 7}]}
    found["fsdp-tp"]["environment"]["cluster"] = "alpha"
    found["fsdp-tp"]["labels"] = {"job_id": "4711", "tags": ["nightly", "h100"], "note": "new NCCL"}
    found["fsdp-tp"]["goodput"] |= {"fraction": 0.5, "total_seconds": 60.0}
    page = open_page(found)
    page.locator("#runs").get_by_role("link", name="fsdp-tp").click()
    details = page.locator("#details")
    command, recipe = details.locator("pre").all_text_contents()
    assert command.splitlines() == [
        "lab run fsdp-tp.toml",
        "torchrun --standalone --nproc-per-node 4 -m launch.train fsdp-tp.toml",
    ]
    assert "[parallel]\npp = 1\ndp_replicate = 1\ndp_shard = 2\ncp = 1\ntp = 2" in recipe
    expect(details).to_contain_text("Test CPU, 2 cores")
    expect(details).to_contain_text("clusteralphajob4711tagsnightly, h100notenew NCCL")
    expect(details).to_contain_text("16 steps timed; left out: 3 warm-up, 1 profile")
    expect(details).to_contain_text("memory and trafficof step 2")
    waited = "training waited 0.356 s for each, 2.25 s in the background"
    expect(details).to_contain_text(f"checkpoints3 saves of 17.7 MiB; {waited}; 2 lives")
    expect(details).to_contain_text("goodput50 % of 60 s")
    expect(details).to_contain_text(empty_record("a")["environment"]["torch"])


def test_no_mfu_has_its_reason(open_page: Open) -> None:
    unknown, short = complete_record("unknown-device"), complete_record("short")
    unknown["flops"] |= {"mfu": None, "peak_flops": None, "peak_source": "no datasheet peak of 'Test GPU' is known"}
    short["flops"]["mfu"] = None
    short["throughput"]["step_seconds"] = {"median": None, "p10": None, "p90": None}
    page = open_page({"unknown-device": unknown, "short": short, "silent": empty_record("silent")})
    for name, told in (
        ("unknown-device", "MFUnone: no datasheet peak of 'Test GPU' is known"),
        ("short", "MFUnone: no step was timed"),
        ("silent", "MFU–not measured"),
    ):
        page.locator("#runs").get_by_role("link", name=name).click()
        expect(page.locator("#details")).to_contain_text(told)


# ---- what was found ------------------------------------------------------------------------------------------------


def test_the_page_begins_with_what_it_found(open_page: Open) -> None:
    page = open_page(complete_comparison())
    assert found_in(page) == [
        "single is the fastest: 512 tokens/s, 42 % MFU; pp-1f1b is within the spread of its steps. single needs the"
        " least memory: 15 MiB on its fullest rank; fsdp-tp the most, 8 times that.",
        "1 of 5 FAILED the proof against one process: wrong.",
        "3 runs did not end well: oom, refused, timeout.",
        "4 ranks share 2 cores: compare overheads, not speed-ups.",
        "1 run was not compared with one process.",
    ]
    page.get_by_label("Find").fill("pp-1f1b")
    assert found_in(page) == [
        "The one run that was compared with one process has its gradients: they differ by at most 4.4e-16 in float64."
    ]


def test_a_run_that_failed_its_proof_is_never_the_fastest(open_page: Open) -> None:
    records = {name: complete_record(name, factor) for name, factor in (("good", 2.0), ("slow", 4.0), ("wrong", 1.0))}
    records["wrong"]["parity"]["passed"] = False
    page = open_page(records)
    assert found_in(page)[0].startswith("good is the fastest: 256 tokens/s, 21 % MFU, 100 % ahead of slow. good needs")
    best = page.locator("#runs .best").evaluate_all("cells => cells.map(cell => cell.parentElement.dataset.id)")
    assert set(best) == {"good"}


def test_a_busy_machine_is_said(open_page: Open) -> None:
    records = {name: complete_record(name) for name in ("quiet", "busy")}
    records["quiet"]["throughput"]["cores_used_by_others"] = 0.1
    records["busy"]["throughput"]["cores_used_by_others"] = 0.9
    said = "Other programs kept 0.9 of 2 cores busy while busy ran: those times are too long."
    assert said in found_in(open_page(records))


def test_speed_against_memory_joins_what_nothing_beats(open_page: Open) -> None:
    records = complete_comparison()
    for name, tokens_per_s, unit in (("lean", 100, 2**18), ("beaten", 90, 2**19)):
        records[name] = complete_record(name)
        records[name]["throughput"]["tokens_per_s"] = tokens_per_s
        records[name]["memory"] = memory(1, unit)
    page = open_page(records)
    rows = {row["run"]: row["beaten by none"] for row in numbers_of(page, "trade")}
    assert rows == {
        **{"single": "yes", "lean": "yes", "beaten": "no", "fsdp": "no", "fsdp-tp": "no", "pp-1f1b": "no"},
    }
    path = page.locator("#chart-trade .curve").get_attribute("d") or ""
    assert path.count("L") == 1
    assert page.locator("#chart-trade .limit").count() == 0


def test_the_memory_of_the_device_is_a_line(open_page: Open) -> None:
    records = {name: complete_record(name, factor) for name, factor in (("a", 1.0), ("b", 2.0))}
    for record in records.values():
        record["environment"] |= {"device": GPU, "accelerators": [GPU], "device_memory_bytes": 50 * 2**20}
    page = open_page(records)
    assert page.locator("#chart-trade .limit").count() == 1
    expect(page.locator("#chart-trade figcaption")).to_contain_text("The dashed line is the device's memory, 50 MiB.")


def test_mfu_above_hfu_is_explained_and_no_bar_sticks_out(open_page: Open) -> None:
    records = {name: complete_record(name) for name in ("long", "recompute")}
    records["long"]["flops"] |= {"mfu": 0.67, "mfu_causal": 0.55, "hfu": 0.60}
    page = open_page(records)
    about = page.locator("#chart-utilisation figcaption p")
    expect(about).to_contain_text("MFU is above HFU in 1 row: it counts the half of attention that the causal mask")
    for bars in page.locator("#chart-utilisation .drawing").evaluate_all(
        "all => all.map(one => [...one.querySelectorAll('rect')].map(bar => bar.width.baseVal.value))"
    ):
        for hardware, model in zip(bars[::2], bars[1::2], strict=True):
            assert model < hardware
    expect(open_page({"a": records["recompute"]}).locator("#chart-utilisation p")).not_to_contain_text("above HFU")


def test_each_row_can_be_held_against_another(open_page: Open) -> None:
    page = open_page(complete_comparison())
    page.get_by_label("Baseline").select_option(label="single")
    row = page.locator("#runs tr[data-id=fsdp]")
    expect(row.locator("small")).to_have_text(["−33 %", "−33 %", "−33 %", "−33 %", "+50 %", "+50 %", "+500 %"])
    expect(page.locator("#runs tr[data-id=single] small").first).to_have_text("=")


def test_columns_that_are_the_same_in_all_rows_are_a_sentence(open_page: Open) -> None:
    page = open_page({"a": complete_record("a"), "b": complete_record("b", 1.5, dp_shard=4)})
    heads = page.locator("#runs thead th").all_text_contents()
    assert "status" not in heads and "parity" not in heads and "last\nloss" not in heads and "layout" in heads
    expect(page.locator("#same")).to_have_text("The same in all rows: status ok; last loss 0.2000; parity passed. ")


def test_parts_and_step_agree_or_the_chart_says_why(open_page: Open) -> None:
    page = open_page({"a": complete_record("a"), "b": complete_record("b", 1.5)})
    expect(page.locator("#chart-step figcaption")).not_to_contain_text("another time")
    apart = complete_record("apart")
    apart["throughput"]["step_parts"]["compute_seconds"] = 0.25
    page = open_page({"a": complete_record("a"), "apart": apart})
    expect(page.locator("#chart-step figcaption")).to_contain_text(
        "In 1 row they add up to another time than the median"
    )
    assert page.locator("#chart-step .drawing .whisker").count() == 1


# ---- clusters, devices, months -------------------------------------------------------------------------------------


def test_comparisons_and_machines_are_groups(open_page: Open) -> None:
    records = {}
    for day in (1, 2, 3):
        for name in ("fsdp", "ddp"):
            record = complete_record(name)
            record["environment"] |= {
                "time_utc": f"2026-01-0{day}T12:00:00+00:00",
                **({"device": "cuda:0", "accelerators": ["Test GPU"] * 8} if day == 3 else {}),
            }
            records[f"day-{day}/strategies/{name}"] = record
    refused = empty_record("refused") | {"status": "refused", "reason": "no"}
    refused["environment"] |= {"device": None, "accelerators": None}
    records["day-3/strategies/refused"] = refused
    page = open_page(records)
    groups = page.locator("#runs tr.group").all_text_contents()
    assert groups == [
        "day-1/strategies on Test CPU, 2 cores",
        "day-2/strategies on Test CPU, 2 cores",
        "day-3/strategies on 8 × Test GPU",
    ]
    page.locator("#comparison").select_option("day-2/strategies")
    assert names_in_table(page) == ["ddp", "fsdp"]


def test_hosts_and_the_cluster_are_named_with_the_hardware() -> None:
    record = complete_record("a")
    record["environment"] |= {"device": "cuda:0", "accelerators": ["Test GPU"] * 8}
    for hosts, cluster, expected in (
        (None, None, "8 × Test GPU"),
        ([0] * 8, "ours", "8 × Test GPU (ours)"),
        ([0] * 8 + [1] * 8, "ours", "2 × 8 × Test GPU (ours)"),
        ([{}, "x"], ["<b>"], "2 × 8 × Test GPU (['<b>'])"),
    ):
        record["environment"] |= {"hosts": hosts, "cluster": cluster}
        [group] = page_data([("a/a", record)])["groups"]
        assert group["hardware"] == expected


def test_a_regression_is_seen_in_the_chart_the_list_and_the_findings(open_page: Open) -> None:
    page = open_page(months())
    text = re.compile(
        r"fsdp on 64 devices of beta: MFU 3\d(\.\d)? % instead of 3\d.\d %, 18 % lower since 0000007 of 2026-02-23"
    )
    assert any(line.startswith("1 series of runs became slower") and text.search(line) for line in found_in(page))
    expect(page.locator("#drops li")).to_have_text([text])
    assert page.locator("#chart-history .alarm").count() == 1
    expect(page.locator("#chart-history .alarm-label")).to_have_text("−18 %")
    assert page.locator("#chart-history .curve").count() == 6
    expect(page.locator("#chart-history .key li").first).to_have_text("fsdp · 64 devices · beta · batch 64")
    expect(page.locator("#chart-history .drawing")).to_contain_text("0000007")
    page.locator("#axis").select_option("time")
    expect(page.locator("#chart-history .drawing")).to_contain_text("2026-03-09")
    page.locator("#drops a").click()
    expect(page.locator("#details")).to_contain_text("beta/week-007/64/fsdp")


def test_a_line_over_time_is_one_cluster_and_one_number_of_devices(open_page: Open) -> None:
    page = open_page(months())
    page.locator("#strategy").select_option("hsdp")
    rows = numbers_of(page, "history")
    assert len(rows) == 60 and {row["strategy"] for row in rows} == {"hsdp"}
    lines = page.locator("#chart-history .curve > title").all_text_contents()
    expected = {f"{n} devices · {cluster} · batch {n}" for n in (64, 128) for cluster in ("alpha", "beta", "gamma")}
    assert set(lines) == expected
    assert page.locator("#drops li").count() == 0
    page.locator("#cluster").select_option("alpha")
    page.locator("#devices").select_option("64")
    assert [row["commit"] for row in numbers_of(page, "history")] == [f"{n:07x}" for n in range(10)]


def test_a_filter_drives_every_chart_and_number(open_page: Open) -> None:
    page = open_page(months())
    page.locator("#cluster").select_option("gamma")
    page.locator("#devices").select_option("128")
    page.locator("#since").fill("2026-02-01")
    expect(page.locator("#count")).to_have_text("24 of 240 runs; everything on this page is of these")
    page.wait_for_selector(READY)
    assert page.locator("#runs tbody tr[data-id]").count() == 24
    assert found_in(page)[0].startswith("hsdp is the fastest: 5")
    assert found_in(page)[1].startswith("All 24 runs that were compared")
    expect(page.locator("#layouts")).to_be_hidden()
    assert {row["cluster"] for row in numbers_of(page, "history")} == {"gamma"}
    assert len(numbers_of(page, "speed")) == 24
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#count")).to_have_text("240 runs in all")
    expect(page.locator("#cluster")).to_have_value("")


def test_which_layout_is_best_on_how_many_devices(open_page: Open) -> None:
    records = months(drop=None)
    page = open_page(records)
    rows = {(row["layout"], int(row["devices"])): row for row in numbers_of(page, "heat")}
    for kind, strategy in (("fsdp", "fsdp"), ("dp·fsdp", "hsdp"), ("fsdp·tp2", "fsdp-tp"), ("pp4·fsdp", "pp-fsdp")):
        for n in (64, 128):
            own = [
                r["flops"]["mfu"]
                for r in records.values()
                if (r["recipe"]["name"], r["layout"]["world_size"]) == (strategy, n)
            ]
            assert rows[kind, n]["MFU, % of peak"] == pytest.approx(100 * max(own))
            assert rows[kind, n]["run"] == strategy
    assert page.locator("#chart-heat .wins").count() == 2
    expect(page.locator("#chart-heat figcaption")).to_contain_text("Over 3 clusters: choose one above.")
    scaling = numbers_of(page, "scaling")
    for row in scaling:
        own = [
            r["throughput"]["tokens_per_s"]
            for r in records.values()
            if (r["recipe"]["name"], r["environment"]["cluster"], r["layout"]["world_size"])
            == (row["strategy"], row["cluster"], row["devices"])
        ]
        assert row["tokens/s"] == pytest.approx(max(own))
    first, last = scaling[:2]
    assert (first["efficiency, %"], first["devices"], last["devices"]) == (100, 64, 128)
    assert last["efficiency, %"] == pytest.approx(100 * last["tokens/s"] / first["tokens/s"] / 2)
    assert page.locator("#chart-scaling .ideal").count() == page.locator("#chart-scaling .curve").count() == 6


def test_engines_are_told_apart(open_page: Open) -> None:
    records = {name: complete_record(name, factor) for name, factor in (("fsdp", 1.0), ("zero3", 2.0), ("odd", 3.0))}
    records["zero3"]["recipe"]["engine"] = {"name": "deepspeed", "zero_stage": 3}
    records["zero3"]["parity"] |= {"dtype": "float32", "max_rel_grad_diff": 5e-8}
    records["odd"]["recipe"]["engine"] = 7
    page = open_page(records)
    assert any(line.endswith("they differ by at most 5.0e-8 in float64 or float32.") for line in found_in(page))
    assert {row["name"]: row["engine"] for row in table_rows(page.locator("#runs"))} == {
        **{"fsdp": "native", "zero3": "deepspeed", "odd": "native"},
    }
    page.locator("#engine").select_option("deepspeed")
    assert names_in_table(page) == ["zero3"]


def test_sorted_rows_are_one_list(open_page: Open) -> None:
    page = open_page(months(commits=2))
    assert page.locator("#runs tr.group").count() > 1
    page.locator("th[data-key=tokens_per_s] button").click()
    page.wait_for_selector(READY)
    assert page.locator("#runs tr.group").count() == 0
    rows = table_rows(page.locator("#runs"))
    speeds = [row["speed\ntokens/s"] for row in rows]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 48
    assert {row["cluster"] for row in rows} == {"alpha", "beta", "gamma"}
    assert {row["global\nbatch"] for row in rows} == {64, 128} and "model" not in rows[0]  # the same in all


def test_what_is_shown_can_be_saved(open_page: Open) -> None:
    records = complete_comparison()
    records["odd"] = complete_record('=HYPERLINK("x")')
    page = open_page(records)
    page.get_by_label("Find").fill("fsdp float64")
    saved = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save {kind}").click()
        saved[kind] = Path(download.value.path()).read_text(encoding="utf-8")
    rows = json.loads(saved["JSON"])
    assert [row["name"] for row in rows] == ["fsdp", "fsdp-tp", "unmeasured"]
    assert rows[0]["tokens_per_s"] == records["fsdp"]["throughput"]["tokens_per_s"]
    assert rows[0]["peak_bytes"] == records["fsdp"]["memory"]["max_peak_bytes"]
    lines = list(csv.DictReader(saved["CSV"].splitlines()))
    assert [line["mfu"] and float(line["mfu"]) for line in lines] == [pytest.approx(28), pytest.approx(21), ""]
    page.get_by_label("Find").fill("odd")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save CSV").click()
    [line] = csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8").splitlines())
    assert line["name"] == """'=HYPERLINK("x")"""


def test_dry_runs_alone_are_a_page_of_plans(open_page: Open) -> None:
    plans = {}
    for name in ("fsdp", "fsdp-tp"):
        plans[name] = empty_record(name, dp_shard=4) | {"kind": "dry-run", "memory": memory(4, 2**20)}
        plans[name]["environment"]["device"] = "fake cpu"
    plans["fsdp-tp"]["memory"] = memory(4, 2**19)
    page = open_page(plans)
    assert found_in(page) == [
        "2 plans: dry runs. Memory, traffic and FLOPs are counted exactly; nothing was run, so there is no speed.",
        "fsdp-tp needs the least memory: 30 MiB on its fullest rank; fsdp the most, 2 times that.",
    ]
    expect(page.locator("#runs-title")).to_have_text("Plans")
    assert "easured" not in page.locator("#found").inner_text()
    assert page.locator("#charts figure").evaluate_all("all => all.map(one => one.id)") == [
        *("chart-memory", "chart-traffic", "chart-bubble"),
    ]
    plans["fsdp"]["throughput"]["tokens_per_s"] = 100.0  # of a dry run for a cluster
    assert found_in(open_page(plans))[0].endswith("nothing was run, speeds are foretold.")


# ---- for everyone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(open_page: Open, dark: bool) -> None:
    page = open_page(complete_comparison(), dark=dark)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    expect(page.locator("figure .numbers table")).to_have_count(
        len(CHARTS) + 3
    )  # parity, layouts, speed against memory
    page.locator("#runs").get_by_role("link", name="fsdp-tp").click()
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
    found = page.evaluate("axe.run().then(({passes, violations}) => ({passes: passes.length, violations}))")
    serious = [
        (violation["id"], [node["html"][:200] for node in violation["nodes"]])
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert found["passes"] > 20


def test_the_theme_can_be_chosen_against_the_system(open_page: Open) -> None:
    page = open_page(complete_comparison(), dark=True)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Theme: auto").click()
    light = page.evaluate(background)
    assert light != dark
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(background) == dark


def test_a_phone_scrolls_down_only(open_page: Open) -> None:
    page = open_page(complete_comparison(), width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for chart in CHARTS:
        assert page.locator(f"#chart-{chart} .drawing svg").bounding_box()["width"] <= 330
    expect(page.locator("#sideways")).to_be_visible()
    page.set_viewport_size({"width": 1100, "height": 800})
    expect(page.locator("#chart-loss .drawing svg")).not_to_have_attribute("width", re.compile("^[23]..$"))


def test_print_leaves_out_the_controls_and_is_light(open_page: Open) -> None:
    page = open_page(complete_comparison(), dark=True)
    page.emulate_media(media="print")
    for control in (".controls >> nth=0", "#against", "#theme", "#runs input >> nth=0", "footer"):
        expect(page.locator(control)).to_be_hidden()
    expect(page.locator("#chart-speed .drawing svg")).to_be_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert len(page.pdf(format="A4")) < 500_000  # bytes


def test_the_keyboard_reaches_everything(open_page: Open) -> None:
    page = open_page({"a": complete_record("a")})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):  # past the last
            break
        reached.add(
            page.evaluate(
                "(a => a.id || a.dataset.key || a.closest('[data-key]')?.dataset.key || a.localName)"
                "(document.activeElement)"
            )
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    link = page.locator("#runs tbody a").get_attribute("data-key")
    assert {"theme", "query", "reset", "against", "choose-none", "tokens_per_s", "input", link, "summary"} <= reached


# ---- anyone's records ----------------------------------------------------------------------------------------------

HOSTILE = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"


def test_a_record_full_of_script_shows_as_text(open_page: Open) -> None:
    good, bad = complete_record(HOSTILE), empty_record(HOSTILE) | {"status": "failed", "reason": f"</script>{HOSTILE}"}
    good["recipe"][HOSTILE] = {HOSTILE: [HOSTILE, {"deep": {"deeper": {"deepest": HOSTILE}}}]}
    good["environment"] |= {"cpu": HOSTILE, "torch": HOSTILE, "git_commit": HOSTILE}
    good["traffic"][0] |= {"mesh_dim": HOSTILE, "collective": "</script><script>window.harmed = 1</script>"}
    good["flops"]["peak_source"] = HOSTILE
    good["environment"]["cluster"] = HOSTILE
    good["labels"] = {"job_id": HOSTILE, "tags": [HOSTILE, {}], "note": HOSTILE}
    good["throughput"]["steps_left_out"][HOSTILE] = 1
    good["pipeline"]["timeline"] = [
        {"rank": 0, "stage": HOSTILE, "microbatch": 1, "action": HOSTILE, "start_seconds": 0, "end_seconds": 1}
    ]
    page = open_page({"good": good, "bad": bad})
    page.locator("#runs tbody a").last.click()
    assert page.evaluate("window.harmed") is None
    assert (page.locator("script").count(), page.locator("img").count()) == (2, 0)
    assert names_in_table(page) == [HOSTILE, HOSTILE]
    expect(page.locator("#unfinished li")).to_contain_text(f"</script>{HOSTILE}")
    expect(page.locator("#details")).to_contain_text(HOSTILE)
    assert "lab run recipe.toml" in page.locator("#details pre").first.text_content()  # no name for a shell to read


def test_a_record_of_the_wrong_types_is_a_row_all_the_same(open_page: Open, tmp_path: Path) -> None:
    odd = complete_record("odd")
    odd["throughput"] = {"tokens_per_s": "fast", "step_seconds": {"median": True}, "step_parts": [1, 2]}
    odd["memory"] = {"per_rank": [7, {"peak_bytes": "many"}], "max_peak_bytes": 10**400}
    odd["traffic"] = [None, {"mesh_dim": None, "collective": 3, "calls": {}, "bytes_per_rank": []}]
    odd["recipe"] = {"name": "odd", "model": "none", "train": []}
    odd["environment"] = {
        "time_utc": ["never"],
        "cluster": 7,
        "hosts": 3,
        "accelerators": "GPU",
        "device": 7,
        "cores": "two",
    }
    odd["pipeline"] = {"timeline": [{"rank": "first"}], "bubble_fraction": "small"}
    odd["steps"] = [{"step": "one", "loss": None}]
    odd["labels"] = {"tags": "none", "note": {"a": []}, "job_id": []}
    page = open_page({"odd": odd, "good": complete_record("good")})
    assert sorted(names_in_table(page)) == ["good", "odd"]
    assert {row["run"]: row for row in numbers_of(page, "speed")}["odd"]["tokens/s"] is None


def test_no_data_can_end_its_script_or_fill_a_placeholder() -> None:
    text = page_html("<b>/* DATA */", [("x", complete_record("/* SCRIPT */ <!-- TITLE --> </script>\u2028\ud800"))])
    assert text.count("</script>") == 2 and "&lt;b&gt;" in text and "<b>" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data and "<" not in data[1]
    assert json.loads(data[1])["runs"][0]["name"].startswith("/* SCRIPT */ <!-- TITLE --> </script>")


def test_a_thousand_records_stay_a_small_document(open_page: Open) -> None:
    page = open_page(months(commits=42))
    assert page.locator("#runs tbody tr[data-id]").count() == 100
    assert page.locator("#charts figure .drawing").count() > 5
    assert page.locator("figure table").count() == 0  # before its numbers are asked for
    assert page.evaluate("document.querySelectorAll('*').length") < 10_000
    expect(page.locator("#drawn")).to_have_text("4 runs chosen in the table above")
    page.get_by_role("button", name="Compare all shown").click()
    expect(page.locator("#drawn")).to_have_text("1008 runs chosen; the first 40 are drawn")
    page.get_by_role("button", name="Show all 1008 rows").click()
    page.wait_for_selector(READY)
    assert page.locator("#runs tbody tr[data-id]").count() == 1008
    assert len(numbers_of(page, "history")) == 1008


# ---- the command ---------------------------------------------------------------------------------------------------


def test_report_writes_the_page_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results" / "today" / "single"
    folder.mkdir(parents=True)
    write_record(folder / "record.json", complete_record("single"))
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "results" / "today"), "--html", str(page)]) == 0
    assert "single" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    page = tmp_path / "new" / "folder" / "page.html"
    folder = tmp_path / "results" / "yesterday" / "ddp"
    folder.mkdir(parents=True)
    write_record(folder / "record.json", complete_record("ddp", dp_replicate=4))
    assert main(["report", str(tmp_path / "results"), "--html", str(page)]) == 0
    assert page.is_file()
    shown = capsys.readouterr().out
    assert shown.startswith("today\n\n") and "\n\n\nyesterday\n\n" in shown and shown.count("Model none (") == 2
    assert [name for name, _ in find_records(tmp_path / "results")] == ["today/single", "yesterday/ddp"]
    assert main(["report", str(tmp_path / "results"), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["today/single", "yesterday/ddp"]


def test_no_results_make_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--html", str(tmp_path / "page.html")]) == 2
    assert "no record.json" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
