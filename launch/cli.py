"""The `lab` command. Exit codes: 0 done, 1 a run failed, 2 the recipe or the command line is wrong, 75 see EXAMPLES."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from launch.supervisor import Interrupted, Stopped
from launch.terminal import CommandError, Parser, printable
from launch.verdict import STOPPED
from parallel.measure.record import version
from parallel.recipe import RecipeError, did_you_mean

COMMANDS = (
    "check",
    "run",
    "dry-run",
    "plan",
    "calibrate",
    "compare",
    "report",
    "checkpoint",
    "submit",
    "status",
    "preflight",
)
EXAMPLES = """examples:
  lab check recipes/strategies/*.toml
      is every recipe right? starts nothing
  lab run recipes/strategies/fsdp.toml --set train.steps=5
      4 processes on this machine
  lab check recipes/large/llama3-8b-fsdp.toml --memory 80GiB
      does every rank fit? dry-runs one of each kind
  lab dry-run recipes/large/llama3-8b-fsdp.toml --world-size 1024
      memory and traffic of a rank, from this machine alone
  lab plan recipes/large/llama3-8b-fsdp.toml --cluster h100 --ranks 64
      the best layouts there, foretold, and how sure
  lab calibrate --out here.toml
      what this machine reaches, as a cluster for plan and dry-run
  lab compare recipes/compare/first-look.toml
      a table of four strategies in a minute
  lab report runs --html page.html
      a page of every result in a folder; --serve: one that follows runs
  lab run recipes/tiny.toml --set checkpoint.every=5
      saves itself; --resume goes on, in any layout
  lab checkpoint export runs/tiny --to tiny-llama
      its weights, for Hugging Face's transformers
  lab submit recipes/mixes/fsdp-tp.toml --nodes 2
      the same run by Slurm; lab status runs/fsdp-tp --watch

exit codes: 0 done, 1 a run failed, 2 the recipe or the command line is wrong,
75 a signal has ended a run that saved itself and can go on: --resume

completion: eval "$(register-python-argcomplete lab)" in bash and zsh,
register-python-argcomplete --shell fish lab | source in fish"""


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        code: int = _module(arguments.command).run(arguments)
        sys.stdout.flush()
        return code
    except Stopped as error:
        print(f"lab: {printable(error)}", file=sys.stderr)
        return STOPPED
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"lab: interrupted{f' by {error}' if str(error) else ''}; nothing is left running", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `lab report runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        return 1
    except (RecipeError, CommandError, OSError) as error:
        print(f"lab: {printable(error)}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2


def _module(command: str) -> Any:
    """Imported for itself: some take a while, which all others would wait for."""
    return importlib.import_module(f"launch.commands.{command.replace('-', '_')}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="lab", description="One transformer under every parallel strategy.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"parallel-lab {version('parallel-lab')}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", dest="command")
    for name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        command = _module(name)
        added = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        added.set_defaults(parser=added)
        added.add_argument("--json", action="store_true", help="machine-readable, alone on stdout")
        command.add_options(added)

    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line may go on
        import argcomplete

        argcomplete.autocomplete(parser)
    first = next((argument for argument in argv if not argument.startswith("-")), None)
    if first is not None and first not in COMMANDS:
        raise CommandError(f"unknown command {first!r}; {did_you_mean(first, COMMANDS)}")
    arguments = parser.parse(argv)
    if arguments.command is None:
        raise CommandError(f"give a command: {', '.join(COMMANDS)}; see lab --help")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
