"""What a terminal shows, and that nothing but a terminal is written to as one."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from layouts import small_recipe
from results import complete_record
from test_launch import Lab, comparison_file, lab  # noqa: F401

from launch.cli import COMMANDS, main
from launch.table import progress_line, table, table_for, width_of
from launch.terminal import Status, coloured
from parallel.measure import journal
from parallel.measure.journal import NARROW, Progress
from parallel.measure.observer import Step

COLOUR = re.compile(r"\x1b\[\d*m")


class Terminal:
    """A real one, of so many columns, whose other end reads all the time: a terminal holds 4 KiB."""

    def __init__(self, columns: int = 80) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        self.stream = os.fdopen(theirs, "w", encoding="utf-8")
        self._read: list[bytes] = []
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while text := os.read(self._ours, 2**16):
                self._read.append(text)

    def shown(self) -> str:
        """What has been written to it since this was last asked."""
        print("\0", end="", file=self.stream, flush=True)
        deadline = time.monotonic() + 60
        while not (self._read and self._read[-1].endswith(b"\0")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        text = b"".join(self._read).decode().replace("\r\n", "\n").replace("\0", "")
        self._read.clear()
        return text

    def close(self) -> None:
        self.stream.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = Terminal()
    yield made
    made.close()


def lines_on_screen(text: str) -> list[str]:
    """What stays on the screen: what is left of each line after the last time that it was cleared."""
    return [COLOUR.sub("", line.rpartition("\r\x1b[K")[2]) for line in text.split("\n")]


# ---- the line of what goes on now ------------------------------------------------------------------------------------


def use(stream: TextIO) -> None:
    with Status(stream) as status:
        status.say("[2/3] fsdp  (0:05 elapsed)")
        for step in (1, 6, 12):
            status.now(f"step {step:2}/12  loss 4.8123  grad 1.23  0.448 s  4571 tokens/s  MFU 28.1 %  48.0 MiB")
        status.say("  ok: loss 4.8123, parity passed")
        status.now("data: a line from anywhere\x1b[31m " + "and a long one " * 9)


def test_a_step_is_a_bar_that_leaves_no_trace(terminal: Terminal) -> None:
    use(terminal.stream)
    text = terminal.shown()
    assert lines_on_screen(text) == ["[2/3] fsdp  (0:05 elapsed)", "  ok: loss 4.8123, parity passed", ""]
    now = [COLOUR.sub("", line) for line in re.split(r"\r\x1b\[K|\n", text) if "MiB" in line or "MFU" in line]
    assert [line[2:15] for line in now] == ["━─────────── ", "━━━━━━────── ", "━━━━━━━━━━━━ "]
    assert now[1].startswith("  ━━━━━━────── 6/12  loss 4.8123  grad 1.23  0.448 s  4571 tokens/s")
    assert "data: a line from anywhere\\x1b[31m and" in text  # which is not obeyed
    assert max(len(COLOUR.sub("", line)) for line in re.split(r"\r\x1b\[K|\n", text)) < 80
    assert "\x1b[1m[2/3] fsdp\x1b[m" in text and "\x1b[32m  ok:\x1b[m" in text


def test_no_color_is_heeded_and_a_dumb_terminal_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    use(terminal.stream)
    text = terminal.shown()
    assert "━" in text and not COLOUR.search(text)
    monkeypatch.setenv("TERM", "dumb")
    use(terminal.stream)
    assert terminal.shown() == "[2/3] fsdp  (0:05 elapsed)\n  ok: loss 4.8123, parity passed\n"


def test_a_pipe_or_a_file_gets_lines_alone() -> None:
    file = io.StringIO()
    use(file)
    assert file.getvalue() == "[2/3] fsdp  (0:05 elapsed)\n  ok: loss 4.8123, parity passed\n"
    assert table_for(file, [complete_record("a")]) == table([complete_record("a")])


def test_a_comparison_shows_on_a_terminal_what_its_row_does_now(terminal: Terminal, lab: Lab) -> None:  # noqa: F811
    process = lab.start("compare", comparison_file(lab, "good", "leaves-rank-2"), stdout=terminal.stream)
    assert process.wait(timeout=120) == 1
    text = terminal.shown()
    assert "\n  rank 0 of 3, threads 1\r\x1b[K" in text  # while it went on
    assert "  rank 0 of 3, threads 1" not in lines_on_screen(text)
    assert "\x1b[32mpassed\x1b[m\n" in text and "\x1b[31mfailed\x1b[m\n" in text
    assert max(map(len, lines_on_screen(text))) <= 80
    assert "\x1b" not in (lab.folder / "runs" / "trio" / "table.txt").read_text()


# ---- width -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_a_table_is_no_wider_than_its_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(columns)
    records = [complete_record("pp-interleaved-zero-bubble", pp=2), complete_record("fsdp", 1.5, dp_shard=4)]
    records[1] |= {"status": "failed", "reason": "rank 1: " + "a long reason " * 20 + "\nlogs/rank-1.log ends with:\nx"}
    text = COLOUR.sub("", table_for(terminal.stream, records))
    width = width_of(terminal.stream)
    assert width == min(columns, 100)
    assert max(map(len, text.splitlines())) <= width and "passed" in text
    assert max(map(len, progress_line(records[1], width=width).splitlines())) <= width
    left_out = {60: "loss diff, causal, CPU s/step, HFU", 80: "loss diff"}.get(columns)
    assert (f"Not in {width} columns: {left_out}." in text) if left_out else "Not in" not in text
    assert ("causal" in text.splitlines()[0]) == (columns >= 80)
    terminal.close()


def test_help_does_not_wrap(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_colours_are_of_verdicts_alone(terminal: Terminal) -> None:
    text = "passed away  passed\noom: failed: rank 0 failed to say\n  parity FAILED: its gradients failed"
    assert coloured(text, terminal.stream) == (
        "passed away  \x1b[32mpassed\x1b[m\noom: \x1b[31mfailed\x1b[m: rank 0 failed to say\n"
        "  \x1b[31mparity FAILED\x1b[m: its gradients \x1b[31mfailed\x1b[m"
    )


# ---- the line of a step ----------------------------------------------------------------------------------------------


def step_line(
    monkeypatch: pytest.MonkeyPatch, *, number: int = 7, seconds: float = 0.5, **settings: Any
) -> tuple[str, float]:
    """What rank 0 says of a step, and the MFU that it should say, in percent."""
    said: list[str] = []
    monkeypatch.setattr(journal, "say", said.append)
    monkeypatch.setattr(journal.dist, "get_rank", lambda: 0)
    recipe = small_recipe(train=dict(steps=settings.get("steps", 15), global_batch=8), parallel=dict(dp_shard=2))
    memory = settings.get("memory")
    counters: Any = SimpleNamespace(measures=memory and SimpleNamespace(memory=memory))
    peak = settings.get("peak", 1e9)
    step = Step(number)
    step.loss, step.grad_norm, step.seconds = torch.tensor(4.25), torch.tensor(13.1836), seconds
    Progress(recipe, peak=peak, counters=counters).read(step)
    flops = journal.model_flops_per_token(recipe.model, seq_len=16).full * 8 * 16
    return said[0], 100 * flops / (seconds * 2 * (peak or 1))


def test_a_step_says_its_speed_its_mfu_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    line, mfu = step_line(monkeypatch, memory={"peak_bytes": 48 * 2**20})
    assert line == f"step  7/15  loss 4.2500  grad 13.2  0.500 s  256 tokens/s  MFU {mfu:#.3g} %  48.0 MiB"
    line, _ = step_line(monkeypatch, peak=None)  # before a step was counted, on a device whose peak is not known
    assert line == "step  7/15  loss 4.2500  grad 13.2  0.500 s  256 tokens/s"
    line, _ = step_line(monkeypatch, memory={"peak_bytes": None, "allocator_peak_bytes": 61 * 2**30})
    assert line.endswith("  61.0 GiB")
    line, mfu = step_line(monkeypatch, peak=1.0)  # faster than the peak allows: no share of it is worth a number
    assert mfu > 100 and "MFU" not in line


def test_a_step_does_not_wrap_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, steps in ((7, 15), (99, 150), (15_000, 20_000)):
        for seconds in (1e-4, 0.4484, 44.84):
            settings = dict(steps=steps, memory={"peak_bytes": 61 * 2**30})
            line, _ = step_line(monkeypatch, number=number, seconds=seconds, **settings)
            assert len(line) <= NARROW and line.startswith(f"step {number:{len(str(steps))}}/{steps} ")


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_a_line_may_go_on(shell: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    for line, expected in (
        ("lab che", {"check", "checkpoint"}),
        ("lab run --res", {"--resume", "--resume-from"}),
        ("lab run --matmul ", {"highest", "medium"}),
        ("lab check rec", {"recipe.toml"}),
        ("lab run recipe.toml --set train.micro", {"train.micro_batch="}),
    ):
        answer = tmp_path / "answer"
        settings = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
        settings |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        settings |= {"_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_COMP_WORDBREAKS": " "}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.cli"], cwd=tmp_path, env=os.environ | settings, timeout=60
        )
        assert done.returncode == 0
        assert {re.split(r"[:\t ]", choice)[0] for choice in answer.read_text().splitlines()} == expected, line


def test_completion_in_a_real_shell(tmp_path: Path) -> None:
    script = """
        eval "$(register-python-argcomplete lab)"
        COMP_LINE="lab checkpoint sh" COMP_POINT=17 COMP_WORDS=(lab checkpoint sh) COMP_CWORD=2 COMP_TYPE=9
        _python_argcomplete lab
        echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["show"], done.stderr
