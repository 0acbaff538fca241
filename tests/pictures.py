"""The pictures of docs/dashboard.md, of records that are generated here: no accelerator was measured for them.

    make pictures                                        needs Chromium
    .venv/bin/python tests/pictures.py runs/first-look   those of the README instead, of what was measured there

Ten weeks of four strategies of Llama 3 8B on three clusters, each on 16 to 128 devices of 80 GiB, eight a host. The
records are as a run would write them, and what is in them is made up, with a fall of 18 % that the page is to find.
"""

import random
import shutil
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from results import GPU, complete_record, layout_of, memory

from launch.page import write_page
from parallel.measure.record import new_record, write_record
from parallel.recipe import recipe_from_tables

DOCS = Path(__file__).parents[1] / "docs"
CLUSTERS = {"alpha": 1.0, "beta": 0.94, "gamma": 0.89}  # MFU beside that of the first
DEVICES = (16, 32, 64, 128)
WEEKS = 10
FALL = ("beta", 64, "fsdp", 7, 0.18)  # cluster, devices, strategy, week from which on, share of MFU
# MFU on 16 devices; what twice as many leave of it; GiB of a rank beside its weights and all that goes with them
STRATEGIES = {
    "fsdp": (0.46, 0.93, 37.0),
    "hsdp": (0.44, 0.97, 38.0),
    "fsdp-tp": (0.40, 0.985, 21.0),
    "pp-fsdp": (0.36, 0.99, 28.0),
}
PARAMETERS, PEAK, SEQ_LEN = 8.03e9, 989e12, 8192
# name: (part of the page, address, width, whether dark); in pixels, as all sizes below
PICTURES = {
    "commits": ("#history", "#cluster=beta&strategy=fsdp", 1100, False),
    "layouts": ("#layouts", "#cluster=alpha", 1280, False),
    "choice": ("main", "#cluster=alpha&devices=64", 1100, False),
    "hosts": ("#chart-hosts", "#cluster=alpha&devices=64&since=2026-03-09", 1280, True),
}
README = {"page-light": ("body", "", 1280, False), "page-dark": ("#charts", "", 1280, True)}
TALLEST = 1480
UNTIL = {"main": "#history", "body": "#legend"}  # parts that go on below what is to be seen


def records() -> dict[str, dict[str, Any]]:
    """By the folder of each: cluster / week / devices / strategy."""
    chance, found = random.Random(11), {}
    for week in range(WEEKS):
        for cluster, beside_alpha in CLUSTERS.items():
            for devices in DEVICES:
                for strategy, (mfu, kept, _) in STRATEGIES.items():
                    mfu *= beside_alpha * kept ** (devices.bit_length() - 5) * chance.gauss(1, 0.008)
                    if (cluster, devices, strategy) == FALL[:3] and week >= FALL[3]:
                        mfu *= 1 - FALL[4]
                    folder = f"{cluster}/week-{week:02d}/{devices}/{strategy}"
                    found[folder] = _record(strategy, cluster, devices, week, mfu)
    return found


