"""The pool of ranks itself: what it says of a rank that native code has ended."""

import os
import shutil
from pathlib import Path

import pytest
import ranks as pool
import torch.distributed as dist


def abort_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.abort()
    dist.barrier()


def test_a_rank_that_dies_leaves_its_native_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CORES", tmp_path)
    two = pool.Ranks()
    two.may_die = False
    try:
        with pytest.raises(pool.RankDied) as died:
            two(2, abort_on_rank_1)
    finally:
        two.close()
    assert "rank 1: ended with -6" in str(died.value) and "in abort_on_rank_1" in str(died.value)
    [core] = tmp_path.glob("*.core")
    assert f"{core}" in str(died.value)
    if shutil.which("gdb"):  # as in CI
        assert "abort" in str(died.value).partition(str(core))[2] and "libtorch" in core.with_suffix(".txt").read_text()
