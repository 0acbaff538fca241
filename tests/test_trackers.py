"""Trackers: what W&B and TensorBoard were told is read back from their own files; what fails stops nothing; and no
secret of the environment is in any file of a run."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from test_launch import Lab, lab  # noqa: F401  # lab is a fixture

from launch.redaction import Redacted, without_secrets
from launch.trackers import TRACKERS, Subject, Tracker, summary_of, track_comparison, tracking
from launch.verdict import record_error
from parallel.measure.record import new_record, read_steps, write_record
from parallel.recipe import Recipe, RecipeError, recipe_from_tables, refuse_missing_packages

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "HF_TOKEN": "hf_planted-token-of-a-person",
    "AWS_SECRET_ACCESS_KEY": 'planted/"secret"+of a person',
    "HTTPS_PROXY": "http://person:planted-password@127.0.0.1:9",
}
ROWS = [{"step": step, "loss": 4.0 / step, "grad_norm": 1.0, "seconds": 0.5} for step in range(1, 6)]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without W&B's files in the home directory, an account or a way to one."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def recipe_with(name: str = "watched", **track: Any) -> Recipe:
    return recipe_from_tables({"name": name, "train": {"steps": 5}, "track": track})


def track(recipe: Recipe, folder: Path, rows: list[dict[str, Any]], *, goes_on: bool = False, **result: Any) -> None:
    """A run that gives those rows, and a record with `result`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tracking(recipe, folder, goes_on=goes_on) as tell:
        for row in rows:
            tell(row)
        record = new_record(recipe) | {"status": "ok"} | result
        record["throughput"] |= {"tokens_per_s": 1234.5}
        write_record(folder / "record.json", record)


# ---- W&B -----------------------------------------------------------------------------------------------------------


def wandb_records(file: Path) -> Iterator[Any]:
    """Those of a .wandb file: LevelDB's log format (doc/log_format.md there) after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block ends in zeros where no header fits
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """What each offline run says, in order."""
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        told: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "artifacts": [], "exit_code": None}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names = ("run_id", "display_name", "run_group", "job_type", "project", "notes")
                told |= {name: getattr(record.run, name) for name in names} | {"tags": list(record.run.tags)}
                told["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                told["history"].append(row)
            elif kind == "summary":
                items = record.summary.update
                told["summary"] |= {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            elif kind == "artifact":
                told["artifacts"].append((record.artifact.name, [c.path for c in record.artifact.manifest.contents]))
            elif kind == "exit":
                told["exit_code"] = record.exit.exit_code
        runs.append(told)
    return runs


def test_wandb_is_told_recipe_steps_and_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_LAB_TAGS", "nightly,h100")
    monkeypatch.setenv("PARALLEL_LAB_NOTE", "a note")
    recipe = recipe_with(wandb="offline")
    track(recipe, tmp_path / "watched", ROWS)
    [told] = wandb_runs(tmp_path / "watched")
    assert (told["display_name"], told["project"], told["job_type"]) == ("watched", "parallel-lab", "run")
    assert told["config"].keys() >= recipe.resolved().keys()
    assert told["tags"] == ["nightly", "h100"] and told["notes"] == "a note" and told["run_group"] == ""
    assert {key: told["config"][key] for key in ("train", "parallel")} == {
        key: recipe.resolved()[key] for key in ("train", "parallel")
    }
    for row, written in zip(ROWS, told["history"], strict=True):
        assert {key: written[key] for key in ("loss", "grad_norm", "seconds")} == {
            key: row[key] for key in ("loss", "grad_norm", "seconds")
        }
        assert written["_step"] == row["step"]
    assert told["summary"]["status"] == "ok" and told["summary"]["throughput/tokens_per_s"] == 1234.5
    assert told["artifacts"] == [("watched-result", ["record.json"])] and told["exit_code"] == 0


def test_a_run_that_goes_on_is_the_same_run_and_one_that_starts_afresh_is_not(tmp_path: Path) -> None:
    recipe = recipe_with(wandb="offline", tensorboard=True)
    track(recipe, tmp_path, ROWS[:4], status="failed", reason="killed")
    time.sleep(1.1)  # W&B names the folder of a run by the second
    track(recipe, tmp_path, ROWS[2:], goes_on=True)
    first, second = wandb_runs(tmp_path)
    assert first["run_id"] == second["run_id"] and (first["exit_code"], second["exit_code"]) == (1, 0)
    assert [row["_step"] for row in second["history"]] == [3, 4, 5]
    time.sleep(1.1)
    track(recipe, tmp_path, ROWS)
    assert wandb_runs(tmp_path)[2]["run_id"] != first["run_id"]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts[:2] == [1, 3]  # where TensorBoard drops what was written before


@pytest.mark.parametrize("key", ["", SECRETS["WANDB_API_KEY"]], ids=["no key", "no network"])
def test_wandb_without_an_answer_is_kept_in_files_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("launch.trackers.CONNECT_SECONDS", 1.0)
    start = time.monotonic()
    folder = tmp_path / "watched"
    folder.mkdir()
    with tracking(recipe_with(wandb="online"), folder, goes_on=False) as tell:
        for row in ROWS:
            tell(row)
        told_after = time.monotonic() - start
        write_record(folder / "record.json", new_record(recipe_with()) | {"status": "ok"})
    assert told_after < 0.5  # nobody waits for a network that is not there
    out = capsys.readouterr().out
    assert out.count("warning:") == 1 and "W&B does not answer" in out and (not key or key not in out)
    [told] = wandb_runs(folder)
    assert [row["_step"] for row in told["history"]] == [1, 2, 3, 4, 5]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and (not key or not [path for path in files if key.encode() in path.read_bytes()])


KILLED = """
import os, signal, sys, time
from pathlib import Path
from launch.trackers import tracking
from parallel.recipe import recipe_from_tables
recipe = recipe_from_tables({"track": {"wandb": "offline", "tensorboard": True}})
with tracking(recipe, Path(sys.argv[1]), goes_on=False) as tell:
    for step in range(1, 6):
        tell({"step": step, "loss": 1.0, "grad_norm": 1.0, "seconds": 0.1})
    time.sleep(60)
