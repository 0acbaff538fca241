"""One host's part in looking over an allocation: what it has, and what it sees of the others. One process a host.

    srun --ntasks-per-node=1 python -m launch.preflight --out runs

It takes RANK and WORLD_SIZE, or those of srun, MASTER_ADDR and MASTER_PORT. Rank 0 prints a line for each finding. What
a host says of itself goes through a TCP store; every host exchanges small messages with every other, one after another,
so that a link that is slow or dead is found by the names of its ends, where a collective would only hang.
"""

import json
import os
import re
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.terminal import CommandError, Parser, printable
from parallel.recipe import RecipeError

SECONDS = 15.0  # for everything, torch's import apart
MEET_SECONDS = 8.0
LINK_SECONDS = 2.0
MESSAGES = 20  # on each link, of which the fastest counts
SLOW_FACTOR, SLOW_SECONDS = 5.0, 1e-3  # slower than the median link by so much, and at all
CLOCK_SECONDS = 1.0  # beyond which files of two hosts seem to be of the future
FREE_SHARE = 0.9  # of a GPU's memory, where nothing else runs on it
ALL_REDUCE_BYTES = 4 * 2**20


def main(argv: list[str]) -> int:
    from launch.train import read_srun

    try:
        read_srun()
        parser = Parser(prog="launch.preflight", description=__doc__)
        parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="that all hosts must see")
        parser.add_argument("--json", action="store_true", help="findings as JSON")
        arguments = parser.parse(argv)
    except (RecipeError, CommandError) as error:
        print(f"launch.preflight: {printable(error)}", file=sys.stderr)
        return 2
    rank, n_hosts = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    import torch  # noqa: F401  # the clock of what follows starts after it

    watch = threading.Timer(SECONDS + 2, lambda: os._exit(1))  # NCCL may wait for ever
    watch.daemon = True
    watch.start()
    try:
        reports = look_around(rank, n_hosts, arguments.out)
    except Exception as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"bad  {socket.gethostname()}: cannot meet the others at {where}: {printable(error)[:200]}", flush=True)
        return 1
    if rank != 0:
        return 0
    found = findings(reports, n_hosts, str(arguments.out))
    if arguments.json:
        print(json.dumps([{"ok": ok, "finding": text} for ok, text in found], indent=1), flush=True)
    else:
        for ok, text in found:
            print(printable(f"{'ok ' if ok else 'bad'}  {text}"), flush=True)
    return 0 if all(ok for ok, _ in found) else 1


# ---- on every host -------------------------------------------------------------------------------------------------


def look_around(rank: int, n_hosts: int, folder: Path) -> dict[int, dict[str, Any]]:
    """The hosts' reports, by rank, on rank 0; those that came in time."""
    import torch.distributed as dist

    deadline = time.monotonic() + SECONDS
    server = socket.create_server(("", 0), backlog=n_hosts)
    threading.Thread(target=_answer, args=(server,), daemon=True).start()
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], port, None, rank == 0, timedelta(seconds=MEET_SECONDS), wait_for_workers=False
    )
    token = folder / f".preflight-{os.environ.get('SLURM_JOB_ID', os.getpid())}"
    if rank == 0:
        wrong = _try_to_write(token)
        store.set("token", json.dumps([str(token.absolute()), wrong]))
    name = socket.gethostname()
    store.set(f"place {rank}", json.dumps([name, server.getsockname()[1]]))
    places = {}
    meet_until = time.monotonic() + MEET_SECONDS
    for other in range(n_hosts):
        if (place := _from_store(store, f"place {other}", meet_until)) is not None:
            places[other] = place
    report = {"host": name, **_own_facts(), "links": {}, "clock_seconds": None}
    for other in sorted(places, key=lambda other: (other - rank) % n_hosts)[1:]:  # not all at one of them
        try:
            report["links"][other], clock = _exchange(*places[other])
            if other == 0:
                report["clock_seconds"] = clock
        except OSError as error:
            report["links"][other] = error.strerror or str(error)
    path, wrong = _from_store(store, "token", meet_until) or ["", "rank 0 did not say where it is"]
    report["folder"] = wrong or _seen(Path(path))
    all_well = len(places) == n_hosts and not any(isinstance(link, str) for link in report["links"].values())
    if n_hosts > 1:
        store.set(f"well {rank}", json.dumps(all_well))
        wells = [_from_store(store, f"well {other}", min(deadline, meet_until + 4)) for other in range(n_hosts)]
        report["all_reduce"] = _all_reduce(store, rank, n_hosts, deadline) if all(wells) else None
    store.set(f"report {rank}", json.dumps(report))
    if rank != 0:
        return {}
    answers = {other: _from_store(store, f"report {other}", deadline) for other in range(n_hosts)}
    token.unlink(missing_ok=True)
    return {other: answer for other, answer in answers.items() if answer is not None}


