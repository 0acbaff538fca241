"""Command lines in, text out: errors in one line, and nothing printed that a terminal would obey."""

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, TextIO

from parallel.measure.record import CLUSTER, LABELS
from parallel.recipe import SECTIONS, RecipeError, did_you_mean

LONGEST_LABEL = 1000  # characters
STEP = re.compile(r"step +(\d+)/(\d+) +(.*)")  # a line of a rank's progress
BAR = 12  # columns
WATCH_SECONDS = 2.0
CLEAR = "\x1b[H\x1b[2J"
RED, GREEN, BOLD, DIM = "31", "32", "1", "2"  # ECMA-48, select graphic rendition
COLOURS = (  # of what a table and lines of progress say
    (re.compile(r"^  ok:|(?<= )passed$", re.MULTILINE), GREEN),
    (re.compile(r"(?<= )(?:FAILED|failed|oom|timeout|refused)$", re.MULTILINE), RED),
    (re.compile(r"(?<=: )(?:failed|oom|timeout)(?=: )|parity FAILED(?=[: ])"), RED),
    (re.compile(r"^\[\d+/\d+\] \S+"), BOLD),
)


# What argparse says of a wrong value, and how every other refusal says it: what, its value, what to give.
REFUSALS = {
    r"argument (\S+): invalid int value: ('.*')": r"\1 = \2: give a whole number",
    r"argument (\S+): invalid float value: ('.*')": r"\1 = \2: give a number",
    r"argument (\S+): invalid choice: ('.*') \(choose from (.*)\)": r"\1 = \2: give one of \3",
}


class CommandError(ValueError):
    """A command line or a comparison file that cannot be run. Its text is one line."""


def printable(text: Any) -> str:
    """`text` with control characters, escape sequences and the like shown as \\x1b; records may come from anywhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises CommandError, in one line, where argparse would print its usage and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        for pattern, words in REFUSALS.items():
            message = re.sub(pattern, words, message, flags=re.DOTALL)
        raise CommandError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            parser = getattr(arguments, "parser", self)  # that of the command, where there are commands
            options = sorted(set(re.findall(r"--[a-z][a-z-]*", parser.format_usage())))
            remedy = "put it after the command" if unknown[0] in options else did_you_mean(unknown[0], options)
            raise CommandError(f"unknown argument {unknown[0]!r} of {parser.prog}; {remedy}")
        for text in getattr(arguments, "set", ()):
            if text != text.encode(errors="replace").decode():  # bytes that are no text
                raise CommandError(f"--set = {text!r}: is not UTF-8; write section.key=value, as in train.steps=5")
        return arguments


def n_bytes(key: str, text: str) -> int:
    """How many bytes `text` is, as in 80GiB. Raises RecipeError."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([KMGT]i?B)", text)
    if not match:
        raise RecipeError(key, text, "give a number and KiB, MiB, GiB, TiB (or KB, MB, GB, TB), as in 80GiB")
    number, prefix, binary = match[1], match[2][0], "i" in match[2]
    return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix)))


# ---- a terminal, if it is one ---------------------------------------------------------------------------------------


def columns_of(stream: TextIO) -> int | None:
    """How wide the terminal is that `stream` prints to; None where it prints to a file, a pipe or the like."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def in_colour(stream: TextIO) -> bool:
    """Not where somebody has said NO_COLOR (no-color.org)."""
    return _obeys(stream) and not os.environ.get("NO_COLOR")


def _obeys(stream: TextIO) -> bool:
    """Whether it is a terminal that knows escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def coloured(text: str, stream: TextIO) -> str:
    """`text` with its verdicts in colour, where `stream` shows colours."""
    if in_colour(stream):
        for pattern, colour in COLOURS:
            text = pattern.sub(f"\x1b[{colour}m\\g<0>\x1b[m", text)
    return text


def watch(look: Callable[[], tuple[str, bool]], *, clear: bool) -> None:
    """Prints what `look` gives, and again as often as that changes, until it says that it was the last time.

    clear: the terminal, if it is one, so that only the last stands there.
    """
    before, ended = None, False
    while not ended:
        if before is not None:
            time.sleep(WATCH_SECONDS)
        text, ended = look()
        if text != before:
            again = not ended or before is not None
            print(f"{CLEAR if clear and again and _obeys(sys.stdout) else ''}{text}", flush=True)
            before = text


