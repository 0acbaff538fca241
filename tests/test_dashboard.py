"""The questions of docs/dashboard.md, asked of the page under the links that it gives there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import DEVICES, DOCS, FALL, PICTURES, records, write_generated
from playwright.sync_api import Browser, Page, expect
from test_page import READY, browser, found_in, numbers_of  # noqa: F401

from launch.history import find_drops


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generated(tmp_path_factory.mktemp("generated"))


@pytest.fixture
def open_at(page_file: Path, browser: Browser) -> Iterator[Page]:  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    page.wait_for_selector(READY)
    yield page
    page.close()


def go(page: Page, picture: str) -> Page:
    address = page.url.partition("#")[0] + PICTURES[picture][1]
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(READY)
    return page


def test_how_did_the_mfu_of_fsdp_move_over_commits_on_a_cluster(open_at: Page) -> None:
    cluster, devices, strategy, week, share = FALL
    page = go(open_at, "commits")
    [told] = page.locator("#drops li").all_text_contents()
    assert re.match(rf"{strategy} on {devices} devices of {cluster}: MFU \S+ % instead of \S+ %, 1[78] % lower", told)
    assert page.locator("#chart-history .alarm").count() == 1 and page.locator("#chart-history .curve").count() == 4
    [fell] = [row for row in numbers_of(page, "history") if row["lower by, %"] is not None]
    assert f"week-{week:02d}" in fell["run"] and abs(fell["lower by, %"] - 100 * share) < 2
    [drop] = find_drops(records().items())
    assert drop.run.startswith(f"{cluster}/week-{week:02d}/{devices}/{strategy}") and drop.lasts


def test_which_layout_is_best_on_how_many_devices(open_at: Page) -> None:
    page = go(open_at, "layouts")
    best: dict[int, str] = {}
    for row in sorted(numbers_of(page, "heat"), key=lambda row: row["MFU, % of peak"]):
        best[int(row["devices"])] = row["run"]
    assert best == {16: "fsdp", 32: "fsdp", 64: "hsdp", 128: "hsdp"} and set(best) == set(DEVICES)
    assert page.locator("#chart-heat .wins").count() == len(DEVICES)
    assert page.locator("#chart-scaling .ideal").count() == 4


def test_what_would_i_take_for_so_many_devices_of_so_much_memory(open_at: Page) -> None:
    page = go(open_at, "choice")
    first = found_in(page)[0]
    assert re.match(
        r"hsdp is the fastest: \S+ tokens/s, \S+ % MFU in 53 of 80 GiB, \S+ % ahead of fsdp\. fsdp-tp", first
    )
    assert page.locator("#chart-trade .limit").count() == 1
    expect(page.locator("#chart-trade figcaption")).to_contain_text("the device's memory, 80 GiB")
    assert {row["run"] for row in numbers_of(page, "trade") if row["beaten by none"] == "yes"} == {
        *("hsdp", "fsdp", "fsdp-tp"),
    }


def test_what_goes_between_hosts(open_at: Page) -> None:
    page = go(open_at, "hosts")
    across = {}
    for row in numbers_of(page, "hosts"):
        across[row["run"], row["mesh dimension"]] = row["GiB to other hosts"]
    assert across["hsdp", "dp_shard"] == 0 < across["hsdp", "dp_replicate"] < across["fsdp", "dp_shard"]


def test_the_document_shows_every_picture_under_its_link() -> None:
    text = (DOCS / "dashboard.md").read_text(encoding="utf-8")
    for name, (_, address, *_) in PICTURES.items():
        assert f"](dashboard-{name}.png)" in text and (DOCS / f"dashboard-{name}.png").stat().st_size < 300_000
        assert name == "hosts" or f"`page.html{address}`" in text
    assert "generated records" in text
