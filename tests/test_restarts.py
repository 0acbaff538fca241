"""Lives of a run after the first: who starts them and who does not, what they leave, and where their seconds went.

tests/faults/ has what may end a life, and that a run then goes on to the digit.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from test_checkpoint import lived, recipe_of
from test_launch import Lab, children, lab, rank  # noqa: F401  # lab is a fixture

from launch.folder import abandoned, under_way
from launch.table import table
from launch.verdict import PEER_LOST, may_restart, record_error
from parallel.checkpoint.files import candidates, step_folder
from parallel.measure.lives import NO_RECORD, close_life, goodput, read_lives, start_life
from parallel.measure.record import Goodput, new_record, read_record, read_steps, write_json, write_record
from parallel.recipe import recipe_from_tables

# ---- lab run --max-restarts -----------------------------------------------------------------------------------------


def test_a_run_that_dies_is_started_again_so_often_and_each_life_is_told(lab: Lab) -> None:  # noqa: F811
    code, out, err = lab.run("killed-rank-1", "--max-restarts", "2")
    record = lab.record("killed-rank-1")
    assert code == 1 and record["status"] == "failed" and "rank 1 was killed by SIGKILL" in err
    lives = record["checkpoint"]["lives"]
    assert len(lives) == 3 and all("rank 1 was killed by SIGKILL" in life["ended"] for life in lives)
    assert out.count("of killed-rank-1 has ended: failed: rank 1 was killed by SIGKILL") == 2
    assert "restart 1 of at most 2, from where it first started" in out and "restart 2 of at most 2" in out
    for number in range(3):
        log = (lab.folder / f"runs/killed-rank-1/logs/rank-{number}.log").read_text()
        assert [line.split(",")[0] for line in log.splitlines() if line.startswith("----")] == [
            "---- life 2",
            "---- life 3",
        ]
        assert log.count(f"rank {number} of 3") == 3
    assert err.count("last words") == 1  # of the last life alone


@pytest.mark.parametrize("name", ["good", "refused"])
def test_what_is_done_or_refused_is_not_started_again(lab: Lab, name: str) -> None:  # noqa: F811
    code, out, _ = lab.run(name, "--max-restarts", "3")
    assert code == {"good": 0, "refused": 2}[name] and "restart" not in out
    assert len(read_lives(lab.folder / "runs" / name) or []) == 1


def test_a_signal_ends_a_run_that_may_restart(lab: Lab) -> None:  # noqa: F811
    process = lab.start("run", "base.toml", "--set", "name=hangs", "--max-restarts", "3")
    lab.wait_for(lambda: lab.pids.exists() and len(lab.pids.read_text().split()) == 3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1 and len(lab.record("hangs")["checkpoint"]["lives"]) == 1


def test_a_run_that_diverged_would_diverge_again() -> None:
    def ended(status: str, reason: str) -> bool:
        return may_restart({"status": status, "reason": reason})

    assert not ended("failed", "rank 0: Diverged: step 3 gave loss nan and gradient norm nan; the run has diverged")
    assert not ended("ok", "") and not ended("refused", "train.device = 'cuda': ...")
    assert ended("failed", "rank 1: ValueError: Diverged: not so") and ended("timeout", "") and ended("oom", "")


def test_what_ended_a_rank_is_told_with_its_cause(tmp_path: Path) -> None:
    """torch's pipelines say which stage failed, and why in the cause alone: here, that another rank is gone."""
    try:
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError as cause:
            raise RuntimeError(f"[Stage 1] failed to run forward: {'x' * 2000}") from cause
    except RuntimeError as error:
        record_error(recipe_from_tables({}), tmp_path, 2, error)
    reason = read_record(tmp_path / "record.json")["reason"]
    assert reason.startswith("rank 2: RuntimeError: [Stage 1] failed") and len(reason) < 1200
    assert reason.endswith("x, because of RuntimeError: Connection closed by peer") and PEER_LOST.search(reason)


def test_a_wrong_number_of_restarts_is_one_line(lab: Lab) -> None:  # noqa: F811
    code, _, err = lab.run("good", "--max-restarts", "-1")
    assert (code, err.count("\n")) == (2, 1) and "--max-restarts = -1: give 0" in err


def test_one_run_at_a_time_and_a_row_for_one_whose_launcher_was_killed(lab: Lab) -> None:  # noqa: F811
    process = lab.start("run", "base.toml", "--set", "name=hangs-rank-1")
    folder = lab.folder / "runs" / "hangs-rank-1"
    lab.wait_for(lambda: len(read_steps(folder / "steps.jsonl")) == 2)
    assert under_way(folder) and abandoned(folder) is None
    code, _, err = lab.run("hangs-rank-1")
    assert (code, err.count("\n")) == (2, 1) and "a run is under way there; wait for its end" in err
    process.kill()
    process.communicate()
    lab.wait_for(lambda: not under_way(folder) and lab.running() == [])
    [life] = read_lives(folder) or []
    write_json(folder / "lives.json", [life | {"first_step": 1}])  # the stand-in does not
    code, out, _ = lab("report", "runs")
    assert code == 0 and f"hangs-rank-1: failed: {NO_RECORD} after step 2\n" in out  # and no word of --resume
    step_folder(folder, 1).mkdir(parents=True)
    (step_folder(folder, 1) / "checkpoint.json").write_text("")
    code, out, _ = lab("report", "runs", "--html", "page.html")
    assert f"{NO_RECORD} after step 2; lab run --resume goes on" in out
    assert NO_RECORD in (lab.folder / "page.html").read_text()
    assert close_life(folder) == f"{NO_RECORD} after step 2" and close_life(folder) is None


