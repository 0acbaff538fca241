"""Why a run ended as it did, whoever started it: by what its ranks raised, and by the exit codes and logs they left.

A rank that raised has written it to record.json; one that a signal killed cannot, and a launcher says it for it.
"""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import launch
import parallel
from launch.folder import rank_log
from launch.redaction import without_secrets
from launch.terminal import printable
from parallel.measure.lives import how_it_ended, lived
from parallel.measure.record import Record, read_record, read_steps, record_json, write_record
from parallel.recipe import Recipe

# How gloo and NCCL say that another rank is gone. Such a rank has a better reason to give, or is past giving one.
PEER_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|remote error|socket closed|connection refused"
    r"|connectFullMesh|timed out|timeout",
    re.IGNORECASE,
)
PEER_SECONDS = 2.0
STOPPED = 75  # exit code of a run that a signal has ended, and that can go on: EX_TEMPFAIL of sysexits.h
DIVERGED = re.compile(r"rank \d+: Diverged: ")  # it would again
LIFE = "---- life "  # begins the line in the log of a rank that begins a life of the run after the first
TAIL_LINES = 6
FATAL = "Fatal Python error: "  # then come the stacks of a rank that a signal such as SIGSEGV has ended
HINTS: dict[int, str] = {
    signal.SIGKILL: ", as the kernel does when memory runs out",
    signal.SIGBUS: ", as the kernel does when a file that is read has become shorter",
}
PACKAGE_PARENT = re.compile(r"/(?:[^/\s\"']+/)*?(?=(?:site-packages|dist-packages|parallel|launch)/)")


# ---- by the rank itself --------------------------------------------------------------------------------------------


