"""A rank's process: which device it takes, and how it leaves its group. Ranks are real, GPUs are made up."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layouts import small_recipe
from ranks import Ranks

import parallel.process
from launch.train import import_training
from parallel.mesh import build_mesh
from parallel.process import choose_device, process_group
from parallel.recipe import Recipe, RecipeError

ROOT = Path(__file__).parents[1]
Seen = list[str]  # the UUIDs of the GPUs that one rank sees; the letter is the model


def chosen(recipe: Recipe, store: str, seen: list[Seen], hosts: list[str]) -> tuple[str, str | None]:
    rank = dist.get_rank()
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=str(hosts[:rank].count(hosts[rank]))),
        mock.patch.object(socket, "gethostname", lambda: hosts[rank]),
        mock.patch.object(torch.cuda, "device_count", lambda: len(seen[rank])),
        mock.patch.object(
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(uuid=seen[rank][index], name=f"model {seen[rank][index][0]}"),
        ),
    ):
        try:
            device, unused = choose_device(recipe, dist.FileStore(store, len(seen)))
        except RecipeError as error:
            return "refused", str(error)
    return str(device), unused


@pytest.mark.parametrize(
    ("seen", "hosts", "device", "said"),
    [
        ([["a1", "a2"], ["a1", "a2"]], "xx", ["cuda:0", "cuda:1"], None),
        ([["a1"], ["a2"]], "xx", ["cuda:0", "cuda:0"], None),  # as under srun --gpus-per-task=1
        ([["a"], ["a"]], "xy", ["cuda:0", "cuda:0"], None),  # on two hosts
        ([["a"], ["a"]], "xx", ["cpu", "cpu"], "this host has 1 GPU: two of the 2 ranks of a host see the same GPU"),
        ([["a", "b"]] * 3, "xxx", ["cpu"] * 3, "this host has 2 GPUs: 3 of the ranks are on a host with 2 GPUs"),
        ([["a"], []], "xy", ["cpu", "cpu"], "1 of the ranks are on a host with 0 GPUs"),  # all on one kind of device
        ([[], []], "xx", ["cpu", "cpu"], None),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_none_has(
    ranks: Ranks, tmp_path: Path, seen: list[Seen], hosts: str, device: list[str], said: str | None
) -> None:
    recipe = small_recipe("float32", parallel=dict(cp=len(seen)), train=dict(seq_len=24))
    answers = ranks(len(seen), chosen, recipe, str(tmp_path / "auto"), seen, list(hosts))
    assert [kind for kind, _ in answers] == device
    assert all((said or "") in (note or "") for (_, note), of_rank in zip(answers, seen, strict=True) if of_rank)
    assert said or not any(note for _, note in answers)
    asked = small_recipe("float32", parallel=dict(cp=len(seen)), train=dict(seq_len=24, device="cuda"))
    answers = ranks(len(seen), chosen, asked, str(tmp_path / "cuda"), seen, list(hosts))
    assert {kind for kind, _ in answers} == ({"refused"} if "cpu" in device else set(device))
    asked = small_recipe("float32", parallel=dict(cp=len(seen)), train=dict(seq_len=24, device="cpu"))
    assert {kind for kind, _ in ranks(len(seen), chosen, asked, str(tmp_path / "cpu"), seen, list(hosts))} == {"cpu"}


def test_gpus_of_several_models_are_refused_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    recipe = small_recipe("float32", parallel=dict(cp=3), train=dict(seq_len=24))
    answers = ranks(3, chosen, recipe, str(tmp_path / "mixed"), [["a1"], ["b1"], ["a2"]], list("xyz"))
    assert [kind for kind, _ in answers] == ["refused"] * 3
    assert "GPUs of several models (model b and others)" in str(answers[1][1])


@pytest.mark.parametrize(("pp", "bound"), [(1, True), (2, False)])
def test_neighbours_in_a_pipeline_do_not_share_a_stream(monkeypatch: pytest.MonkeyPatch, pp: int, bound: bool) -> None:
    options: dict[str, Any] = {}
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(parallel.process, "choose_device", lambda recipe, store: (torch.device("cuda", 0), None))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **given: options.update(given))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group(small_recipe(parallel=dict(pp=pp), train=dict(micro_batch=2))):
        pass
    assert (options["device_id"] is not None) == bound


def test_a_rank_that_does_not_know_its_place_on_its_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match="LOCAL_RANK = None: set it, as torchrun does"):
        choose_device(small_recipe(parallel=dict(dp_shard=2)), dist.HashStore())


@pytest.mark.parametrize(("device", "ends"), [("cpu", 1), ("cuda", 0)])
def test_a_rank_that_raises_does_not_wait_for_the_goodbye_of_nccl(
    monkeypatch: pytest.MonkeyPatch, device: str, ends: int
) -> None:
    """That is collective, and its peers may be waiting for this rank in a kernel."""
    left: list[Any] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(parallel.process, "choose_device", lambda recipe, store: (torch.device(device), None))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("left"))
    with pytest.raises(ValueError, match="boom"), process_group(small_recipe()):
        raise ValueError("boom")
    assert len(left) == ends
    with process_group(small_recipe()):
        pass
    assert len(left) == ends + 1


@pytest.mark.parametrize("known", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_asked_for_segments_that_grow_unless_the_user_asks_for_something(
    monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(key, "")  # so that it is as before when the test is over
        monkeypatch.delenv(key)
    if known:
        monkeypatch.setenv(known, "max_split_size_mb:512")
    import_training()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        "": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:512",
    }.get(known)


def timeouts(recipe: Recipe) -> set[float]:
    mesh = build_mesh(recipe, "cpu")
    groups = [mesh.get_group(dim) for dim in ("pp", "dp_shard", "cp", "tp", "dp_shard_cp", "data")]
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_every_group_of_the_mesh_has_the_time_limit_of_the_run(ranks: Ranks) -> None:
    recipe = small_recipe("float32", parallel=dict(pp=2, tp=2), train=dict(micro_batch=4, time_limit_seconds=77.0))
    assert ranks(4, timeouts, recipe) == [{77.0}] * 4


def test_a_group_has_one_thread_for_its_collectives() -> None:
    """Two write the name of the last one over each other's, into freed memory. And all groups share one device."""
    code = """
from pathlib import Path
import torch.distributed as dist
from parallel.process import process_group
from parallel.recipe import load_recipe

def threads():
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("pt_gloo_runloop"), len(names)

with process_group(load_recipe("recipes/strategies/ddp.toml", ["parallel.dp_replicate=1"])):
    dist.barrier()  # a thread has its name when it has done something
    of_the_run = threads()
    another = dist.new_group()
    dist.barrier(another)
    of_two = threads()
    print(of_the_run[0], of_two[0], of_two[1] - of_the_run[1])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.returncode) == ("1 2 1\n", 0), ended.stderr
