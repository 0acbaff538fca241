"""Recipes and comparisons that Slurm runs, on two nodes of two ranks, from `lab submit` to the record."""

import json

import pytest
from lab import ALL_OVER, ENDLESS, RECIPE, Lab, ended, training

from parallel.measure.record import read_record

COMPARISON = """
base = "small.toml"
[[variant]]
name = "fsdp-tp"
[[variant]]
name = "fails"
set = { "train.learning_rate" = 1e3, "train.steps" = 50 }
[[variant]]
name = "refused"
set = { "parallel.tp" = 3 }
expect = "refused"
[[variant]]
name = "one"
set = { "parallel.dp_shard" = 1, "parallel.tp" = 1 }
"""


@pytest.mark.parametrize("launcher", ["torchrun", "srun", pytest.param("srun, one GPU a task", marks=pytest.mark.long)])
def test_a_recipe_is_trained_on_two_nodes(lab: Lab, launcher: str) -> None:
    own = "one_gpu_per_task = true" if "one" in launcher else ""
    lab.site(f'launcher = "{launcher.partition(",")[0]}"\n{own}\n[environment]\nOMP_NUM_THREADS = "2"')
    noted = lab.submit("small.toml", *(["--preflight"] if launcher == "srun" else []))
    [row] = lab.until("runs/small", ended)
    assert ("ok   2 of 2 hosts answered: n1, n2" in lab.log("runs/small")) == (launcher == "srun")
    assert row["state"] == "done" and row["step"] == 3 and row["job"] == noted["job"], lab.log("runs/small")
    record = read_record(lab.folder / "runs/small/record.json")
    assert record["status"] == "ok" and record["parity"]["passed"] and len(record["steps"]) == 3
    assert record["environment"]["hosts"] == [0, 0, 1, 1] and record["environment"]["cluster"] == "our cluster"
    sent = {row["mesh_dim"]: (row["bytes_per_rank"], row["bytes_across_hosts"]) for row in record["traffic"]}
    assert sent["dp_shard"][0] == sent["dp_shard"][1] > 0 and sent["tp"][0] > 0 == sent["tp"][1]
    assert "matrix product on 2 threads" in record["flops"]["peak_source"]  # OMP_NUM_THREADS of the site
    assert "2 ranks on each of 2 nodes" in lab.log("runs/small")


def test_a_comparison_is_an_array_and_its_page_comes_when_all_have_ended(lab: Lab) -> None:
    (lab.folder / "both.toml").write_text(COMPARISON)
    noted = lab.submit("both.toml")
    assert noted["tasks"] == {"fsdp-tp": f"{noted['job']}_0", "fails": f"{noted['job']}_1", "one": f"{noted['job']}_3"}
    rows = lab.until("runs/both", ended)
    assert [(row["name"], row["state"]) for row in rows] == [
        *(("fsdp-tp", "done"), ("fails", "failed"), ("refused", "done"), ("one", "done"))
    ], lab.log("runs/both")
    assert rows[1]["reason"].startswith("failed: rank ") and "Diverged: step 5 gave loss nan" in rows[1]["reason"]
    assert lab.slurm.wait_for(noted["report"], *ALL_OVER)["JobState"] == "COMPLETED"
    assert "fails: failed: rank " in (lab.folder / "runs/both/table.txt").read_text()
    page = (lab.folder / "runs/both/page.html").read_text()
    assert all(f'"name":"{name}"' in page for name in ("fsdp-tp", "fails", "refused", "one"))
    assert lab("status", "runs/both", check=False).returncode == 1


def test_a_job_ends_at_its_time_limit(lab: Lab) -> None:
    job = lab.submit("small.toml", *ENDLESS, "--time", "1")["job"]
    lab.until("runs/small", training)
    lab.slurm("scontrol", "update", f"JobId={job}", "EndTime=now")
    [row] = lab.until("runs/small", ended)
    assert lab.slurm.job(job)["JobState"] == "TIMEOUT"
    assert row["state"] == "failed" and row["step"] > 0
    assert row["reason"].startswith("timeout: ended by Slurm at its time limit, and no rank"), lab.log("runs/small")