"""


def test_of_a_killed_rank_the_steps_are_there(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])

    def steps() -> list[list[int]]:
        return [[row["_step"] for row in run["history"]] for run in wandb_runs(tmp_path)]

    deadline = time.monotonic() + 50
    while steps() != [[1, 2, 3, 4, 5]] or "loss" not in scalars(tmp_path):
        assert time.monotonic() < deadline, steps()
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps() == [[1, 2, 3, 4, 5]] and scalars(tmp_path)["loss"] == dict.fromkeys(range(1, 6), 1.0)


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


def events(folder: Path) -> Iterator[Event]:
    """Those of all event files: TFRecords, each its length, 4 bytes of CRC, the event and 4 bytes of CRC."""
    for file in sorted(folder.glob("tensorboard/events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at + 12 < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + length])
            yield event
            at += 16 + length


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def texts(folder: Path) -> dict[str, str]:
    values = [value for event in events(folder) for value in event.summary.value if value.HasField("tensor")]
    return {value.tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode() for value in values}


def test_tensorboard_is_told_recipe_steps_and_result(tmp_path: Path) -> None:
    track(recipe_with(tensorboard=True), tmp_path, ROWS)
    told = scalars(tmp_path)
    for key in ("loss", "grad_norm", "seconds"):
        assert told[key] == pytest.approx({row["step"]: row[key] for row in ROWS})
    assert told["record/throughput/tokens_per_s"] == {5: 1234.5}
    assert "| train/steps | 5 |" in texts(tmp_path)["recipe"] and "| status | ok |" in texts(tmp_path)["record"]


# ---- whatever the tracker ------------------------------------------------------------------------------------------


def test_a_comparison_is_a_group_and_its_page_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "layouts"
    folder.mkdir()
    (folder / "comparison.json").write_text('{"name": "layouts", "variants": ["one", "two"]}')
    (folder / "page.html").write_text("<p>")
    recipes = [recipe_with("one"), recipe_with("two", wandb="offline")]
    track(recipes[1], folder / "two", ROWS)
    [told] = wandb_runs(folder / "two")
    assert told["run_group"] == "layouts"
    records = {name: new_record(recipe_with(name)) | {"status": "ok"} for name in ("one", "two")}
    track_comparison(folder, recipes, records, say=print)
    [told] = wandb_runs(folder)
    assert (told["display_name"], told["run_group"], told["job_type"]) == ("layouts", "layouts", "comparison")
    assert told["artifacts"] == [("layouts-result", ["comparison.json", "page.html"])]
    assert told["summary"]["one/status"] == "ok"


class Failing:
    def __init__(self, subject: Subject, _: Any) -> None:
        self.steps: list[int] = []

    def step(self, row: Mapping[str, Any]) -> None:
        if row["step"] == 2:
            raise OSError("the disk is\nfull")

    def finish(self, record: Mapping[str, Any], files: Any) -> None:
        raise AssertionError("after it has failed")


class Hanging:
    def __init__(self, subject: Subject, _: Any) -> None:
        pass

    def step(self, row: Mapping[str, Any]) -> None:
        time.sleep(60)

    def finish(self, record: Mapping[str, Any], files: Any) -> None:
        pass


@pytest.mark.parametrize(
    "kind, said",
    [
        (Failing, "warning: track.tensorboard is told no more of this run: OSError: the disk is full"),
        (Hanging, "warning: track.tensorboard was not done in time, and may lack the end of this run"),
    ],
)
def test_a_tracker_that_fails_or_hangs_stops_nothing_and_says_so_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Callable[..., Tracker],
    said: str,
) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", kind)
    monkeypatch.setattr("launch.trackers.FINISH_SECONDS", 0.2)
    start = time.monotonic()
    track(recipe_with(tensorboard=True), tmp_path, ROWS)
    assert time.monotonic() - start < 10
    assert capsys.readouterr().out.splitlines() == [said]


def test_trackers_are_off_and_a_missing_one_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_with().track.chosen == [] and TRACKERS.keys() == vars(recipe_with().track).keys()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_missing_packages(recipe_with())
    for key, value, shown in (("wandb", "online", "'online'"), ("tensorboard", True, "true")):
        with pytest.raises(RecipeError) as refusal:
            refuse_missing_packages(recipe_with(**{key: value}))
        assert str(refusal.value) == f"track.{key} = {shown}: is not installed; pip install 'parallel-lab[{key}]'"


def test_a_summary_has_the_figures_and_not_the_recipe() -> None:
    record = new_record(recipe_with()) | {"status": "ok"}
    record["memory"] |= {"max_peak_bytes": 7, "per_rank": [{"rank": 0}]}
    summary = summary_of(record)
    assert summary["memory/max_peak_bytes"] == 7 and summary["status"] == "ok"
    assert not [key for key in summary if key.startswith(("recipe", "layout")) or "per_rank" in key]
    assert None not in summary.values()


# ---- secrets -------------------------------------------------------------------------------------------------------

ALSO = {"PARALLEL_TEST_PLAIN": "planted-value-of-an-environment"}  # no secret by its name, but nobody's business


def leaks(folder: Path) -> list[tuple[str, str]]:
    """(file, variable) of each planted value in a file of `folder`, as it is or as JSON and HTML write it."""
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        text = file.read_text(encoding="utf-8", errors="replace").replace('\\"', '"').replace("&quot;", '"')
        found += [(str(file.relative_to(folder)), name) for name, value in (SECRETS | ALSO).items() if value in text]
    return found


def test_no_secret_is_in_any_file_of_a_run_that_raises_or_is_done(
    lab: Lab,  # noqa: F811
) -> None:
    """The ranks that raise do so with every secret in their words, and print them before."""
    lab.environment |= SECRETS | ALSO | {"SPILLS": " ".join(SECRETS)}
    settings = ["--set", "track.wandb=offline", "--set", "track.tensorboard=true"]
    for name in ("good", "spills"):
        code, out, err = lab.run(name, *settings)
        assert code == (0 if name == "good" else 1), out + err
        assert not [value for value in SECRETS.values() if value in out + err]
    for rank in range(3):
        assert "***" in (lab.folder / f"runs/spills/logs/rank-{rank}.log").read_text()
    assert "ValueError: *** and ***" in lab.record("spills")["reason"]
    lab("report", "runs", "--html", "runs/page.html")
    assert "spills" in (lab.folder / "runs/page.html").read_text()
    assert leaks(lab.folder / "runs") == []


def test_a_variable_that_is_taken_away_meanwhile_hides_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    class Going(UserDict[str, str]):
        """Lists a variable that another thread has removed when it is asked for."""

        def __iter__(self) -> Iterator[str]:
            return iter(["GONE", *self.data])

    monkeypatch.setattr(os, "environ", Going({"A_TOKEN": "abcdefgh"}))
    assert without_secrets("it is abcdefgh") == "it is ***"


def test_a_secret_is_found_by_its_name_and_long_ones_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_PASSWORD", "abcdefgh-and-more")
    monkeypatch.setenv("C_KEY", "short")
    monkeypatch.setenv("D_PLAIN", "plain-words")
    assert without_secrets("abcdefgh-and-more, abcdefgh, short, plain-words") == "***, ***, short, plain-words"
    with open(tmp_path / "log", "w") as file:
        print("it is abcdefgh", file=Redacted(file))
        assert Redacted(file).fileno() == file.fileno()
    assert (tmp_path / "log").read_text() == "it is ***\n"
    recipe = recipe_with()
    record_error(recipe, tmp_path, 0, OSError("no entry for abcdefgh-and-more"))
    assert "abcdefgh" not in (tmp_path / "record.json").read_text() and read_steps(tmp_path / "steps.jsonl") == []
