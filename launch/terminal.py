"""Command lines in, text out: errors in one line, and nothing printed that a terminal would obey."""

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from parallel.recipe import RecipeError

PEAK_HELP = "dense FLOP/s of one rank's device, as 989e12, for MFU where its datasheet is not known"


def check_peak_flops(peak_flops: float | None) -> None:
    if peak_flops is not None and not 0 < peak_flops < math.inf:
        raise RecipeError("--peak-flops", peak_flops, "give the dense FLOP/s of one device, as 989e12")


class CommandError(ValueError):
    """A command line or a comparison file that cannot be run. Its text is one line."""


def printable(text: Any) -> str:
    """`text` with control characters, escape sequences and the like shown as \\x1b; records may come from anywhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises CommandError, in one line, where argparse would print its usage and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
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