def record_error(recipe: Recipe, folder: Path, rank: int, error: BaseException) -> None:
    """Records what ended this rank's training, unless another rank has told its reason."""
    causes = list(_causes(error))  # a pipeline of torch wraps what went wrong in a stage
    texts = [" ".join(f"{type(cause).__name__}: {cause}".split()).removesuffix(":")[:1000] for cause in causes]
    reason = f"rank {rank}: {', because of '.join(dict.fromkeys(texts))}"
    # What diverges does so on every rank, and rank 0 has the step in steps.jsonl when it says so.
    if any(map(PEER_LOST.search, texts)) or (rank > 0 and DIVERGED.match(reason)):
        _let_peer_speak(folder / "record.json")
    status = "oom" if any(map(is_out_of_memory, causes)) else "failed"
    record_failure(recipe, folder, status, reason)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def record_failure(recipe: Recipe, folder: Path, status: str, reason: str) -> bool:
    """Writes record.json with the steps that were done, unless it is there: the first rank to fail knows why."""
    try:
        with open(folder / "record.json", "x", encoding="utf-8") as file:
            file.write(record_json(_begun(recipe, folder, status, reason)) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        (folder / "record.json").unlink(missing_ok=True)  # half of one says less than none
        print(f"launch.train: cannot record this: {printable(error)}", file=sys.stderr)
    return True


def _begun(recipe: Recipe, folder: Path, status: str, reason: str) -> dict[str, Any]:
    """The record of a run that has not come to its end: the steps that were done, and its lives."""
    record, reason = Record.of(recipe), without_secrets(reason)
    record.status, record.reason, record.steps = status, reason, read_steps(folder / "steps.jsonl")
    record.checkpoint.lives, record.goodput = lived(folder, how_it_ended(status, reason))
    return record.as_json()


def may_restart(record: Mapping[str, Any]) -> bool:
    """Whether a run that ended so may end otherwise when it is started again as it is."""
    return record["status"] in ("failed", "oom", "timeout") and not DIVERGED.match(record["reason"] or "")


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError (a GPU's), MemoryError (Python's), or what torch's allocator on the CPU raises."""
    named_so = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named_so or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _let_peer_speak(record: Path) -> None:
    """Waits for another rank's record, but not past SIGTERM, with which torchrun ends the peers of a rank that died."""
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    deadline = time.monotonic() + PEER_SECONDS
    while not record.exists() and not terminated and time.monotonic() < deadline:
        time.sleep(0.05)


# ---- by whoever started it -----------------------------------------------------------------------------------------


def why(folder: Path, rank: int, code: int) -> tuple[str, str]:
    """(status, reason) of a run whose `rank` was the first to end badly, with an exit `code`, negative for a signal."""
    written = read_record(folder / "record.json")  # of no kind where there is none to be had
    log = rank_log(folder, rank)
    if code <= 0 or not written["kind"] or written["status"] == "ok":
        return "failed", f"rank {rank} {_end_in_words(code, log)}\n{_tail(log)}"
    reason = written["reason"] or ""
    if code == STOPPED:
        return written["status"], reason
    if written["status"] != "refused":
        teller = re.match(r"rank (\d+): ", reason)
        tellers_log = rank_log(folder, int(teller[1])) if teller else log
        reason += f"\n{_tail(tellers_log if tellers_log.exists() else log)}"
    return written["status"], reason


def settle(recipe: Recipe, folder: Path, failure: tuple[str, str] | None) -> dict[str, Any]:
    """The record of the run: the ranks' own where all went well, else with the failure and the steps that were done."""
    path = folder / "record.json"
    written = read_record(path)  # of another recipe, where there is none to be had
    if failure is None:
        if path.exists():
            return written
        failure = ("failed", "every rank ended well, but none wrote record.json")
    record = _begun(recipe, folder, *failure)
    if written["recipe"] == record["recipe"]:
        saved = written["checkpoint"] | {"lives": record["checkpoint"]["lives"]}
        record = written | {key: record[key] for key in ("status", "reason", "goodput")} | {"checkpoint": saved}
    write_record(path, record)
    return record


def _end_in_words(code: int, log: Path) -> str:
    if code == 0:
        return "ended with exit code 0 before the run was done"
    if code > 0:
        return f"ended with exit code {code}"
    name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
    _, _, stacks = said_in_life(log).partition(FATAL)
    return f"was killed by {name}{HINTS.get(-code, '')}" + (f" {place(stacks)}" if stacks else "")


def _tail(log: Path) -> str:
    """The last lines of a rank's log, but for the stacks of a fatal error."""
    said, *_ = said_in_life(log).partition(FATAL)
    lines = [line for line in said.splitlines() if line.strip(" ^~")]  # a traceback underlines with those
    if not lines:
        return f"logs/{log.name} is empty"
    last = (PACKAGE_PARENT.sub("", line)[:200] for line in lines[-TAIL_LINES:])
    return "\n".join([f"logs/{log.name} ends with:", *last])


def said_in_life(log: Path) -> str:
    """What a log says of the last life of the run."""
    text = text_of(log)
    start = text.rfind(f"\n{LIFE}")
    return text if start < 0 else text[start + 1 :].partition("\n")[2]


def text_of(log: Path, *, start: int = 0) -> str:
    """What a log says from the byte `start` on, the last 64 KiB of it at most; "" where there is no log."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - 65536))
        return file.read().decode(errors="replace")
    return ""


# ---- where a rank is, or was ---------------------------------------------------------------------------------------

FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)
THREAD = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):$", re.MULTILINE)


def place(stacks: str) -> str:
    """Where the main thread is, from faulthandler's text: the innermost function of torch or of this project, and the
    line of this project that it was called from."""
    main_thread = THREAD.split(stacks)[-1]  # the first thread of a process comes last
    frames = [(match["function"], *_shown_path(match["file"]), match["line"]) for match in FRAME.finditer(main_thread)]
    if not THREAD.search(stacks) or not frames:
        return "gave no stack"
    innermost = next((frame for frame in frames if frame[1]), frames[0])
    _, _, path, line = next((frame for frame in frames if frame[1] == "ours"), innermost)
    return f"in {innermost[0]} ({path}:{line})"


def _shown_path(file: str) -> tuple[str, str]:
    """(whose, path): "ours" or "torch" with the path from the package on; else "" and the file's name."""
    for package in (*parallel.__path__, *launch.__path__):
        if file.startswith(package + os.sep):
            return "ours", str(Path(file).relative_to(Path(package).parent))
    match = re.search(r"-packages/(torch/.*)$", file)
    return ("torch", match[1]) if match else ("", Path(file).name)
