"""One rank of a run, started by hand, by Slurm or by `lab run`.

    torchrun --standalone --nproc-per-node 4 -m launch.train recipes/strategies/fsdp.toml --set train.steps=5

With `torchrun --max-restarts`, with `lab run --max-restarts`, and in a job that Slurm has queued again, a life after
the first goes on from the last checkpoint.

Exit codes: 0 done, 1 failed, 2 the recipe or the command line is wrong, 75 stopped by SIGTERM or SIGUSR1 with a
checkpoint to --resume from (where checkpoint.every is above 0). On SIGUSR2 it writes its stack to stderr.
"""

import argparse
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.folder import RUN_FILES, hold, refuse_other_folder, remove_results, resumed_run
from launch.redaction import Redacted
from launch.table import table_for
from launch.terminal import (
    CommandError,
    Parser,
    add_label_options,
    add_rank_options,
    add_resume_options,
    add_settings,
    printable,
    rank_options,
    set_labels,
)
from launch.trackers import tracking
from launch.verdict import STOPPED, may_restart, record_error, record_failure
from parallel.checkpoint.files import Stopped
from parallel.measure.lives import start_life
from parallel.measure.record import read_record
from parallel.recipe import Recipe, RecipeError, load_recipe

# On CUDA: what is freed in one size can be used in another, which large models need to the last GiB.
ALLOCATOR = "expandable_segments:True"
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def main(argv: list[str]) -> int:
    faulthandler.enable()  # where native code crashes, it says from which line
    # The launcher asks a rank that hangs where it is, even inside a collective, which no Python handler could answer.
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
    rank, started = 0, time.time()
    try:
        read_srun()
        rank, world_size = (_from_environment(key, default) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        by_torchrun, by_slurm = (_from_environment(key, 0) > 0 for key in RESTART_COUNTS)
        parser = Parser(prog="launch.train", description=__doc__)
        parser.add_argument("recipe", metavar="RECIPE", help="a TOML file; see recipes/")
        add_settings(parser)
        add_rank_options(parser)
        add_label_options(parser)
        add_resume_options(parser)
        parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # by `lab run`, which tells the end itself
        arguments = parser.parse(argv)
        rank_options(arguments)
        set_labels(arguments)
        recipe = load_recipe(arguments.recipe, arguments.set)
        if world_size != recipe.world_size:
            n = recipe.world_size
            remedy = f"the product of [parallel] is {n}; torchrun --nproc-per-node {n} (times the nodes) gives as many"
            raise RecipeError("WORLD_SIZE", world_size, remedy)
        folder = arguments.out / recipe.name
        folder.mkdir(parents=True, exist_ok=True)
        before = read_record(folder / "record.json")
        restarted = by_torchrun or by_slurm
        # A job's first life may have ended before it had removed the record of an older run.
        written = by_torchrun or (by_slurm and before["labels"]["job_id"] == os.environ.get("SLURM_JOB_ID"))
        if written and before["status"] == "ok":  # a rank died after rank 0 had written it
            return 0
        if written and rank == 0 and before["kind"] and not may_restart(before):  # torchrun restarts whatever fails
            print(f"launch.train: not again: {printable(before['reason'])}", file=sys.stderr)
            return 1
        resume_from = resumed_run(
            recipe, folder, resume=arguments.resume, resume_from=arguments.resume_from, restarted=restarted
        )
        if rank == 0:
            refuse_other_folder(folder, RUN_FILES)
            remove_results(folder, resume=arguments.resume or restarted)
            start_life(folder, layout=vars(recipe.parallel), started=arguments.started or started)
            hold(folder)  # to the end of this process
    except OSError as error:
        print(f"launch.train: rank {rank}: --out cannot be used: {printable(error)}", file=sys.stderr)
        return 2
    except (RecipeError, CommandError) as error:
        if rank == 0:
            print(f"launch.train: {printable(error)}", file=sys.stderr)
        return 2
    options = {key: getattr(arguments, key) for key in ("peak_flops", "profile", "matmul")}
    asked = _signals() if recipe.checkpoint.every else ()
    options |= {"resume_from": resume_from, "asked": asked}
    quiet = contextlib.redirect_stdout(Redacted(sys.stdout)), contextlib.redirect_stderr(Redacted(sys.stderr))
    tracked = tracking(recipe, folder, goes_on=arguments.resume or restarted)
    with quiet[0], quiet[1], tracked if rank == 0 else contextlib.nullcontext(lambda row: None) as told:
        code = run(recipe, folder, rank, options | {"told": told})
    if code == 0 and rank == 0 and arguments.started is None:
        print(f"\n{table_for(sys.stdout, [read_record(folder / 'record.json')])}\n\n{folder}/record.json", flush=True)
    return code


def run(recipe: Recipe, folder: Path, rank: int, options: Mapping[str, Any]) -> int:
    """Trains; whatever goes wrong is printed, and recorded by the first rank that it happens to."""
    try:
        import_training()  # after the checks: torch takes seconds to import
        from parallel.training import train

        train(recipe, out=folder, **options)
        return 0
    except Stopped as error:  # the same on every rank
        if record_failure(recipe, folder, "failed", str(error)):
            print(f"launch.train: {printable(error)}", file=sys.stderr)
        return STOPPED
    except RecipeError as error:  # what only this host could tell: no such device, no such data
        if record_failure(recipe, folder, "refused", str(error)):
            print(f"launch.train: {printable(error)}", file=sys.stderr)
        return 2
    except BaseException as error:
        traceback.print_exc()
        record_error(recipe, folder, rank, error)
        return 1


def import_training() -> None:
    """Imports what a rank needs, without collections of what stays anyway: they take a quarter of the time."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR
    if os.environ.get("OMP_NUM_THREADS") == "1":
        # Then the proof alone takes more threads. On cores that are not all free, one that has done its part and spins
        # takes away what the other needs: 20 s in place of 1. OpenMP reads this where torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()
    try:
        import parallel.training  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _signals() -> Sequence[int]:
    """The signals that ask for a checkpoint and the end, in a list that grows as they come."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(number))
    return asked


def _from_environment(key: str, default: int) -> int:
    text = os.environ.get(key, str(default))
    if not text.isdecimal():
        raise RecipeError(key, text, "give a whole number, as torchrun does")
    return int(text)


def read_srun() -> None:
    """Where srun alone has started the ranks, a task each: what torchrun would have set."""
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ or _from_environment("SLURM_NTASKS", 1) == 1:
        return
    given = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    os.environ.update({key: os.environ[of_slurm] for key, of_slurm in given.items()})
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in os.environ:
            raise RecipeError(key, None, "export the host of rank 0 and a free port there, as slurm/train.sbatch does")


def leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, in which gloo's threads can abort (pytorch issue 190489)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
