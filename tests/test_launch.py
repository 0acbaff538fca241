"""The `lab` command and its ranks, as real processes. Most ranks run a stand-in for parallel.training that goes wrong
as the recipe's name says, put first on PYTHONPATH; the last tests train."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import launch.starting
import parallel
from launch.cli import main
from launch.compare import is_comparison, load_comparison, on_one_device
from launch.folder import held_alone, recipe_toml, under_way
from launch.table import WIDTH, row, table
from launch.terminal import n_bytes, printable
from launch.verdict import is_out_of_memory, place, record_error
from parallel.measure.record import new_record, read_record, write_record
from parallel.recipe import RecipeError, load_recipe, read_toml, recipe_from_tables
from parallel.transformer import Transformer

RECIPES = Path(__file__).parents[1] / "recipes"

STAND_IN = """
import json, os, resource, signal, subprocess, sys, threading, time
from pathlib import Path
from parallel.measure.record import new_record, read_steps, write_record
from parallel.recipe import RecipeError

def book(pid):
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{pid}\\n")

def forker(launcher):
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"launch.forking" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)

match os.environ.get("AT_IMPORT"):
    case "hangs":
        book(os.getpid())
        while True:
            time.sleep(0.02)
    case "starts a thread":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    case "raises":
        raise ImportError("no such kernel")
    case "works":
        bytes(2**28)  # 256 MiB, freed at once
        while sum(os.times()[:2]) < 1:
            pass

def facts():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "module": Path("/proc/self/cmdline").read_text().split("\\0")[3],
        "parent": os.getppid(),
        "leads_session": os.getsid(0) == os.getpid(),
        "threads": int(status["Threads"]),
        "cpu_seconds": sum(os.times()[:4]),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "files": [os.readlink(path) for path in sorted(Path("/proc/self/fd").iterdir()) if path.exists()],
        "environment": dict(os.environ),
        "path": sys.path,
    }

def wait_for_peers():
    while True:
        time.sleep(0.02)

def stuck():
    while True:
        time.sleep(0.02)

