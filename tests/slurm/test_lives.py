"""Runs with checkpoints live on when Slurm ends them early, and come to the same losses, digit by digit."""

from typing import Any

import pytest
from lab import Lab, ended
from testbed import Testbed

from parallel.measure.record import read_record, read_steps

STEPS = 60
SAVING = ("--set", f"train.steps={STEPS}", "--set", "checkpoint.every=10", "--set", "train.parity=false")


@pytest.fixture(scope="module")
def losses(testbed_of_hosts: Testbed, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of a run that nobody interrupts."""
    lab = Lab(testbed_of_hosts, tmp_path_factory.mktemp("whole"))
    lab.submit("small.toml", *SAVING)
    lab.until("runs/small", ended)
    steps = read_steps(lab.folder / "runs/small/steps.jsonl")
    assert len(steps) == STEPS
    return [step["loss"] for step in steps]


def past(step: int) -> Any:
    """True once the run has come so far."""

    def true(rows: list[dict[str, Any]]) -> bool:
        assert not ended(rows), rows
        return all(row["state"] == "running" and (row["step"] or 0) >= step for row in rows)

    return true


def whole(lab: Lab, losses: list[float], *, lives: int) -> None:
    """The run has come to its end, in so many lives, as if nobody had interrupted it."""
    record = read_record(lab.folder / "runs/small/record.json")
    assert record["status"] == "ok" and len(record["checkpoint"]["lives"]) == lives, lab.log("runs/small")
    steps = read_steps(lab.folder / "runs/small/steps.jsonl")
    assert [step["loss"] for step in steps] == losses
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_an_early_warning_saves_the_run_and_queues_it_again(lab: Lab, losses: list[float], launcher: str) -> None:
    lab.site(f'launcher = "{launcher}"')
    job = lab.submit("small.toml", *SAVING)["job"]
    n_lives = 3 if launcher == "srun" else 2
    reached = 6
    for life in range(1, n_lives):
        lab.until("runs/small", past(reached + 2))  # two of this life's own: of a new one the last one's are seen
        lab.slurm("scancel", "--batch", "--signal=USR1", job)
        [row] = lab.until("runs/small", lambda rows, life=life: rows[0]["requeued"] == life)
        reached = row["step"]
    [row] = lab.until("runs/small", ended)
    assert row["state"] == "done" and row["requeued"] == n_lives - 1, lab.log("runs/small")
    whole(lab, losses, lives=n_lives)
    assert lab.log("runs/small").count(f"job {job}: 2 ranks on each of 2 nodes") == n_lives  # the log is one
    assert "not queued again" not in lab.log("runs/small")


@pytest.mark.long
def test_after_so_many_requeues_it_ends_and_says_how_to_go_on(lab: Lab, losses: list[float]) -> None:
    lab.site('launcher = "srun"\nrequeues = 0')
    job = lab.submit("small.toml", *SAVING)["job"]
    lab.until("runs/small", past(8))
    lab.slurm("scancel", "--batch", "--signal=USR1", job)
    [row] = lab.until("runs/small", ended)
    assert row["state"] == "failed" and row["reason"].startswith("failed: stopped by SIGTERM after step "), row
    assert lab.slurm.job(job)["ExitCode"] == "75:0"
    assert "not queued again: it was 0 times, of 0" in lab.log("runs/small")
    refused = lab("submit", "small.toml", "--site", "site.toml", *SAVING, check=False)
    assert refused.returncode == 2 and "go on with --resume" in refused.stderr
    lab.submit("small.toml", *SAVING, "--resume")
    lab.until("runs/small", ended)
    whole(lab, losses, lives=2)


@pytest.mark.long
def test_a_warning_does_not_end_a_run_that_cannot_save_itself(lab: Lab) -> None:
    job = lab.submit("small.toml", "--set", f"train.steps={STEPS}", "--set", "train.parity=false")["job"]
    lab.until("runs/small", past(5))
    lab.slurm("scancel", "--batch", "--signal=USR1", job)
    [row] = lab.until("runs/small", ended)
    assert row["state"] == "done" and row["step"] == STEPS


def test_a_job_that_a_higher_partition_preempts_goes_on_when_that_is_done(lab: Lab, losses: list[float]) -> None:
    job = lab.submit("small.toml", *SAVING)["job"]
    lab.until("runs/small", past(8))
    urgent = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null")
    higher = lab.slurm("sbatch", "--parsable", *urgent, "--wrap=hostname").stdout.strip()
    lab.slurm.wait_for(higher, "COMPLETED", seconds=90)
    [row] = lab.until("runs/small", ended)
    assert row["state"] == "done" and row["requeued"] == 1, lab.log("runs/small")
    whole(lab, losses, lives=2)
    assert lab.slurm.job(job)["ExitCode"] == "0:0"


# The head of the job, on which its script runs, and its second node.
@pytest.mark.parametrize("node", ["n1", pytest.param("n2", marks=pytest.mark.long)])
def test_a_node_dies_amid_a_step_and_others_take_over(lab: Lab, losses: list[float], node: str) -> None:
    job = lab.submit("small.toml", *SAVING)["job"]
    lab.until("runs/small", past(12))
    lab.slurm.do(f"kill {node}")
    try:
        lab.until("runs/small", lambda rows: rows[0]["requeued"] == 1)
        [row] = lab.until("runs/small", ended)
    finally:
        lab.slurm.do(f"start {node}")
    assert row["state"] == "done" and node not in lab.slurm.job(job)["NodeList"], lab.log("runs/small")
    whole(lab, losses, lives=2)


def test_a_job_that_may_not_be_queued_again_fails_with_its_node(lab: Lab) -> None:
    job = lab.submit("small.toml", *SAVING)["job"]
    lab.slurm("scontrol", "update", f"JobId={job}", "Requeue=0")
    lab.until("runs/small", past(12))
    lab.slurm.do("kill n2")
    try:
        [row] = lab.until("runs/small", ended)
    finally:
        lab.slurm.do("start n2")
    assert lab.slurm.job(job)["JobState"] == "NODE_FAIL"
    assert row["state"] == "failed" and row["requeued"] == 0 and row["reason"].endswith("Slurm says NODE_FAIL")
