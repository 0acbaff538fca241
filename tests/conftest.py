import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, no process is started but the one that imports what ranks need, and that one is ended."""
    left: list[object] = []

    class Importing:
        def __init__(self, command: Sequence[str], **settings: Any) -> None:
            assert "launch.forking" in command, f"a process was started: {command}"
            left.append(self)

        def poll(self) -> None:
            return None

        def kill(self) -> None:
            left.remove(self)

        def wait(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Importing)
    yield
    assert left == []