class Status:
    """Prints lines and, on a terminal, one below them that is written over and over: what goes on now."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def say(self, line: str) -> None:
        self._clear()
        print(coloured(line, self.stream), file=self.stream, flush=True)

    def now(self, line: str) -> None:
        """line: what rank 0 of a run has printed; of a step, a bar is drawn. Nothing where this is no terminal."""
        if not _obeys(self.stream):
            return
        self._clear()
        done, left = "", ""
        if step := STEP.match(line):
            n_done = BAR * int(step[1]) // max(1, int(step[2]))
            done, left, line = "━" * n_done, "─" * (BAR - n_done) + " ", f"{step[1]}/{step[2]}  {step[3]}"
        room = max(0, (columns_of(self.stream) or 80) - 3 - len(done + left))
        if step and in_colour(self.stream):
            done, left = f"\x1b[{GREEN}m{done}\x1b[m", f"\x1b[{DIM}m{left}\x1b[m"
        self.stream.write(f"  {done}{left}{printable(line)[:room]}")
        self.stream.flush()
        self._shown = True

    def _clear(self) -> None:
        if self._shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()  # an error may follow, on the other stream
            self._shown = False


# ---- options of several commands ------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser) -> None:
    over = "over the file, as train.steps=5; repeat it"
    added = parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=over)
    added.completer = _keys  # type: ignore[attr-defined]  # argcomplete's


def _keys(**_: Any) -> list[str]:
    return [f"{name}.{key.name}=" for name, section in SECTIONS.items() for key in dataclasses.fields(section)]


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Those that `lab run` and `lab compare` hand on to launch.train."""
    add = parser.add_argument
    peak = "dense FLOP/s of one rank's device, as 989e12, for MFU where its datasheet is not known"
    add("--peak-flops", metavar="FLOPS", type=float, help=peak)
    add("--profile", action="store_true", help="each rank writes a trace of step 4, which ui.perfetto.dev shows")
    matmul = "float32 products on a CPU; default: the faster that is exact, the same in all rows of a comparison"
    add("--matmul", choices=("highest", "medium"), help=matmul)
    add("--out", metavar="DIR", type=Path, default=Path("runs"), help="results; default: runs")


def add_force_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="start ranks that need more memory than this machine has")


def add_label_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster-name", metavar="NAME", help="of this cluster, in the record; default: $PARALLEL_LAB_CLUSTER")
    add("--tag", metavar="TAG", action="append", default=[], help="in the record, to find runs by; repeat it")
    add("--note", metavar="TEXT", help="in the record")


def set_labels(arguments: argparse.Namespace) -> None:
    """Hands those options on, by the environment: to every rank, and to whoever records that one failed.

    Raises RecipeError.
    """
    for tag in arguments.tag:
        if "," in tag:
            raise RecipeError("--tag", tag, "holds a comma; give each tag a --tag of its own")
    given = (("--cluster-name", arguments.cluster_name), ("--tag", ",".join(arguments.tag)), ("--note", arguments.note))
    for name, (option, text) in zip((CLUSTER, *LABELS), given, strict=True):
        if text is None or (option == "--tag" and not arguments.tag):
            continue
        if not text.strip() or not text.isprintable() or len(text) > LONGEST_LABEL:
            raise RecipeError(option, text[:40], f"give a line of text, at most {LONGEST_LABEL} characters")
        os.environ[name] = text


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on from the run's last checkpoint; from the start if there is none")
    start = "start from the last checkpoint of another run, in any layout"
    add("--resume-from", metavar="RUN_DIR", type=Path, help=start)


def rank_options(arguments: argparse.Namespace) -> list[str]:
    """Those options but --out, checked, as a command line has them. Raises RecipeError."""
    peak_flops = arguments.peak_flops
    if peak_flops is not None and not 0 < peak_flops < math.inf:
        raise RecipeError("--peak-flops", peak_flops, "give the dense FLOP/s of one device, as 989e12")
    given = {"--peak-flops": None if peak_flops is None else repr(peak_flops), "--matmul": arguments.matmul}
    options = [word for option, value in given.items() if value is not None for word in (option, value)]
    return ["--profile"] * arguments.profile + options


def progress(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Prints lines at once; not to stdout where that is for a machine."""
    return functools.partial(print, file=progress_stream(arguments), flush=True)


def progress_stream(arguments: argparse.Namespace) -> TextIO:
    return sys.stderr if arguments.json else sys.stdout