def _from_store(store: Any, key: str, deadline: float) -> Any:
    """What a host has left under `key`; None where it has not until the deadline."""
    try:
        store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
    except RuntimeError:
        return None
    return json.loads(store.get(key))


def _own_facts() -> dict[str, Any]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", driver.read_text()) if driver.exists() else None
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    free_bytes = int(available[1]) * 1024 if available else None
    return {"torch": torch.__version__, "driver": version and version[0], "gpus": gpus, "free_bytes": free_bytes}


def _answer(server: socket.socket) -> None:
    """Answers each message with the time of this host's clock."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(8):
                connection.sendall(struct.pack("!d", time.time()))

    while True:
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def _exchange(host: str, port: int) -> tuple[float, float]:
    """The fastest way there and back, and by how much the other's clock is ahead, in seconds. Raises OSError."""
    best, ahead = float("inf"), 0.0
    with socket.create_connection((host, port), timeout=LINK_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(MESSAGES):
            start, now = time.perf_counter(), time.time()
            connection.sendall(b"\0" * 8)
            answer = connection.recv(8, socket.MSG_WAITALL)
            seconds = time.perf_counter() - start
            if len(answer) < 8:
                raise OSError("closed amid an answer")
            if seconds < best:
                best, ahead = seconds, struct.unpack("!d", answer)[0] - (now + seconds / 2)
    return best, ahead


def _try_to_write(token: Path) -> str | None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("here\n", encoding="utf-8")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def _seen(token: Path) -> str | None:
    until = time.monotonic() + 2.0  # network file systems remember for a while that a file was not there
    while not token.exists():
        if time.monotonic() > until:
            return "is not the same folder there"
        os.listdir(token.parent) if token.parent.exists() else None
        time.sleep(0.1)
    return None


def _all_reduce(store: Any, rank: int, n_hosts: int, deadline: float) -> dict[str, Any]:
    """{backend, seconds} of an all-reduce of ALL_REDUCE_BYTES over all hosts, or {backend, error}."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    seconds = max(1.0, deadline - time.monotonic() - 1.0)
    try:
        shared, timeout = dist.PrefixStore("group", store), timedelta(seconds=seconds)
        dist.init_process_group(backend, store=shared, rank=rank, world_size=n_hosts, timeout=timeout)
        x = torch.ones(ALL_REDUCE_BYTES // 4, device="cuda" if on_gpu else "cpu")
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            dist.all_reduce(x)
            total = x[0].item()  # waits for it
            best = min(best, time.perf_counter() - start)
            x.fill_(1.0)
            if total != n_hosts:
                return {"backend": backend, "error": f"a sum of {n_hosts} ones is {total:g}"}
        return {"backend": backend, "seconds": best}
    except Exception as error:
        return {"backend": backend, "error": " ".join(str(error).split())[:200]}


# ---- on rank 0 -----------------------------------------------------------------------------------------------------


def findings(reports: Mapping[int, Mapping[str, Any]], n_hosts: int, folder: str) -> list[tuple[bool, str]]:
    """(is it well, a line) of each thing that was looked at."""
    names = {rank: report["host"] for rank, report in reports.items()}
    found = [(True, f"{len(names)} of {n_hosts} hosts answered: {', '.join(names.values())}")]
    missing = [rank for rank in range(n_hosts) if rank not in reports]
    if missing:
        found.append((False, f"no answer in {SECONDS:g} s from the hosts of ranks {', '.join(map(str, missing))}"))
    for key, what in (("torch", "torch"), ("driver", "GPU driver"), ("gpus", "GPUs")):
        found.append(_alike(what, {names[rank]: _in_words(reports[rank][key]) for rank in reports}))
    for rank, report in reports.items():
        for index, gpu in enumerate(report["gpus"]):
            if gpu["free_bytes"] < FREE_SHARE * gpu["total_bytes"]:
                free, total = gpu["free_bytes"] / 2**30, gpu["total_bytes"] / 2**30
                found.append((False, f"{names[rank]}: GPU {index} has {free:.1f} of {total:.1f} GiB free"))
    if free_bytes := [report["free_bytes"] for report in reports.values() if report["free_bytes"]]:
        found.append((True, f"memory: at least {min(free_bytes) / 2**30:.1f} GiB free on each host"))
    clocks = {rank: report["clock_seconds"] for rank, report in reports.items() if report["clock_seconds"] is not None}
    if clocks:
        worst = max(clocks, key=lambda rank: abs(clocks[rank]))
        text = f"clocks: at most {abs(clocks[worst]) * 1e3:.1f} ms between {names[worst]} and {names.get(0, 'rank 0')}"
        found.append((abs(clocks[worst]) <= CLOCK_SECONDS, text))
    found += _links(reports, names)
    for rank, report in reports.items():
        if report["folder"]:
            found.append((False, f"{names[rank]}: {folder} {report['folder']}"))
    if not any(report["folder"] for report in reports.values()):
        found.append((True, f"{folder} is seen by all"))
    if n_hosts > 1:
        found.append(_of_all_reduce([report.get("all_reduce") for report in reports.values()]))
    return found


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        kinds = [gpu["name"] for gpu in value]
        return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"
    return str(value or "none")


def _alike(what: str, of_hosts: Mapping[str, str]) -> tuple[bool, str]:
    if len(set(of_hosts.values())) == 1:
        return True, f"{what}: {next(iter(of_hosts.values()))}"
    return False, f"{what}: " + "; ".join(f"{host} has {value}" for host, value in of_hosts.items())


def _links(reports: Mapping[int, Mapping[str, Any]], names: Mapping[int, str]) -> list[tuple[bool, str]]:
    links = {(rank, int(other)): link for rank, report in reports.items() for other, link in report["links"].items()}
    times = {ends: link for ends, link in links.items() if not isinstance(link, str)}
    named = {ends: f"{names[ends[0]]} -> {names.get(ends[1], f'rank {ends[1]}')}" for ends in links}
    found = [(False, f"link {named[ends]}: {link}") for ends, link in links.items() if isinstance(link, str)]
    if times:
        usual = statistics.median(times.values())
        slow = [ends for ends, link in times.items() if link > max(SLOW_FACTOR * usual, SLOW_SECONDS)]
        for ends in slow:
            text = f"{times[ends] * 1e3:.2f} ms there and back, where {usual * 1e3:.2f} ms are usual"
            found.append((False, f"link {named[ends]}: {text}"))
        if not found:
            text = f"{usual * 1e3:.2f} ms there and back, the slowest {max(times.values()) * 1e3:.2f} ms"
            found.append((True, f"links: {len(times)}, {text}"))
    return found


def _of_all_reduce(answers: Sequence[Mapping[str, Any] | None]) -> tuple[bool, str]:
    what = f"all-reduce of {ALL_REDUCE_BYTES // 2**20} MiB over the hosts"
    for answer in answers:
        if answer is None:
            return False, f"{what}: not tried, as not every host reaches every other"
        if "error" in answer:
            return False, f"{what} by {answer['backend']}: {answer['error']}"
    slowest = max(answer["seconds"] for answer in answers if answer)
    return True, f"{what} by {answers[0]['backend'] if answers[0] else ''}: {slowest * 1e3:.1f} ms"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads and a process group may be left
