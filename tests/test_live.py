"""Runs as they go: in the terminal, and on a page that follows them, served on loopback."""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from layouts import small_recipe
from playwright.sync_api import Browser, expect
from results import complete_record
from test_page import READY, browser, found_in, names_in_table, table_rows  # noqa: F401

import launch.terminal
from launch.cli import main
from launch.folder import abandoned, held_alone, hold, recipe_toml, running
from launch.live import Results, Server, going_on
from launch.page import find_records
from parallel.measure.lives import start_life
from parallel.measure.record import write_record


class Going:
    """A run of this process that is under way, as far as its files say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._steps = folder, 0
        folder.mkdir(parents=True)
        recipe = small_recipe(train=dict(steps=15), parallel=dict(dp_shard=2))
        (folder / "recipe.toml").write_text(recipe_toml(recipe).replace(f'"{recipe.name}"', f'"{folder.name}"', 1))
        start_life(folder, layout=vars(recipe.parallel), started=0.0)
        self._held: int | None = hold(folder)

    def step(self, number: int) -> None:
        with open(self.folder / "steps.jsonl", "a", encoding="utf-8") as file:
            for self._steps in range(self._steps + 1, number + 1):  # noqa: B020
                row = {"step": self._steps, "loss": 4.0 / self._steps, "grad_norm": 1.0, "seconds": 0.5}
                file.write(json.dumps(row) + "\n")

    def ends(self, *, well: bool) -> None:
        if well:
            write_record(self.folder / "record.json", complete_record(self.folder.name, dp_shard=2))
        if self._held is not None:
            os.close(self._held)
        self._held = None


@pytest.fixture
def going(tmp_path: Path) -> Iterator[Going]:
    run = Going(tmp_path / "results" / "fsdp")
    run.step(2)
    yield run
    run.ends(well=False)


@pytest.fixture
def server(tmp_path: Path, going: Going) -> Iterator[Server]:
    with Server(tmp_path / "results", port=0) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join(timeout=30)


# ---- what is known of a run that has not ended -----------------------------------------------------------------------


def test_a_run_under_way_is_a_row_with_its_step_and_speed_and_no_file_says_so(going: Going) -> None:
    record = running(going.folder) or {}
    assert (record["status"], record["reason"]) == ("running", "step 2 of 15")
    assert record["throughput"]["tokens_per_s"] == 8 * 16 / 0.5 and record["flops"]["mfu"] is None
    assert [name for name, _ in find_records(going.folder.parent)] == ["fsdp"]
    assert not (going.folder / "record.json").exists() and abandoned(going.folder) is None
    going.ends(well=False)  # its processes were killed
    assert running(going.folder) is None and (abandoned(going.folder) or {})["status"] == "failed"


def test_a_run_whose_recipe_cannot_be_read_goes_on_all_the_same(going: Going) -> None:
    (going.folder / "recipe.toml").write_text("[train")
    record = running(going.folder) or {}
    assert (record["reason"], record["throughput"]["tokens_per_s"]) == ("step 2", None)


def test_a_comparison_between_two_of_its_rows_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "strategies"
    assert not going_on(tmp_path)
    with held_alone(folder):
        assert going_on(tmp_path)
    assert not going_on(tmp_path)


def test_report_watches_until_all_has_ended(
    going: Going, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[int] = []

    def sleep(seconds: float) -> None:
        looks.append(len(looks))
        going.step(7) if len(looks) == 1 else going.ends(well=True)

    monkeypatch.setattr(launch.terminal.time, "sleep", sleep)
    assert main(["report", str(going.folder.parent), "--watch"]) == 0
    out = capsys.readouterr().out
    assert "fsdp: running: step 2 of 15\n" in out and "fsdp: running: step 7 of 15\n" in out and "\x1b" not in out
    assert out.count("Model none (") == 3 and "passed" in out.rpartition("Model none (")[0].splitlines()[-2]
    assert len(looks) == 2
    assert main(["report", str(going.folder.parent), "--watch"]) == 0  # nothing goes on: as without
    assert len(looks) == 2


# ---- the server ------------------------------------------------------------------------------------------------------


def ask(server: Server, path: str, *, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_nothing_but_the_page_and_its_data_is_served(server: Server, going: Going) -> None:
    (going.folder / "secret.txt").write_text("mine")
    code, headers, text = ask(server, "/")
    assert code == 200 and text.startswith("<!doctype html>") and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in text and "connect-src 'self'" in text and headers["Cache-Control"] == "no-store"
    for path in ("/fsdp/record.json", "/secret.txt", "/../secret.txt", "//etc/passwd", "/data/..", "/%2e%2e/x", "*"):
        code, _, text = ask(server, path)
        assert code == 404 and "mine" not in text, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, "/", method=method)[0] == 501
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert ask(server, "/data", Host=name)[0] == 403, name
    assert ask(server, "/data", Host="localhost:9999")[0] == 200  # through a tunnel


def test_it_listens_on_loopback_alone(server: Server) -> None:
    assert server.address == f"http://127.0.0.1:{server.server_port}/"
    assert server.socket.getsockname()[0] == "127.0.0.1" and server.socket.family == socket.AF_INET


def test_what_has_not_changed_is_not_sent_again(server: Server, going: Going, monkeypatch: pytest.MonkeyPatch) -> None:
    _, headers, text = ask(server, "/data")
    assert json.loads(text)["runs"][0]["reason"] == "step 2 of 15"
    monkeypatch.setattr("launch.live.find_records", None)  # nor is anything read again
    code, again, text = ask(server, "/data", If_None_Match=headers["ETag"])
    assert (code, text, again["ETag"]) == (304, "", headers["ETag"])
    monkeypatch.undo()
    going.step(3)
    again, text = ask_until_newer(server, headers["ETag"])
    assert json.loads(text)["runs"][0]["reason"] == "step 3 of 15"
    going.ends(well=False)  # killed: no file has changed
    _, text = ask_until_newer(server, again["ETag"])
    assert json.loads(text)["runs"][0]["status"] == "failed"


def ask_until_newer(server: Server, tag: str) -> tuple[dict[str, str], str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        code, headers, text = ask(server, "/data", If_None_Match=tag)
        if code == 200:
            return headers, text
        assert code == 304
        time.sleep(0.05)
    raise AssertionError("nothing newer came")


def test_reading_a_large_folder_leaves_the_cores_to_the_runs(going: Going, monkeypatch: pytest.MonkeyPatch) -> None:
    now, read = [100.0], []

    def slow(folder: Path) -> list[Any]:
        read.append(now[0])
        now[0] += 2.0
        return find_records(folder)

    monkeypatch.setattr("launch.live.find_records", slow)
    monkeypatch.setattr("launch.live.time.monotonic", lambda: now[0])
    results = Results(going.folder.parent)
    for step in range(3, 30):
        results.look()
        now[0] += 1.0
        going.step(step)
    results.look()
    assert read == [100.0, 120.0]


def test_a_port_that_is_taken_or_none_is_one_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for port, why in ((server.server_port, "Address already in use"), (70000, "is none")):
        assert main(["report", str(tmp_path), "--serve", "--port", str(port)]) == 2
        err = capsys.readouterr().err
        assert err == f"lab: --port = {port}: cannot be listened on ({why}); give another, or 0 for any\n"
    for more in (["--watch"], ["--html", "x.html"], ["--json"], ["--fail-on-regression", "3"]):
        assert main(["report", str(tmp_path), "--serve", *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_follows_a_run_to_its_end_and_keeps_what_the_reader_does(
    server: Server,
    going: Going,
    browser: Browser,  # noqa: F811
) -> None:
    single = going.folder.parent / "single" / "record.json"
    single.parent.mkdir()
    write_record(single, complete_record("single"))
    said: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector(READY)
    expect(page.locator("#live")).to_have_text("live")
    assert any(line.startswith("1 run is under way: fsdp at step 2 of 15.") for line in found_in(page))
    statuses = {row["name"]: row["status"] for row in table_rows(page.locator("#runs"))}
    assert statuses == {"fsdp": "running", "single": "ok"}
    expect(page.locator("#unfinished")).to_be_hidden()
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
    found: Any = page.evaluate("axe.run().then(({violations}) => violations.map(({id, impact}) => [id, impact]))")
    assert [each for each in found if each[1] in ("serious", "critical")] == []

    page.locator("#chart-loss summary").click()
    expect(page.locator("#chart-loss table tbody tr")).to_have_count(20)
    page.get_by_label("Compare single").focus()
    page.evaluate("scrollTo(0, 700)")
    going.step(7)
    expect(page.locator("#findings")).to_contain_text("fsdp at step 7 of 15")
    page.wait_for_selector(READY)
    expect(page.locator("#chart-loss table tbody tr")).to_have_count(20)  # still open, and
    assert page.locator("#chart-loss tbody tr").nth(6).locator("td").last.text_content() != ""
    expect(page.get_by_label("Compare single")).to_be_focused()
    assert page.evaluate("scrollY") == 700

    page.get_by_label("Find").fill("fsdp")
    going.ends(well=True)
    expect(page.locator("#findings")).to_contain_text("has its gradients")
    page.wait_for_selector(READY)
    assert names_in_table(page) == ["fsdp"] and page.get_by_label("Find").input_value() == "fsdp"
    expect(page.get_by_label("Find")).to_be_focused()
    assert [row["status"] for row in table_rows(page.locator("#runs"))] == ["ok"]
    server.shutdown()
    server.server_close()
    expect(page.locator("#live")).to_contain_text("no answer since")
    assert said == []
    context.close()


def test_a_page_in_a_file_asks_nobody(going: Going, tmp_path: Path) -> None:
    assert main(["report", str(going.folder.parent), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "connect-src" not in text and '"live":false' in text