def _record(strategy: str, cluster: str, devices: int, week: int, mfu: float) -> dict[str, Any]:
    parallel = layout_of(strategy, devices, tp=4)
    train = {"seq_len": SEQ_LEN, "global_batch": 2 * devices, "micro_batch": 1, "dtype": "bfloat16"}
    tables = {"name": strategy, "model": {"preset": "llama3-8b"}, "data": {"source": "synthetic"}, "train": train}
    of_llama = new_record(recipe_from_tables(tables | {"parallel": parallel}))
    record = complete_record(strategy) | {key: of_llama[key] for key in ("recipe", "layout")}
    flops_per_token = 6 * PARAMETERS + 12 * 32 * 4096 * SEQ_LEN
    tokens_per_s = mfu * PEAK * devices / flops_per_token
    seconds = 2 * devices * SEQ_LEN / tokens_per_s
    record["throughput"] |= {"tokens_per_s": tokens_per_s, "tokens_per_s_per_rank": tokens_per_s / devices}
    record["throughput"]["step_seconds"] = {"median": seconds, "p10": 0.99 * seconds, "p90": 1.02 * seconds}
    record["flops"] |= {"mfu": mfu, "mfu_causal": 0.79 * mfu, "hfu": 0.81 * mfu, "peak_flops": PEAK}
    record["memory"] = _memory(strategy, devices)
    record["traffic"] = _traffic(parallel, devices)
    record["environment"] |= {
        **{
            "device": GPU,
            "accelerators": [GPU] * 8,
            "cpu": "a CPU",
            "cores": 96,
            "cluster": cluster,
            "torch": "2.13.0",
        },
        **{"device_memory_bytes": 80 * 2**30, "git_commit": f"{0xA51C0DE + 7919 * week:07x}" + "0" * 33},
        "hosts": [rank // 8 for rank in range(devices)],
        "time_utc": (datetime(2026, 1, 5, 12, tzinfo=UTC) + timedelta(weeks=week)).isoformat(),
    }
    return record


def _memory(strategy: str, devices: int) -> dict[str, Any]:
    shards = 8 if strategy == "hsdp" else devices
    state, rest = 16 * PARAMETERS / shards, STRATEGIES[strategy][2] * 2**30
    section = memory(devices, 1)
    split = {"parameters": state / 4, "gradients": state / 4, "optimizer": state / 2}
    split |= {"activations": 0.8 * rest, "other": 0.2 * rest}
    for row in section["per_rank"]:
        row |= {f"{part}_bytes": int(size) for part, size in split.items()}
        row["peak_bytes"] = sum(row[f"{part}_bytes"] for part in split)
    section["max_peak_bytes"] = section["min_peak_bytes"] = section["per_rank"][0]["peak_bytes"]
    return section


def _traffic(parallel: dict[str, int], devices: int) -> list[dict[str, Any]]:
    """Bytes in bfloat16 of a ring's messages: of a ring of n over hosts, one neighbour in eight is on another."""
    of_rank = 2 * PARAMETERS / parallel.get("tp", 1) / parallel.get("pp", 1)
    rows = []

    def add(dim: str, collective: str, size: float, across: float) -> None:
        whole = {"calls": 64, "bytes_per_rank": int(size), "bytes_across_hosts": int(size * across)}
        rows.append({"mesh_dim": dim, "collective": collective, **whole})

    across = 0.0 if parallel.get("dp_replicate") else parallel.get("tp", 1) / 8 if "pp" not in parallel else 0.25
    add("dp_shard", "all_gather", 2 * of_rank, across)
    add("dp_shard", "reduce_scatter", 2 * of_rank, across)
    if replicas := parallel.get("dp_replicate"):
        add("dp_replicate", "all_reduce", 4 * PARAMETERS / 8 * (replicas - 1) / replicas, 1.0)
    if "tp" in parallel:
        add("tp", "all_reduce", 8 * 32 * SEQ_LEN * 4096 * 1.5, 0.0)
    if "pp" in parallel:
        add("pp", "send", 4 * SEQ_LEN * 4096, 1.0)
    return rows


def write_generated(folder: Path) -> Path:
    """The page of the generated records, in `folder`."""
    for name, record in records().items():
        path = folder / "three-clusters" / name / "record.json"
        path.parent.mkdir(parents=True)
        write_record(path, record)
    write_page(folder / "three-clusters", folder / "page.html")
    return folder / "page.html"


def take(browser: Browser, page_file: Path, picture: Path, part: str, address: str, width: int, dark: bool) -> None:
    """The part of the page as it opens, from its top down."""
    scheme: Any = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(page_file.as_uri() + address)
    page.wait_for_selector("html[data-ready=true]")
    box = page.locator(part).bounding_box()
    assert box is not None
    top, height = max(0, box["y"] - 12), min(box["height"] + 24, TALLEST)
    if part in UNTIL and (until := page.locator(UNTIL[part]).bounding_box()):
        height = until["y"] - top - 8
    clip = {"x": max(0, box["x"] - 16), "y": top, "width": box["width"] + 32, "height": height}
    page.screenshot(path=picture, clip=clip, full_page=True)  # type: ignore[arg-type]
    page.close()


def main() -> None:
    measured = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        if measured:
            write_page(measured, Path(folder) / "page.html")
            for name, settings in README.items():
                take(browser, Path(folder) / "page.html", DOCS / f"{name}.png", *settings)
        else:
            page_file = write_generated(Path(folder))
            for name, settings in PICTURES.items():
                take(browser, page_file, DOCS / f"dashboard-{name}.png", *settings)
        browser.close()


if __name__ == "__main__":
    main()