def train(recipe, *, out, peak_flops, profile, matmul, resume_from, asked, told):
    RANK = int(os.environ["RANK"])
    book(os.getpid())
    print(f"rank {RANK} of {os.environ['WORLD_SIZE']}, threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    if RANK == 0:
        for step in (1, 2):
            line = {"step": step, "loss": 2.5 - step, "grad_norm": 1.0, "seconds": 0.01}
            with open(out / "steps.jsonl", "a") as file:
                file.write(json.dumps(line) + "\\n")
            told(line)
    while len(read_steps(out / "steps.jsonl")) < 2:
        time.sleep(0.01)
    what, _, rank = recipe.name.partition("-rank-")
    if rank and int(rank) != RANK:
        if what == "raises":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
        wait_for_peers()
    if what == "raises":
        time.sleep(0.3)  # its connections are closed before it has said why
        raise ValueError("boom\\n\\x1b[31m in red")
    if what == "spills":
        words = " and ".join(os.environ[name] for name in os.environ["SPILLS"].split())
        print(words, flush=True)
        print(words, file=sys.stderr)
        raise ValueError(words)
    if what == "killed":
        book(subprocess.Popen(["sleep", "600"]).pid)
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "tells":
        (out / f"facts-{RANK}.json").write_text(json.dumps(facts()))
    if what == "bereft" and RANK == 1:
        while len(Path(os.environ["PIDS"]).read_text().split()) < 3:  # not before all are forked
            time.sleep(0.01)
        os.kill(forker(os.getppid()), signal.SIGKILL)
    if what == "leaves":
        os._exit(7)
    if what == "hangs":
        stuck()
    if what == "hangs-with-child":
        book(subprocess.Popen(["sleep", "600"]).pid)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stuck()
    if what == "oom":
        raise MemoryError("no room for 3 GiB")
    if what == "refused":
        raise RecipeError("train.device", "cuda", "needs 3 GPUs on this host, which has 0; use auto")
    if RANK == 0 and what != "silent":
        record = new_record(recipe) | {"status": "ok", "steps": read_steps(out / "steps.jsonl")}
        record["environment"] |= {"float32_matmul": matmul or "medium", "note": f"asked for {matmul}"}
        record["parity"] |= {"passed": what != "differs", "max_rel_grad_diff": 1.5e-15, "max_abs_loss_diff": 0.0}
        write_record(out / "record.json", record)
    if what == "dies-late" and RANK == 2:
        while not (out / "record.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGABRT)
"""

RECIPE = """
[data]
source = "synthetic"
[model]
n_layers = 2
[train]
seq_len = 16
global_batch = 6
[parallel]
dp_shard = 3
"""


def _heed_signals() -> None:
    """Tests under nohup or in the background of a script ignore some, and so would the launcher that they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Lab:
    """Runs `lab` in a folder of its own, with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pids = folder, folder / "pids"
        self.started: list[subprocess.Popen[str]] = []
        package = folder / "stand-in" / "parallel"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"__path__.append({parallel.__path__[0]!r})\n")
        (package / "training.py").write_text(STAND_IN)
        (folder / "base.toml").write_text(RECIPE)
        self.environment = os.environ | {"PYTHONPATH": str(package.parent), "PIDS": str(self.pids)}

    def start(self, *arguments: str, **settings: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launch.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            preexec_fn=_heed_signals,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings,
        )
        self.started.append(process)
        return process

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=240)
        assert not re.search("^Traceback", err, re.MULTILINE), err  # that of a rank is quoted from its log, indented
        assert "\x1b" not in out + err
        return process.returncode, out, err

    def run(self, name: str, *arguments: str) -> tuple[int, str, str]:
        """A run that goes wrong as its name says."""
        return self("run", "base.toml", "--set", f"name={name}", *arguments)

    def record(self, *folders: str) -> dict[str, Any]:
        return read_record(self.folder.joinpath("runs", *folders, "record.json"))

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def running(self) -> list[int]:
        """Of the processes of the ranks and their children, those that are left."""
        return [pid for pid in map(int, self.pids.read_text().split()) if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for process in lab.started:  # of a test that failed
        process.kill()
    if lab.pids.exists():
        assert lab.running() == []


# ---- a run that ends well ------------------------------------------------------------------------------------------


def test_a_run_prints_its_progress_and_a_table_and_leaves_its_files(lab: Lab) -> None:
    code, out, err = lab.run("good", "--nproc", "3")
    assert (code, err) == (0, "")
    assert out.startswith("rank 0 of 3, threads 1\n") and "passed" in out
    assert out.splitlines()[-1] == "runs/good/record.json" and out.count("Parity against") == 1
    folder = lab.folder / "runs" / "good"
    assert sorted(path.name for path in folder.iterdir()) == [
        "lives.json",
        "logs",
        "recipe.toml",
        "record.json",
        "steps.jsonl",
    ]
    assert (folder / "logs" / "rank-0.log").read_text() == "rank 0 of 3, threads 1\n"
    assert (folder / "logs" / "rank-2.log").read_text() == "rank 2 of 3, threads 1\n"
    assert lab.record("good")["status"] == "ok" and len(lab.record("good")["steps"]) == 2
    assert load_recipe(folder / "recipe.toml") == load_recipe(lab.folder / "base.toml", ["name=good"])


def test_labels_reach_the_record_whatever_becomes_of_the_run(lab: Lab) -> None:
    for name in ("good", "leaves-rank-2"):
        lab.run(name, "--cluster-name", "alpha", "--tag", "nightly", "--tag", "h100", "--note", "new NCCL")
        assert lab.record(name)["labels"] == {
            **{"tags": ["nightly", "h100"], "note": "new NCCL"},
            "job_id": os.environ.get("SLURM_JOB_ID"),
        }
        assert lab.record(name)["environment"]["cluster"] == "alpha"


def test_a_second_run_of_the_name_starts_afresh_and_removes_only_what_a_run_leaves(lab: Lab) -> None:
    folder = lab.folder / "runs" / "silent"
    (folder / "logs").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "logs" / "rank-9.log").write_text("old")
    (folder / "logs" / "notes.txt").write_text("mine")
    write_record(folder / "record.json", new_record({"name": "old"}) | {"status": "ok"})
    (folder / "steps.jsonl").write_text('{"step": 1}\n' * 5)
    code, _, err = lab.run("silent")
    assert code == 1 and "none wrote record.json" in err  # the old record is not taken for the new one's
    assert len(lab.record("silent")["steps"]) == 2
    assert (folder / "notes.txt").read_text() == (folder / "logs" / "notes.txt").read_text() == "mine"
    assert not (folder / "logs" / "rank-9.log").exists()


def test_a_folder_that_is_no_run_is_refused_and_untouched(lab: Lab) -> None:
    folder = lab.folder / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    code, out, err = lab.run("good")
    assert (code, out, err.count("\n")) == (2, "", 1) and "holds something that is no run" in err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (lab.folder / "file").write_text("")
    code, _, err = lab.run("good", "--out", "file")
    assert (code, err.count("\n")) == (2, 1) and "--out" in err


def test_json_is_alone_on_stdout(lab: Lab) -> None:
    code, out, err = lab.run("good", "--json")
    assert code == 0 and json.loads(out)["status"] == "ok" and "rank 0 of 3" in err
    code, out, _ = lab.run("oom", "--json")
    assert code == 1 and json.loads(out)["status"] == "oom"
    code, out, _ = lab("report", "runs", "--json")
    assert code == 0 and [shown["name"] for shown in json.loads(out)] == ["good", "oom"]
    code, out, _ = lab("check", "base.toml", "--json")
    assert code == 0 and json.loads(out)[0]["world_size"] == 3


def test_a_parity_that_does_not_hold_is_a_failure(lab: Lab) -> None:
    code, _, err = lab.run("differs")
    assert code == 1 and "parity FAILED" in err


# ---- a run that does not -------------------------------------------------------------------------------------------


def test_the_rank_that_raised_first_is_the_reason_and_its_peers_are_not(lab: Lab) -> None:
    code, _, err = lab.run("raises-rank-1")
    record = lab.record("raises-rank-1")
    assert code == 1 and record["status"] == "failed"
    assert record["reason"].startswith("rank 1: ValueError: boom \x1b[31m in red\nlogs/rank-1.log ends with:")
    assert len(record["steps"]) == 2 and record["layout"]["dp_shard"] == 3
    assert "rank 1: ValueError: boom \\x1b[31m in red" in err
    assert max(map(len, err.splitlines())) <= WIDTH + len("lab: ")


@pytest.mark.parametrize(
    ("name", "status", "exit_code", "reason"),
    [
        ("leaves-rank-2", "failed", 1, "rank 2 ended with exit code 7\n"),
        ("dies-late", "failed", 1, "rank 2 was killed by SIGABRT in train ("),
        ("oom", "oom", 1, "no room for 3 GiB"),
        ("refused", "refused", 2, "train.device = 'cuda': needs 3 GPUs"),
    ],
)
def test_each_end_has_its_status(lab: Lab, name: str, status: str, exit_code: int, reason: str) -> None:
    code, _, err = lab.run(name)
    record = lab.record(name)
    assert (code, record["status"]) == (exit_code, status)
    assert reason in record["reason"]
    assert len(record["steps"]) == 2
    assert reason.strip() in " ".join(err.split())


def test_a_rank_that_hangs_ends_the_run_at_its_time_limit_and_the_record_says_where_each_was(lab: Lab) -> None:
    code, *_ = lab.run("hangs-rank-1", "--set", "train.time_limit_seconds=5")
    record = lab.record("hangs-rank-1")
    assert (code, record["status"], len(record["steps"])) == (1, "timeout", 2)
    lines = STAND_IN.splitlines()
    peers = lines.index("def wait_for_peers():") + 3
    rank = lines.index("def stuck():") + 3
    assert record["reason"].startswith("not done in 5 s (train.time_limit_seconds): ranks 0, 2 in wait_for_peers")
    assert (
        f"wait_for_peers (parallel/training.py:{peers}); rank 1 in stuck (parallel/training.py:{rank})"
        in (record["reason"])
    )
    assert "most recent call first" in (lab.folder / "runs/hangs-rank-1/logs/rank-2.log").read_text()


@pytest.mark.parametrize(
    ("number", "name", "n_processes"),
    [(signal.SIGINT, "hangs", 3), (signal.SIGTERM, "hangs-with-child", 6), (signal.SIGHUP, "hangs", 3)],
)
def test_a_signal_ends_the_run_and_all_its_processes(
    lab: Lab, number: signal.Signals, name: str, n_processes: int
) -> None:
    process = lab.start("run", "base.toml", "--set", f"name={name}")
    lab.wait_for(lambda: lab.pids.exists() and len(lab.pids.read_text().split()) == n_processes)
    assert len(lab.running()) == n_processes
    process.send_signal(number)
    process.send_signal(number)  # an impatient second one changes nothing
    _, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (1, f"lab: interrupted by {number.name}; nothing is left running\n")
    assert lab.running() == []
    record = lab.record(name)
    assert (record["status"], record["reason"]) == ("failed", f"interrupted by {number.name}")
    assert len(record["steps"]) == 2


def test_ranks_do_not_outlive_a_launcher_that_is_killed(lab: Lab) -> None:
    process = lab.start("run", "base.toml", "--set", "name=hangs-rank-1")
    lab.wait_for(lambda: lab.pids.exists() and len(lab.pids.read_text().split()) == 3)
    started = children(process.pid)
    assert len(started) == 4 and set(started) > set(lab.running())  # ranks, and what they were forked from
    process.kill()
    process.communicate()
    lab.wait_for(lambda: not any(map(is_running, started)))


def test_an_error_of_the_launcher_itself_leaves_nothing_running(lab: Lab) -> None:
    process = lab.start("run", "base.toml", "--set", "name=hangs-rank-0")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # its first line of progress has nowhere to go
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
    assert lab.record("hangs-rank-0")["reason"] == "the launcher failed: BrokenPipeError: [Errno 32] Broken pipe"


def test_the_port_is_kept_for_rank_0() -> None:
    with launch.starting.free_port() as port, socket.socket() as rank_0:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        rank_0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank_0.bind(("", port))
        rank_0.listen()


def test_a_stack_is_read_from_the_main_thread_and_named_by_who_was_called() -> None:
    ours = f"{parallel.__path__[0]}/strategies/data.py"
    torch_file = "/home/a/parallel/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
    stack = f"""rank 0 prints something
Thread 0x00007f (most recent call first):
  File "{ours}", line 7 in another_thread

Current thread 0x00007e (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
  File "{torch_file}", line 2810 in all_reduce
  File "{torch_file}", line 83 in wrapper
  File "{ours}", line 40 in reduce_gradients
  File "{parallel.__path__[0]}/training.py", line 12 in train
"""
    assert place(stack) == "in all_reduce (parallel/strategies/data.py:40)"
    started = 'Current thread 0x1 (most recent call first):\n  File "/usr/lib/python3/selectors.py", line 5 in select\n'
    assert place(started) == "in select (selectors.py:5)"
    assert place("Fatal Python error") == place("") == "gave no stack"


# ---- the process that ranks are forked from -------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def heeds(pid: int, number: signal.Signals) -> bool:
    """Whether that process has a handler for the signal."""
    [caught] = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


def tell(lab: Lab, **environment: str) -> list[dict[str, Any]]:
    """What the ranks of a run find when they begin to train."""
    lab.environment |= environment
    code, _, err = lab.run("tells")
    assert (code, err) == (0, "")
    return told(lab, "tells")


def told(lab: Lab, *folders: str) -> list[dict[str, Any]]:
    folder = lab.folder.joinpath("runs", *folders)
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(3)]


def test_a_forked_rank_has_its_own_session_files_and_figures_and_the_environment_of_one_that_was_not(lab: Lab) -> None:
    forked, new = tell(lab, AT_IMPORT="works"), tell(lab, AT_IMPORT="starts a thread")
    assert {facts["module"] for facts in forked} == {"launch.forking"}  # one thread where it was forked
    assert {facts["module"] for facts in new} == {"launch.train"}
    for rank, (of_forked, of_new) in enumerate(zip(forked, new, strict=True)):
        assert of_forked["leads_session"] and of_new["leads_session"] and of_forked["threads"] == 1
        assert of_forked["cpu_seconds"] < 1 and of_forked["peak_rss_bytes"] < 2**28  # what its imports took is not its
        log = str(lab.folder / f"runs/tells/logs/rank-{rank}.log")
        stdin, stdout, *rest = of_forked["files"]
        held = [str(lab.folder / "runs/tells")] * (rank == 0)  # launch/folder.py
        assert (stdin, rest) == ("/dev/null", [log, *held]) and (
            stdout.startswith("pipe:") if rank == 0 else stdout == log
        )
        for facts in (of_forked, of_new):
            facts["environment"] = {
                k: v for k, v in facts["environment"].items() if k not in ("MASTER_PORT", "AT_IMPORT")
            }
        assert of_forked["environment"] == of_new["environment"] and of_forked["path"] == of_new["path"]
        assert of_forked["environment"]["RANK"] == str(rank)
        assert of_forked["environment"]["OMP_WAIT_POLICY"] == "passive"  # set before torch was imported


def test_a_rank_may_have_more_threads_than_one(lab: Lab) -> None:
    """numpy would start them where it is imported, and nothing may be forked beside a thread."""
    facts = tell(lab, OMP_NUM_THREADS="2")
    assert {of_rank["module"] for of_rank in facts} == {"launch.forking"}
    assert not any("OMP_WAIT_POLICY" in of_rank["environment"] for of_rank in facts)  # its steps are faster without
    assert (lab.folder / "runs/tells/logs/rank-0.log").read_text() == "rank 0 of 3, threads 2\n"


def test_what_cannot_be_imported_is_said_by_the_ranks(lab: Lab) -> None:
    lab.environment["AT_IMPORT"] = "raises"
    code, _, err = lab.run("good")
    assert code == 1 and re.match(r"lab: good: failed: rank \d: ImportError: no such kernel\n", err)


def test_the_process_that_forks_may_be_killed_and_neither_its_ranks_nor_the_next_ones_care(lab: Lab) -> None:
    code, out, err = lab("compare", comparison_file(lab, "bereft", "tells"))
    assert (code, err) == (0, "") and out.count("parity passed") == 2
    [facts] = {facts["module"] for facts in told(lab, "trio", "tells")}
    assert facts == "launch.forking"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_amid_the_imports_leaves_nothing(lab: Lab, number: signal.Signals) -> None:
    lab.environment["AT_IMPORT"] = "hangs"
    process = lab.start("run", "base.toml", "--set", "name=good")
    lab.wait_for(lambda: lab.pids.exists() and lab.pids.read_text().endswith("\n"))
    lab.wait_for(lambda: heeds(process.pid, signal.SIGTERM))  # has checked its recipe meanwhile
    assert children(process.pid) == lab.running()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    lab.wait_for(lambda: lab.running() == [])
    if number == signal.SIGTERM:
        assert (process.returncode, err) == (1, "lab: interrupted by SIGTERM; nothing is left running\n")
        assert lab.record("good")["reason"] == "interrupted by SIGTERM"


def test_imports_that_take_too_long_end_the_run_at_its_time_limit(lab: Lab) -> None:
    lab.environment["AT_IMPORT"] = "hangs"
    code, *_ = lab.run("good", "--set", "train.time_limit_seconds=1")
    record = lab.record("good")
    reason = "not done in 1 s (train.time_limit_seconds): its imports were not done"
    assert (code, record["status"], record["reason"]) == (1, "timeout", reason)


# ---- one rank ------------------------------------------------------------------------------------------------------


def rank(lab: Lab, *arguments: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "launch.train", *arguments]
    done = subprocess.run(
        command, cwd=lab.folder, env=lab.environment | environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_a_rank_by_hand_checks_the_world_size_and_rank_0_alone_says_so(lab: Lab) -> None:
    code, err = rank(lab, "base.toml", RANK="0", WORLD_SIZE="4")
    assert (code, err.count("\n")) == (2, 1) and "WORLD_SIZE = 4" in err and "--nproc-per-node 3" in err
    assert rank(lab, "base.toml", RANK="1", WORLD_SIZE="4") == (2, "")
    assert rank(lab, "base.toml", "--set", "train.steps=0", RANK="1", WORLD_SIZE="3") == (2, "")
    code, err = rank(lab, "base.toml", RANK="zero", WORLD_SIZE="3")
    assert (code, err.count("\n")) == (2, 1) and "RANK = 'zero'" in err
    code, err = rank(lab, "base.toml", "--sett", "a=b")
    assert (code, err.count("\n")) == (2, 1) and "did you mean --set?" in err
    assert not (lab.folder / "runs").exists() and not lab.pids.exists()


def test_a_rank_by_hand_records_its_failure_once(lab: Lab) -> None:
    folder = lab.folder / "runs" / "oom"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("kept")
    write_record(folder / "record.json", new_record({"name": "old"}) | {"status": "ok"})
    alone = ("base.toml", "--set", "name=oom", "--set", "parallel.dp_shard=1")
    surroundings = dict(RANK="0", WORLD_SIZE="1", OMP_NUM_THREADS="1")
    code, err = rank(lab, *alone, **surroundings)
    assert code == 1 and "MemoryError: no room" in err
    record = lab.record("oom")
    assert (record["status"], record["reason"]) == ("oom", "rank 0: MemoryError: no room for 3 GiB")
    before = (folder / "record.json").read_text()
    assert rank(lab, *alone, **surroundings | {"RANK": "5"})[0] == 1  # a later rank does not write over it
    assert (folder / "record.json").read_text() == before
    assert (folder / "recipe.toml").read_text() == "kept"


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("out of luck"))


def test_what_torch_s_pipeline_wraps_is_seen(tmp_path: Path) -> None:
    error = RuntimeError("[Stage 1] failed to run forward")
    error.__cause__ = MemoryError("no room")
    record_error(load_recipe(RECIPES / "strategies" / "pp-1f1b.toml"), tmp_path, 2, error)
    record = read_record(tmp_path / "record.json")
    told = "rank 2: RuntimeError: [Stage 1] failed to run forward, because of MemoryError: no room"
    assert (record["status"], record["reason"]) == ("oom", told)


# ---- comparisons ---------------------------------------------------------------------------------------------------


def comparison_file(lab: Lab, *names: str, settings: str = "{}") -> str:
    variants = "".join(f'[[variant]]\nname = "{name}"\nset = {settings}\n' for name in names)
    (lab.folder / "trio.toml").write_text(f'base = "base.toml"\n{variants}')
    return "trio.toml"


def test_a_rank_that_is_killed_is_a_row_with_its_reason_and_the_other_variants_run(lab: Lab) -> None:
    file = comparison_file(lab, "zebra", "killed-rank-1", "ant")
    with (lab.folder / file).open("a") as text:
        text.write('[[variant]]\nname = "odd"\nset = { "model.n_heads" = 5 }\nexpect = "refused"\n')
    code, out, err = lab("compare", file)
    assert (code, err) == (1, "")
    rows = [line.split() for line in out.splitlines() if line.startswith(("zebra ", "killed", "ant ", "odd "))]
    ends = [(row[0], row[-1]) for row in rows[:4]]
    assert ends == [("zebra", "passed"), ("killed-rank-1", "failed"), ("ant", "passed"), ("odd", "refused")]
    assert "[2/4] killed-rank-1  (0:0" in out and "about 0:0" in out
    assert "killed-rank-1: failed: rank 1 was killed by SIGKILL" in out and "    last words" in out
    assert "odd: refused: model.n_heads = 5: does not divide model.d_model = 128" in out
    assert out.splitlines()[-2:] == ["runs/trio/table.txt", "runs/trio/page.html"]
    assert "killed-rank-1" in (lab.folder / "runs" / "trio" / "page.html").read_text()
    saved = (lab.folder / "runs" / "trio" / "table.txt").read_text()
    assert saved in out and max(map(len, saved.splitlines())) <= WIDTH
    code, report, _ = lab("report", "runs/trio")
    assert (code, report) == (0, saved)
    reason = lab.record("trio", "killed-rank-1")["reason"]
    assert reason.endswith("logs/rank-1.log ends with:\nrank 1 of 3, threads 1\nlast words")
    assert lab.record("trio", "odd").keys() == lab.record("trio", "ant").keys()

    comparison_file(lab, "bee", "ant")
    with (lab.folder / file).open("a") as text:
        text.write('[[variant]]\nname = "odd"\nset = { "model.n_heads" = 5 }\nexpect = "refused"\n')
    (lab.folder / "runs" / "trio" / "zebra" / "notes.txt").write_text("mine")
    code, out, _ = lab("compare", file, "--json")
    assert code == 0 and [shown["name"] for shown in json.loads(out)] == ["bee", "ant", "odd"]
    left = sorted(str(path.relative_to(lab.folder / "runs" / "trio")) for path in lab.folder.glob("runs/trio/*"))
    assert left == ["ant", "bee", "comparison.json", "odd", "page.html", "table.txt", "zebra"]
    assert [path.name for path in (lab.folder / "runs" / "trio" / "zebra").iterdir()] == ["notes.txt"]


def test_an_interrupted_comparison_starts_no_further_variant(lab: Lab) -> None:
    process = lab.start("compare", comparison_file(lab, "good", "hangs-rank-0", "late"))
    lab.wait_for(lambda: lab.pids.exists() and len(lab.pids.read_text().split()) == 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err.count("\n")) == (1, 1) and "interrupted by SIGINT" in err
    assert [path.name for path in sorted(lab.folder.glob("runs/trio/*/"))] == ["good", "hangs-rank-0"]
    assert "[3/3]" not in out and "--resume goes on with what is left" in err


def test_resume_keeps_what_is_done_and_runs_the_rest(lab: Lab) -> None:
    file = comparison_file(lab, "first", "killed-rank-1", "second")
    code, *_ = lab("compare", file)
    assert code == 1
    before = {name: lab.record("trio", name)["environment"]["time_utc"] for name in ("first", "second")}
    lab.folder.joinpath("runs", "trio", "second", "record.json").unlink()  # as if it had been interrupted there
    comparison_file(lab, "first", "second", "third")
    code, out, _ = lab("compare", file, "--resume")
    assert code == 0
    heads = [line for line in out.splitlines() if line.startswith("[")]
    assert heads[0] == "[1/3] first  (done before)" and "(0:00 elapsed)" in heads[1] and "left)" in heads[2]
    assert lab.record("trio", "first")["environment"]["time_utc"] == before["first"]
    assert {lab.record("trio", name)["status"] for name in ("first", "second", "third")} == {"ok"}
    assert not lab.folder.joinpath("runs", "trio", "killed-rank-1").exists()
    # Another recipe, or other code, is another run.
    _, out, _ = lab("compare", file, "--resume", "--set", "train.steps=7")
    assert "done before" not in out
    for name in ("first", "second", "third"):
        record = lab.record("trio", name)
        record["environment"]["torch"] = "1.0"
        write_record(lab.folder / "runs" / "trio" / name / "record.json", record)
    _, out, _ = lab("compare", file, "--resume", "--set", "train.steps=7")
    assert "done before" not in out


def test_a_folder_is_of_one_comparison_at_a_time(lab: Lab) -> None:
    file = comparison_file(lab, "hangs-rank-0")
    first = lab.start("compare", file)
    lab.wait_for(lambda: lab.pids.exists() and len(lab.pids.read_text().split()) == 3)
    listed = (lab.folder / "runs" / "trio" / "comparison.json").read_bytes()
    code, out, err = lab("compare", comparison_file(lab, "good"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--out = 'runs/trio': process {first.pid} (since 20" in err and "wait for its end, or give another" in err
    assert (lab.folder / "runs" / "trio" / "comparison.json").read_bytes() == listed
    first.kill()  # whose lock ends with it
    first.communicate()
    lab.wait_for(lambda: lab.running() == [])
    code, out, _ = lab("compare", file)
    assert code == 0 and "good" in out


def test_who_only_asks_for_a_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    with held_alone(tmp_path):
        assert under_way(tmp_path) and under_way(tmp_path)
        with pytest.raises(RecipeError, match="another process has a comparison under way there"), held_alone(tmp_path):
            raise AssertionError("two at once")
    asking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_EX)
    threading.Timer(0.02, os.close, [asking]).start()
    with held_alone(tmp_path):
        assert under_way(tmp_path)
    assert not under_way(tmp_path)


def test_predict_dry_runs_every_variant_for_the_page(lab: Lab) -> None:
    code, out, _ = lab("compare", comparison_file(lab, "one", "two"), "--predict", "--cluster", "cpu")
    assert code == 0 and "dry run of two" in out and "told s" in out
    for name in ("one", "two"):
        run, predicted = lab.record("trio", name), lab.record("trio", "predicted", name)
        assert (predicted["kind"], predicted["status"]) == ("dry-run", "ok")
        assert predicted["recipe"] == run["recipe"] and predicted["memory"]["max_peak_bytes"] > 0
        assert run["prediction"] == predicted["prediction"] and run["prediction"]["cluster"] == "cpu"
        assert predicted["throughput"]["step_seconds"]["median"] == run["prediction"]["step_seconds"]
    assert lab("report", "runs/trio", "--json")[1].count('"name"') == 2  # the table is of runs


def test_a_folder_that_is_no_comparison_is_refused_and_untouched(lab: Lab) -> None:
    write_record(make(lab.folder / "runs" / "trio") / "record.json", new_record({"name": "trio"}) | {"status": "ok"})
    code, out, err = lab("compare", comparison_file(lab, "good"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "holds something that is no comparison" in err
    assert [path.name for path in (lab.folder / "runs" / "trio").iterdir()] == ["record.json"]


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


BASE = 'base = "base.toml"\n'
ONE = '[[variant]]\nname = "one"\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (BASE, "trio.toml: variant = None: give at least one [[variant]]"),
        (BASE + "variant = 3", "trio.toml: variant = 3"),
        (BASE + "variant = [1]", "trio.toml: variant = [1]"),
        (ONE, "trio.toml: base = None: give the base recipe's file"),
        ('base = "nowhere.toml"\n' + ONE, "nowhere.toml': does not exist"),
        ('base = "trio.toml"\n' + ONE, "trio.toml: base = 'trio.toml': is a comparison"),
        (BASE + "bases = 1\n" + ONE, "trio.toml: bases = 1: unknown key; did you mean base?"),
        (BASE + 'name = "../up"\n' + ONE, "trio.toml: name = '../up': use letters"),
        (BASE + "[[variant]]", "trio.toml: variant 1: name = None"),
        (BASE + '[[variant]]\nname = "../up"', "trio.toml: variant 1: name = '../up'"),
        (BASE + ONE + '[[variant]]\nname = "ONE"', "trio.toml: variant ONE: name = 'ONE': is the name of an earlier"),
        (BASE + ONE + "sets = {}", "trio.toml: variant one: sets = {}: unknown key; did you mean set?"),
        (BASE + ONE + "set = 1", "trio.toml: variant one: set = 1: give a table"),
        (BASE + ONE + 'set = { "name" = "two" }', "trio.toml: variant one: set.name = 'two': name a key of a section"),
        (BASE + ONE + 'set = { "train.step" = 5 }', "variant one: train.step = 5: unknown key; did you mean steps?"),
        (BASE + ONE + 'set = { "trian.steps" = 5 }', "variant one: trian = {'steps': 5}: unknown section"),
        (BASE + ONE + 'set = { "train.steps" = "5" }', "variant one: train.steps = '5': give a whole number"),
        (BASE + ONE + 'set = { "parallel.tp" = 3 }', "variant one: parallel.tp = 3: does not divide model.n_heads = 8"),
        (BASE + ONE + 'expect = "failed"', "variant one: expect = 'failed': the only thing to expect"),
        (BASE + ONE + 'expect = "refused"', "variant one: expect = 'refused': but this variant can be run"),
        (BASE + ONE + 'expect = "refused"\nset = { "parallel.pt" = 3 }', "variant one: parallel.pt = 3: unknown key"),
        (BASE + ONE + 'set = { "data.source" = "files", "data.files" = ["no.txt"] }', "variant one: data.files"),
        ("base = ", "trio.toml': is not valid TOML"),
    ],
)
def test_a_wrong_comparison_is_one_line_that_names_file_variant_and_key(
    tmp_path: Path, text: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    Path("base.toml").write_text(RECIPE)
    Path("trio.toml").write_text(text)
    for command in ("compare", "check"):
        assert main([command, "trio.toml"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and named in err and "trio.toml" in err
    assert not Path("runs").exists()


def no_process(*arguments: Any, **settings: Any) -> None:
    raise AssertionError("a process was started")


def test_settings_may_be_written_either_way_and_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(RECIPE)
    (tmp_path / "two.toml").write_text(
        BASE
        + '[[variant]]\nname = "quoted"\nset = { "parallel.tp" = 2, "train.steps" = 9 }\n'
        + '[[variant]]\nname = "table"\n[variant.set]\nparallel.tp = 2\ntrain.steps = 9\n'
        + '[[variant]]\nname = "base"\n'
    )
    comparison = load_comparison(tmp_path / "two.toml", ["train.steps=4"])
    quoted, table_, base = (variant.recipe for variant in comparison.variants)
    assert quoted is not None and table_ is not None and base is not None
    assert quoted.parallel == table_.parallel and (quoted.parallel.tp, base.parallel.tp) == (2, 1)
    assert [recipe.train.steps for recipe in (quoted, table_, base)] == [4, 4, 4]
    assert (quoted.name, base.parallel.dp_shard) == ("quoted", 3)


# ---- command lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "give a command: check, run, dry-run, plan, calibrate, compare, report"),
        (["chekc", "base.toml"], "unknown command 'chekc'; did you mean check?"),
        (["tune", "base.toml"], "unknown command 'tune'; known: check, run, dry-run, plan, calibrate, compare, report"),
        (["run"], "the following arguments are required: RECIPE"),
        (["run", "base.toml", "--sett", "a=b"], "unknown argument '--sett' of lab run; did you mean --set?"),
        (
            ["dry-run", "base.toml", "--resume"],
            "unknown argument '--resume' of lab dry-run; "
            "known: --all-distinct-ranks, --cluster, --json, --out, --rank, --set, --world-size",
        ),
        (["run", "base.toml", "--resume"], "checkpoint.every = 0: keeps no checkpoints, and --resume finds none in"),
        (["check", "base.toml", "--out", "x"], "unknown argument '--out' of lab check; known: --json, --memory, --set"),
        (["check", "base.toml", "--memory", "80"], "--memory = '80': give a number and KiB, MiB, GiB, TiB"),
        (["compare", "trio.toml", "--peak-flops", "-1"], "--peak-flops = -1.0: give the dense FLOP/s"),
        (
            ["check", "base.toml", "--set", "train.attention=flash", "--set", "parallel.cp=2"],
            "train.attention = 'flash': context.method = ring brings its own kernels",
        ),
        (["run", "base.toml", "second\nline\x1b[31m"], "unknown argument 'second\\nline\\x1b[31m'"),
        (["--json", "check", "base.toml"], "unknown argument '--json' of lab check; put it after the command"),
        (["run", "base.toml", "--nproc", "4"], "--nproc = 4: the product of [parallel] is 3"),
        (["run", "base.toml", "--nproc", "many"], "--nproc = 'many': give a whole number; see lab run --help"),
        (["run", "base.toml", "--set", "train.steps"], "--set = 'train.steps': write section.key=value"),
        (["run", "base.toml", "--set", "train.steps=\udcff"], "is not UTF-8"),
        (["run", "base.toml", "--set", "train.stepz=3"], "train.stepz = 3: unknown key; did you mean steps?"),
        (["run", "base.toml", "--set", "name=../../etc"], "name = '../../etc': use letters"),
        (["run", "base.toml", "--set", "parallel.tp=3"], "parallel.tp = 3: does not divide"),
        (["run", "base.toml", "--set", 'data.source="tokens"', "--set", "data.path=no.bin"], "data.path = 'no.bin'"),
        (["run", "base.toml", "--set", "parallel.cp=64", "--set", "train.seq_len=128"], "parallel = 192: is the world"),
        (["run", "missing.toml"], "file = 'missing.toml': does not exist"),
        (["run", "trio.toml"], "trio.toml is a comparison; use lab compare"),
        (["compare", "base.toml"], "base.toml: has neither base nor [[variant]]: a recipe; use lab run"),
        (["check", "base.toml", "missing.toml"], "file = 'missing.toml': does not exist"),
        (["report", "nowhere"], "nowhere does not exist; give a folder of results"),
        (["report", "base.toml"], "base.toml is a file; give a folder of results"),
        (["report", ".", "--fail-on-regression", "-1"], "--fail-on-regression = -1.0: give percent, from 0 to"),
        (["run", "base.toml", "--tag", "a,b"], "--tag = 'a,b': holds a comma; give each tag a --tag of its own"),
        (["run", "base.toml", "--note", "a\nb"], "--note = 'a\\nb': give a line of text, at most 1000 characters"),
        (["compare", "trio.toml", "--cluster-name", ""], "--cluster-name = '': give a line of text, at most 1000"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_starts_nothing(
    tmp_path: Path,
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    Path("base.toml").write_text(RECIPE)
    Path("trio.toml").write_text(BASE + ONE)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("lab: ") and err.count("\n") == 1 and named in err and "\x1b" not in err
    assert not Path("runs").exists()


def test_check_answers_in_a_line_per_recipe_and_fails_if_any_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.toml").write_text(RECIPE)
    Path("bad.toml").write_text("[train]\nsteps = 0\n")
    Path("trio.toml").write_text(BASE + ONE + 'set = { "parallel.tp" = 2 }')
    assert main(["check", "base.toml", "trio.toml", "--set", "train.micro_batch=1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "base.toml: base: 3 ranks (fsdp3), microbatches 2, stages 1, parameters 434,816",
        "trio.toml: one: 6 ranks (fsdp3·tp2), microbatches 2, stages 1, parameters 434,816",
    ]
    assert main(["check", "bad.toml", "base.toml", "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == "lab: bad.toml: train.steps = 0: give a whole number of at least 1\n"
    assert [summary["error"] is None for summary in json.loads(out)] == [False, True]


def test_check_refuses_what_does_not_fit_and_says_who_needs_how_much_for_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.toml").write_text(RECIPE.replace("dp_shard = 3", "pp = 2") + "[pipeline]\nschedule = 'gpipe'\n")
    assert main(["check", "base.toml", "--memory", "1GiB", "--json"]) == 0
    out, err = capsys.readouterr()
    fullest = json.loads(out)[0]["fullest_rank"]
    assert fullest["peak_bytes"] > fullest["parameters_bytes"] > 0 and "dry run of rank 1  (2/2)" in err
    least = -(-fullest["peak_bytes"] // 1024)
    assert main(["check", "base.toml", "--memory", f"{least}KiB"]) == 0
    assert f"GiB (rank {fullest['rank']})" in capsys.readouterr().out
    assert main(["check", "base.toml", "--memory", f"{least - 1}KiB"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--memory = '{least - 1}KiB': rank {fullest['rank']} of base needs" in line and "optimizer" in line


def test_sizes_are_read_with_their_units() -> None:
    assert [n_bytes("--memory", text) for text in ("80GiB", "80 GB", "1.5KiB", "2TB")] == [
        *(80 * 2**30, 80 * 10**9),
        *(1536, 2 * 10**12),
    ]
    for wrong in ("80", "GiB", "-1GiB", "1e3GiB", "80gib"):
        with pytest.raises(RecipeError, match="as in 80GiB"):
            n_bytes("--memory", wrong)


def test_check_and_report_do_not_import_torch(lab: Lab) -> None:
    write_record(make(lab.folder / "runs" / "old") / "record.json", new_record({"name": "old"}) | {"status": "ok"})
    for arguments in (["check", "base.toml"], ["report", "runs"]):
        program = f"import sys; from launch.cli import main; sys.exit(main({arguments}) or 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], cwd=lab.folder, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error_worth_a_traceback(lab: Lab) -> None:
    write_record(make(lab.folder / "runs" / "old") / "record.json", new_record({"name": "old"}) | {"status": "ok"})
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = lab.start("report", "runs", stdout=write_end)
    os.close(write_end)
    assert process.communicate(timeout=180)[1] == ""


def test_help_and_version_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--help"], "examples:"),
        (["run", "--help"], "--nproc"),
        (["--version"], "parallel-lab "),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_survives_the_file_its_ranks_read(path: Path) -> None:
    if is_comparison(read_toml(path)):
        recipes = [variant.recipe for variant in load_comparison(path).variants if variant.recipe]
    else:
        recipes = [load_recipe(path)]
    for recipe in recipes:
        assert recipe_from_tables(tomllib.loads(recipe_toml(recipe))) == recipe


def test_any_string_survives_the_file_its_ranks_read() -> None:
    files = ['quote " backslash \\ newline \n tab \t delete \x7f escape \x1b', "é 漢 😀"]
    recipe = recipe_from_tables({"data": {"source": "files", "files": files}})
    assert recipe_from_tables(tomllib.loads(recipe_toml(recipe))) == recipe


@pytest.mark.parametrize("tied", [False, True])
def test_the_count_of_parameters_is_the_models_own(tied: bool) -> None:
    tables = {"n_layers": 3, "d_model": 48, "n_heads": 6, "n_kv_heads": 2, "d_ff": 80, "vocab_size": 300}
    shape = recipe_from_tables({"model": tables | {"preset": "none", "tied_embeddings": tied}}).model
    with torch.device("meta"):
        model = Transformer(shape, seq_len=8)
    assert shape.n_parameters == sum(parameter.numel() for parameter in model.parameters())


# ---- table ---------------------------------------------------------------------------------------------------------


def measured(name: str, **changes: Any) -> dict[str, Any]:
    tables = {
        "name": "x",
        "parallel": {"pp": 2, "dp_shard": 2, "tp": 2},
        "train": {"global_batch": 8, "micro_batch": 1},
    }
    record = new_record(recipe_from_tables(tables)) | {"status": "ok"}
    record["recipe"]["name"] = name
    record["steps"] = [{"step": 1, "loss": 5.5, "grad_norm": 2.0}, {"step": 2, "loss": 4.25, "grad_norm": 1.5}]
    record["throughput"] = {
        **{"tokens_per_s": 12345.6, "tokens_per_s_per_rank": 1543.2, "cpu_seconds_per_step": 1.234},
        "step_seconds": {"median": 0.4567, "p10": 0.4, "p90": 0.5123},
    }
    record["flops"] |= {"mfu": 0.4567, "mfu_causal": 0.401, "hfu": 0.41}
    record["memory"]["max_peak_bytes"] = 300 * 2**20
    record["parity"] |= {"max_rel_grad_diff": 1.234e-15, "max_abs_loss_diff": 2e-16, "passed": True}
    return record | changes


def test_a_row_shows_what_was_measured_and_a_dash_for_what_was_not() -> None:
    shown = row(measured("mix"))
    assert (shown["loss"], shown["grad_norm"], shown["layout"]) == (4.25, 1.5, "pp2·fsdp2·tp2")
    text = table([measured("mix"), new_record({"name": "nothing"}) | {"status": "ok"}]).splitlines()
    assert text[3].split() == [
        *("mix", "pp2·fsdp2·tp2", "4.2500", "0.457", "1.23", "45.7", "40.1", "41.0", "300"),
        *("1.2e-15", "2.0e-16", "passed"),
    ]
    assert text[4].split() == ["nothing", *"-" * 11]


def test_a_row_that_was_timed_says_why_it_has_no_mfu() -> None:
    unknown = {"mfu": None, "mfu_causal": None, "hfu": None, "peak_flops": None, "peak_source": "no peak of 'Fast 1'"}
    records = [measured("a"), measured("b", flops=unknown), measured("c", flops=unknown)]
    assert "b, c: no MFU: no peak of 'Fast 1'" in table(records).splitlines()
    assert "no MFU" not in table(records[:1])


def test_a_table_is_at_most_a_hundred_columns_wide_whatever_is_in_it() -> None:
    records = [measured("n" * 100), measured("short", status="failed", reason="why " * 300 + "\n" + "log" * 200)]
    records.append(measured("differs", parity=records[0]["parity"] | {"passed": False}))
    for record in records:
        record["throughput"] |= {"tokens_per_s": 1e250, "cpu_seconds_per_step": 123456789.5}
    records[1]["layout"] |= dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp", "world_size"), 2**20)
    lines = table(records).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert any("short: failed: why why" in line for line in lines) and any("parity FAILED" in line for line in lines)


def test_nothing_in_a_record_reaches_the_terminal_as_a_command_to_it(tmp_path: Path) -> None:
    attack = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e name"
    record = measured(attack, status="failed", reason=attack + "\n" + attack)
    record["recipe"]["model"]["preset"] = record["environment"]["cpu"] = record["parity"]["reference"] = attack
    record["steps"][-1]["loss"] = record["throughput"]["tokens_per_s"] = attack
    record["layout"]["pp"] = attack
    (tmp_path / "record.json").write_text(json.dumps(record))
    text = table([read_record(tmp_path / "record.json")])
    assert re.sub(r"[^\n]", lambda match: "" if match[0].isprintable() else "!", text).strip() == ""
    assert "\\x1b]0;title\\x07" in text
    assert printable("a\tb\u2028c\ud800") == "a\\tb\\u2028c\\ud800"


# ---- real training -------------------------------------------------------------------------------------------------

SMALL = {
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.d_ff": 64,
    "train.seq_len": 16,
    "data.source": "synthetic",
    "parallel.dp_shard": 2,
}


def real_lab(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments, *settings],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_lab_run_trains(tmp_path: Path) -> None:
    recipe = str(RECIPES / "strategies" / "fsdp.toml")
    process = real_lab(tmp_path, "launch.cli", "run", recipe, "--set", "train.steps=5", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    record = json.loads(out)
    assert record == json.loads((tmp_path / "runs" / "fsdp" / "record.json").read_text())
    assert record.keys() == new_record(recipe_from_tables({})).keys()
    assert [step["step"] for step in record["steps"]] == [1, 2, 3, 4, 5]
    assert record["parity"]["passed"] and record["throughput"]["tokens_per_s"] > 0


def test_a_run_that_diverges_has_failed_and_says_at_which_step(tmp_path: Path) -> None:
    recipe = str(RECIPES / "strategies" / "fsdp.toml")
    settings = ("--set", "train.learning_rate=1000", "--set", "train.steps=200", "--set", "train.parity=false")
    process = real_lab(tmp_path, "launch.cli", "run", recipe, *settings)
    _, err = process.communicate(timeout=120)
    record = read_record(tmp_path / "runs" / "fsdp" / "record.json")
    assert (process.returncode, record["status"]) == (1, "failed")
    assert re.match(rf"rank [01]: Diverged: step {len(record['steps'])} gave loss ", record["reason"])
    assert None in (record["steps"][-1]["loss"], record["steps"][-1]["grad_norm"])
    assert record["throughput"] == new_record({})["throughput"] and record["flops"]["mfu"] is None
    assert "Diverged: step" in err


def test_all_rows_of_a_comparison_are_on_one_kind_of_device(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("")
    path = tmp_path / "rows.toml"
    path.write_text(
        'base = "base.toml"\nvariant = [{ name = "one" }, { name = "four", set = { "parallel.tp" = 4 } },'
        ' { name = "asked", set = { "train.device" = "cuda" } },'
        ' { name = "wrong", set = { "parallel.tp" = 3 }, expect = "refused" }]'
    )
    comparison, said = load_comparison(path), list[str]()
    for n_gpus in (0, 4, 8):
        assert on_one_device(comparison, n_gpus=n_gpus, say=said.append) is comparison and not said
    on_cpu = on_one_device(comparison, n_gpus=1, say=said.append)
    devices = [variant.recipe.train.device for variant in on_cpu.variants if variant.recipe]
    assert devices == ["cpu", "cpu", "cuda"] and on_cpu.variants[-1] == comparison.variants[-1]
    assert len(said) == 1 and "a variant has 4 ranks, and this host has 1 GPU;" in said[0]


def test_the_first_row_of_a_comparison_chooses_the_float32_products_of_all(lab: Lab) -> None:
    file = comparison_file(lab, "first", "second", "third")
    assert lab("compare", file)[0] == 0
    asked = [lab.record("trio", name)["environment"]["note"] for name in ("first", "second", "third")]
    assert asked == ["asked for None", "asked for medium", "asked for medium"]
    assert "float32 products medium" in " ".join((lab.folder / "runs/trio/table.txt").read_text().split())
    _, _, err = lab("compare", file, "--matmul", "lowest")
    assert "--matmul = 'lowest': give one of " in err
    assert lab("compare", file, "--matmul", "highest")[0] == 0
    assert lab.record("trio", "first")["environment"]["note"] == "asked for highest"


def test_float32_trains_with_the_products_asked_for(tmp_path: Path) -> None:
    recipe = str(RECIPES / "strategies" / "fsdp.toml")
    settings = ("--set", "train.steps=3", "--set", "train.parity=false", "--matmul", "medium", "--json")
    out, err = real_lab(tmp_path, "launch.cli", "run", recipe, *settings).communicate(timeout=120)
    assert json.loads(out)["environment"]["float32_matmul"] == "medium", err


def test_torchrun_trains_the_same(tmp_path: Path) -> None:
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launch.train")
    settings = ("--set", "name=by-hand", "--set", "train.steps=3", "--set", "train.parity=false")
    process = real_lab(tmp_path, *words, str(RECIPES / "strategies" / "fsdp.toml"), *settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    record = read_record(tmp_path / "runs" / "by-hand" / "record.json")
    assert record["status"] == "ok"
    assert out.endswith(f"\n\n{table([record])}\n\nruns/by-hand/record.json\n")  # as `lab run` ends
    steps = re.findall(r"^step (\d)/3 +loss \S+ +grad \S+ +\S+ s +\d+ tokens/s +MFU \S+ %(?: +(\S+) MiB)?$", out, re.M)
    assert [number for number, _ in steps] == ["1", "2", "3"] and steps[1][1] == steps[2][1] != steps[0][1] == ""


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGKILL, "rank 1 was killed by SIGKILL, as the kernel does when memory runs out\n"),
        (signal.SIGSEGV, r"rank 1 was killed by SIGSEGV in \S+ \((parallel|launch)/\S+\.py:\d+\)\n"),
    ],
    ids=["killed", "crashed"],
)
def test_a_rank_that_dies_amid_training_ends_the_run_with_the_steps_that_were_done(
    tmp_path: Path, number: signal.Signals, end: str
) -> None:
    recipe = str(RECIPES / "strategies" / "fsdp.toml")
    process = real_lab(
        tmp_path, "launch.cli", "run", recipe, "--set", "train.steps=100000", "--set", "train.parity=false"
    )
    folder = tmp_path / "runs" / "fsdp"
    deadline = time.monotonic() + 100
    while not (folder / "steps.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    forker, *ranks = children(process.pid)
    assert b"launch.forking" in Path(f"/proc/{ranks[1]}/cmdline").read_bytes()  # no import of ours starts a thread
    os.kill(ranks[1], number)
    _, err = process.communicate(timeout=180)
    record = read_record(folder / "record.json")
    assert process.returncode == 1 and record["status"] == "failed" and len(record["steps"]) >= 1
    assert re.match(end, record["reason"]), record["reason"]
    assert f"lab: fsdp: failed: rank 1 was killed by {number.name}" in err
    assert len(ranks) == 2 and not any(map(is_running, (forker, *ranks)))
