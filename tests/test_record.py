"""record.json: every key of the contract, whole files, and readers that survive what others wrote."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from parallel.measure.lives import read_lives
from parallel.measure.record import (
    environment,
    new_record,
    read_record,
    read_records,
    read_steps,
    write_record,
)
from parallel.recipe import recipe_from_tables

# The contract, spelt out here a second time, on purpose.
CONTRACT: dict[str, Any] = {
    "schema": 1,
    "status": None,
    "reason": None,
    "kind": "measured",
    "parity": {
        *("reference", "dtype", "max_rel_grad_diff", "max_abs_loss_diff", "passed"),
        *("trained_dtype", "trained_max_rel_grad_diff", "trained_passed", "note"),
    },
    "throughput": {
        "tokens_per_s",
        "tokens_per_s_per_rank",
        "step_seconds",
        "cpu_seconds_per_step",
        "cores_used_by_others",
        "step_parts",
        "steps_timed",
        "steps_left_out",
    },
    "flops": {
        "definition",
        "model_flops_per_token",
        "model_flops_per_token_causal",
        "hardware_flops_per_token",
        "attention_kernels",
        "mfu",
        "mfu_causal",
        "hfu",
        "peak_flops",
        "peak_source",
        "matmul_ceiling_flops",
    },
    "memory": {"per_rank", "max_peak_bytes", "min_peak_bytes", "step", "note"},
    "traffic": None,
    "labels": {"job_id", "tags", "note"},
    "prediction": None,
    "pipeline": {"bubble_fraction", "bubble_fraction_ideal", "timeline"},
    "checkpoint": {"saves", "bytes", "waited_seconds", "background_seconds", "lives"},
    "goodput": {
        "fraction",
        "total_seconds",
        "trained_seconds",
        "startup_seconds",
        "parity_seconds",
        "save_seconds",
        "lost_seconds",
        "between_lives_seconds",
        "other_seconds",
    },
}
RECIPE = recipe_from_tables(
    {"name": "mix", "parallel": {"pp": 2, "dp_shard": 2, "tp": 2}, "train": {"global_batch": 8, "micro_batch": 1}}
)


def test_a_new_record_has_every_key_of_the_contract_and_null_where_nothing_is_measured() -> None:
    record = new_record(RECIPE)
    for key, expected in CONTRACT.items():
        if isinstance(expected, set):
            assert record[key].keys() == expected
            assert all(value is None for name, value in record[key].items() if name != "step_seconds")
        else:
            assert record[key] == expected
    assert record["throughput"]["step_seconds"] == {"median": None, "p10": None, "p90": None}
    assert [record["environment"][key] for key in ("cluster", "hosts")] == [None, None]
    assert record["steps"] == []
    assert record["recipe"] == RECIPE.resolved()
    assert record["layout"] == {
        **{"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2},
        **{"world_size": 8, "replicas": 2, "n_microbatches": 4, "n_stages": 2},
    }
    assert record.keys() == CONTRACT.keys() | {"recipe", "layout", "environment", "steps"}


def test_a_refused_recipe_has_a_record_with_the_same_keys() -> None:
    record = new_record({"name": "odd", "parallel": {"tp": 3}})
    assert record.keys() == new_record(RECIPE).keys()
    assert record["layout"].keys() == new_record(RECIPE)["layout"].keys()
    assert record["recipe"] == {"name": "odd", "parallel": {"tp": 3}}


def test_two_records_share_nothing_that_can_be_written_to() -> None:
    new_record(RECIPE)["throughput"]["step_seconds"]["median"] = 1.0
    assert new_record(RECIPE)["throughput"]["step_seconds"]["median"] is None


def test_the_environment_names_versions_and_hardware_but_no_person_host_or_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_TOKEN", "hunter2-hunter2")
    found = dataclasses.asdict(environment())
    assert found["python"].startswith("3.") and found["torch"].startswith("2.") and found["numpy"]
    assert found["cores"] >= 1 and found["cpu"] and found["parallel_lab"]
    text = json.dumps(found)
    private = [str(Path.home()), str(Path.cwd()), os.uname().nodename, os.environ.get("USER"), "hunter2-hunter2"]
    assert [word for word in private if word and word in text and len(word) > 4] == []
    assert "/" not in text.replace(str(found["cpu"]), "").replace(str(found["platform"]), "")


def test_gpus_are_unknown_while_a_trackers_thread_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert new_record(RECIPE)["environment"]["accelerators"] is None


def test_labels_are_those_of_the_environment_and_a_reader_adds_none_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_record(tmp_path / "record.json", new_record(RECIPE) | {"status": "ok"})
    for name, text in (("CLUSTER", "alpha"), ("TAGS", "nightly,h100"), ("NOTE", "new NCCL")):
        monkeypatch.setenv(f"PARALLEL_LAB_{name}", text)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    expected = {"job_id": "4711", "tags": ["nightly", "h100"], "note": "new NCCL"}
    assert new_record(RECIPE)["environment"]["cluster"] == "alpha"
    assert new_record(RECIPE)["labels"] == new_record({"name": "refused"})["labels"] == expected
    read = read_record(tmp_path / "record.json")
    assert set(read["labels"].values()) == {None} and read["environment"]["cluster"] is None


def test_a_record_is_made_without_importing_torch() -> None:
    program = (
        "import sys; from parallel.measure.record import new_record; from parallel.recipe import recipe_from_tables;"
        " new_record(recipe_from_tables({})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_what_is_written_is_read_back_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    record = new_record(RECIPE) | {"status": "ok"}
    record["steps"] = [{"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "seconds": 0.5}]
    record["parity"]["max_rel_grad_diff"] = float("-inf")
    write_record(tmp_path / "record.json", record)
    json.loads((tmp_path / "record.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    back = read_record(tmp_path / "record.json")
    assert back["steps"] == [{"step": 1, "loss": None, "grad_norm": None, "seconds": 0.5}]
    assert back["parity"]["max_rel_grad_diff"] is None
    assert back["recipe"] == RECIPE.resolved()
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = new_record(RECIPE) | {"status": "ok"}
    write_record(tmp_path / "record.json", record)
    before = (tmp_path / "record.json").read_text()

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path / "record.json", record | {"status": "failed"})
    assert (tmp_path / "record.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_record_without_a_status_is_a_mistake_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_record(tmp_path / "record.json", new_record(RECIPE))


def test_records_of_a_folder_and_of_the_folders_in_it_are_found(tmp_path: Path) -> None:
    for folder, status in (("", "ok"), ("b", "oom"), ("a", "refused")):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_record(tmp_path / folder / "record.json", new_record(RECIPE) | {"status": status})
    (tmp_path / "a" / "deeper").mkdir()
    (tmp_path / "a" / "deeper" / "record.json").write_text("{}")
    assert [record["status"] for record in read_records(tmp_path)] == ["ok", "refused", "oom"]
    assert read_records(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"schema": 1, "status": "ok"',
        '{"schema": 2, "status": "ok", "kind": "measured"}',
        '{"schema": 1, "status": "splendid", "kind": "measured"}',
        '{"schema": 1, "status": ["ok"], "kind": "measured"}',
        '{"schema": 1, "status": "ok", "kind": "imagined"}',
        "[" * 100_000,
        '{"schema": ' + "9" * 5000 + "}",
        b"\xff\xfe\x00",
    ],
    ids=str,
)
def test_a_broken_record_is_a_failed_row_with_the_reason(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "broken").mkdir()
    path = tmp_path / "broken" / "record.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    [record] = read_records(tmp_path)
    assert record["status"] == "failed" and record["reason"].startswith("record.json cannot be used: ")
    assert record["recipe"]["name"] == "broken"
    assert record.keys() == new_record(RECIPE).keys()


def test_a_pipe_or_a_dangling_link_in_place_of_a_record_is_not_waited_on(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "record.json")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "record.json").symlink_to("nowhere")
    assert [record["status"] for record in read_records(tmp_path)] == ["failed", "failed"]


def test_sections_of_any_type_are_read_as_sections(tmp_path: Path) -> None:
    hostile = dict.fromkeys(new_record(RECIPE), "surprise") | {"schema": 1, "status": "ok", "kind": "measured"}
    for value in ("surprise", 1, None, [], [1], {"step_seconds": 3, "world_size": "x"}):
        sections = {key: value for key in hostile if key not in ("schema", "status", "kind")}
        (tmp_path / "record.json").write_text(json.dumps(hostile | sections))
        record = read_record(tmp_path / "record.json")
        for key, blank in new_record(RECIPE).items():
            if isinstance(blank, dict) and key != "recipe":
                assert record[key].keys() >= blank.keys()
        assert record["throughput"]["step_seconds"].keys() >= {"median", "p10", "p90"}
        assert all(isinstance(step, dict) for step in record["steps"])
        assert record["recipe"]["name"] == tmp_path.name


def test_steps_are_read_up_to_where_the_writer_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    assert read_steps(path) == []
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert read_steps(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_lines_that_are_no_steps_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    strangers = (
        "what?",
        "[1]",
        "null",
        "{}",
        '{"loss": 0.5}',
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1, "loss": "0.5"}',
    )
    path.write_text("\n".join([*strangers, '{"step": 2, "loss": 0.5}', ""]))
    assert read_steps(path) == [{"step": 2, "loss": 0.5}]


def test_lives_are_read_with_how_far_the_last_has_come(tmp_path: Path) -> None:
    assert read_lives(tmp_path) is None
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for broken in ("", "[", "{}", "[1]", "[{}]", '[{"first_step": "x"}]', "[" * 100_000):
        (tmp_path / "lives.json").write_text(broken)
        assert read_lives(tmp_path) is None
    (tmp_path / "lives.json").write_text('[{"first_step": 1, "last_step": 1}, {"first_step": 2, "last_step": null}]')
    assert [life["last_step"] for life in read_lives(tmp_path) or []] == [1, 2]
    (tmp_path / "lives.json").write_text('[{"first_step": 3}]')  # it has done no step
    assert read_lives(tmp_path) == [{"first_step": 3, "last_step": None}]