def test_a_folder_for_checkpoints_that_cannot_be_written_is_refused_before_anything_starts(lab: Lab) -> None:  # noqa: F811
    folder = lab.folder / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    (folder / "checkpoints").write_text("")
    code, _, err = lab.run("good")
    assert (code, err.count("\n")) == (2, 1) and "cannot be written (Not a directory)" in err


# ---- torchrun's restarts --------------------------------------------------------------------------------------------


def test_torchrun_restarts_four_ranks_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Whose store keeps what the dead have written in it."""
    recipe = recipe_of("fsdp4", train=dict(steps=30), checkpoint=dict(every=4))
    from launch.folder import recipe_toml

    for name in ("whole", "killed"):
        (tmp_path / f"{name}.toml").write_text(recipe_toml(recipe).replace('name = "run"', f'name = "{name}"'))
    ran = {}
    for name in ("whole", "killed"):
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "3"]
        command = [sys.executable, "-P", "-m", *words, "-m", "launch.train", f"{name}.toml"]
        with open(tmp_path / f"{name}.txt", "w") as output:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        steps = tmp_path / "runs" / name / "steps.jsonl"
        deadline = time.monotonic() + 120
        while name == "killed" and len(read_steps(steps)) < 9:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        if name == "killed":
            os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=180) == 0, (tmp_path / f"{name}.txt").read_text()[-3000:]
        ran[name] = [(step["step"], step["loss"], step["grad_norm"]) for step in read_steps(steps)]
    assert ran["whole"] == ran["killed"] and len(ran["whole"]) == 30
    record = read_record(tmp_path / "runs" / "killed" / "record.json")
    first, second = record["checkpoint"]["lives"]
    assert first["ended"].startswith("failed: ") and second["ended"] == "done"
    assert second["first_step"] >= 9 and second["resumed_from"]["step"] == second["first_step"] - 1
    assert 0 < record["goodput"]["fraction"] < 1


def test_torchrun_does_not_restart_what_diverged(lab: Lab) -> None:  # noqa: F811
    folder = lab.folder / "runs" / "good"
    folder.mkdir(parents=True)
    reason = "rank 1: Diverged: step 2 gave loss nan and gradient norm nan; the run has diverged"
    write_record(folder / "record.json", new_record({"name": "good"}) | {"status": "failed", "reason": reason})
    before = (folder / "record.json").read_text()
    settings = ("base.toml", "--set", "name=good", "--set", "parallel.dp_shard=1")
    code, err = rank(lab, *settings, RANK="0", WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT="1")
    assert (code, err) == (1, f"launch.train: not again: {reason}\n")
    assert (folder / "record.json").read_text() == before and not lab.pids.exists()
    write_record(folder / "record.json", new_record({"name": "good"}) | {"status": "ok"})
    for number in "01":  # one died when all was done
        surroundings = dict(RANK=number, WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT="1")
        assert rank(lab, *settings[:-1], "parallel.dp_shard=2", **surroundings) == (0, "")
    assert not lab.pids.exists()


def test_a_job_that_slurm_has_queued_again_goes_on(lab: Lab) -> None:  # noqa: F811
    """Without --resume; and a record of another job, which was there before, is not taken for its own."""
    folder, again = lab.folder / "runs" / "good", dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    folder.mkdir(parents=True)
    settings = ("base.toml", "--set", "name=good", "--set", "parallel.dp_shard=1")
    record = new_record({"name": "good"}) | {"status": "ok"}
    write_record(folder / "record.json", record | {"labels": record["labels"] | {"job_id": "7"}})
    assert rank(lab, *settings, RANK="0", WORLD_SIZE="1", **again) == (0, "") and not lab.pids.exists()
    write_record(folder / "record.json", record | {"labels": record["labels"] | {"job_id": "6"}})
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000003" / "checkpoint.json").write_text("{")
    code, err = rank(lab, *settings, RANK="0", WORLD_SIZE="1", **again)
    assert (code, "holds no checkpoint that can be read" in err) == (2, True), err  # it has looked for one


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[data]\nsource = "synthetic"\n')
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.train", "recipe.toml"],
            cwd=tmp_path,
            env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"} | where,
            capture_output=True,
            text=True,
            timeout=120,
        )
    line = f"launch.train: MASTER_PORT = '{where['MASTER_PORT']}': something else listens on it; give a free one\n"
    assert (done.returncode, done.stderr) == (2, line)


# ---- ends between two files -----------------------------------------------------------------------------------------


def test_a_run_that_ended_between_its_last_save_and_its_record_comes_to_one(ranks: Ranks, tmp_path: Path) -> None:
    recipe = recipe_of("zero2")
    steps = lived(ranks, recipe, tmp_path)
    (tmp_path / "record.json").unlink()
    assert lived(ranks, recipe, tmp_path, tmp_path) == steps
    record = read_record(tmp_path / "record.json")
    assert record["throughput"]["step_seconds"]["median"] is None  # nothing was trained, nothing is claimed
    assert len(record["checkpoint"]["lives"]) == 2


def test_a_first_save_that_came_to_no_end_is_no_checkpoint(tmp_path: Path) -> None:
    step_folder(tmp_path, 2).mkdir(parents=True)
    (step_folder(tmp_path, 2) / "part-00000-00000.safetensors").write_bytes(b"half")
    assert candidates(tmp_path) == []
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002\n")  # there was one, and its manifest is gone
    assert candidates(tmp_path) == [step_folder(tmp_path, 2)]


# ---- goodput --------------------------------------------------------------------------------------------------------


def life(start: float, end: float | None, **seconds: float) -> dict[str, Any]:
    known = dict.fromkeys(("startup_seconds", "parity_seconds", "save_seconds", "lost_seconds"), 0.0)
    return {"started_unix_seconds": start, "ended_unix_seconds": end, **known, **seconds}


def test_goodput_accounts_for_every_second() -> None:
    lives = [
        life(100.0, 130.0, startup_seconds=5.0, parity_seconds=2.0, save_seconds=1.0, lost_seconds=4.0),
        life(135.0, 160.0, startup_seconds=4.0, save_seconds=2.0, lost_seconds=6.0),
    ]
    steps = [{"step": number, "seconds": 2.0} for number in range(1, 16)]
    found = goodput(lives, steps)
    assert found == Goodput(
        fraction=0.5,
        total_seconds=60.0,
        trained_seconds=30.0,
        startup_seconds=9.0,
        parity_seconds=2.0,
        save_seconds=3.0,
        lost_seconds=10.0,
        between_lives_seconds=5.0,
        other_seconds=1.0,
    )
    assert goodput([], steps) == goodput([{"first_step": 1}], steps) == goodput([life(1.0, None)], steps) == Goodput()


def test_lost_are_steps_trained_again_and_what_a_life_did_after_its_last_sign(ranks: Ranks, tmp_path: Path) -> None:
    """As the files say it: a life that ended without a word, 50 s after its last step."""
    recipe = recipe_of("zero2", train=dict(steps=5), checkpoint=dict(every=2))
    start_life(tmp_path, layout={}, started=time.time())
    lived(ranks, recipe, tmp_path)
    rows = [json.dumps(step | {"seconds": 2.0}) for step in read_steps(tmp_path / "steps.jsonl")]
    (tmp_path / "steps.jsonl").write_text("\n".join([*rows, rows[0].replace('"step": 1', '"step": 6')]) + "\n")
    reason = "rank 1: ValueError: boom\nlogs/rank-1.log ends with:"
    write_record(tmp_path / "record.json", new_record(recipe) | {"status": "failed", "reason": reason})
    late = time.time() + 50
    os.utime(tmp_path / "record.json", (late, late))
    assert close_life(tmp_path) == "failed: rank 1: ValueError: boom"
    [first] = read_lives(tmp_path) or []
    assert first["last_step"] == 6 and first["lost_seconds"] == pytest.approx(50, abs=5) and first["save_seconds"] > 0
    (tmp_path / "record.json").unlink()
    lived(ranks, recipe_of("zero2", train=dict(steps=8), checkpoint=dict(every=2)), tmp_path, tmp_path)
    record = read_record(tmp_path / "record.json")
    assert record["checkpoint"]["lives"][1]["lost_seconds"] == 2.0  # of step 6
    assert record["goodput"]["trained_seconds"] == pytest.approx(
        sum(step["seconds"] for step in read_steps(tmp_path / "steps.jsonl"))
    )


def test_the_table_tells_of_goodput_where_a_run_saved_or_had_more_than_one_life() -> None:
    record = new_record(recipe_from_tables({"name": "long"})) | {"status": "ok"}
    record["goodput"] |= {"fraction": 0.5, "total_seconds": 60.0, "lost_seconds": 10.0}
    record["checkpoint"]["lives"] = [{}]
    assert "goodput" not in table([record])
    record["checkpoint"]["lives"] = [{}, {}]
    assert "long: goodput: 50.0 % of 60.0 s trained what counts, in 2 lives; lost 10.0 s" in table([record])
    record["checkpoint"] |= {"lives": [{}], "saves": 3}
    assert "in 1 life; lost 10.0 s" in table([record])