def test_scancel_ends_a_job(lab: Lab) -> None:
    lab.site('launcher = "torchrun"')
    job = lab.submit("small.toml", *ENDLESS)["job"]
    lab.until("runs/small", training)
    lab.slurm("scancel", job)
    [row] = lab.until("runs/small", ended)
    assert lab.slurm.job(job)["JobState"] == "CANCELLED"
    assert row["state"] == "failed" and row["step"] > 0
    assert row["reason"].startswith("failed: ended by SIGTERM, as scancel does"), lab.log("runs/small")


def test_a_controller_that_dies_and_comes_back_finds_the_job(lab: Lab) -> None:
    lab.submit("small.toml", *ENDLESS, "--set", "train.steps=100")
    lab.until("runs/small", training)
    lab.slurm.do("kill slurmctld")
    answer = lab("status", "runs/small", check=False)
    assert answer.returncode == 1 and "unknown" in answer.stdout and "Unable to contact" in answer.stderr
    lab.slurm.do("start slurmctld")
    [row] = lab.until("runs/small", ended)
    assert row["state"] == "done" and row["step"] == 100


def test_two_jobs_on_one_node_do_not_meet(lab: Lab) -> None:
    one = ("--set", "parallel.tp=1", "--set", "train.steps=50")
    jobs = [lab.submit("small.toml", "--set", f"name={name}", *one)["job"] for name in ("a", "b")]
    rows = lab.until("runs", ended)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert {row["nodes"] for row in rows} == {"n1"} and len(set(jobs)) == 2


def test_what_cannot_fit_is_not_queued(lab: Lab) -> None:
    before = lab.slurm("squeue", "--noheader", "--states=all").stdout
    for arguments, reason in (
        (("--memory", "1KiB"), "--memory"),
        (("--nodes", "3"), "--nodes = 3: does not divide the 4 ranks of small; use one of 2, 4"),
        (("--nodes", "1"), "--nodes = 1: nodes of 2 ranks have 2"),
        (("--time", "soon"), "sbatch: Invalid --time specification"),
    ):
        answer = lab("submit", "small.toml", "--site", "site.toml", *arguments, check=False)
        assert answer.returncode == 2 and reason in answer.stderr and answer.stderr.count("\n") == 1
    assert lab.slurm("squeue", "--noheader", "--states=all").stdout == before


def test_hostile_names_change_nothing_but_the_label(lab: Lab) -> None:
    hostile = "a 'b' \"c\" $(touch pwned) `touch pwned` ; touch pwned #\n%j & *"
    file = lab.folder / f"{hostile}.toml"
    file.write_text(RECIPE.replace("dp_shard = 2\ntp = 2", ""))
    (lab.folder / "site.toml").write_text(
        f"name = {json.dumps(hostile)}\n[environment]\nHOSTILE = {json.dumps(hostile)}\nBASH_ENV_2 = 'x'\n"
    )
    out = hostile.replace("\n", "")
    lab.submit(str(file), "--out", out, "--set", "name=safe")
    [row] = lab.until(f"{out}/safe", ended)
    assert row["state"] == "done"
    assert read_record(lab.folder / out / "safe/record.json")["environment"]["cluster"] == hostile
    assert not list(lab.folder.rglob("pwned"))


def test_a_disk_that_is_full(lab: Lab) -> None:
    lab.submit("small.toml", *ENDLESS, "--out", "/run/full")
    lab.until("/run/full/small", training)
    lab.slurm("sh", "-c", "cat /dev/zero > /run/full/filler", check=False)
    [row] = lab.until("/run/full/small", ended)
    assert row["state"] == "failed" and row["reason"].endswith("there is no record.json, and its disk is full")
    queued = lab.slurm("squeue", "--noheader").stdout
    answer = lab("submit", "small.toml", "--site", "site.toml", "--out", "/run/full/other", check=False)
    assert answer.returncode == 1 and answer.stderr.startswith("lab: ") and "No space left" in answer.stderr
    assert lab.slurm("squeue", "--noheader").stdout == queued
    lab.slurm("sh", "-c", "rm -r /run/full/*")
