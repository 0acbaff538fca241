"""One rank of `lab calibrate`: measures its device, and with the others their links; rank 0 writes what was found.

torchrun --standalone --nproc-per-node 4 -m launch.calibration --write measured.json --seconds 60
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path

from launch.terminal import CommandError, Parser, printable
from launch.train import leave
from parallel.measure.record import write_json
from parallel.recipe import RecipeError, recipe_from_tables


def main(argv: list[str]) -> int:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)  # "where are you?": launch/supervisor.py
    rank, world_size = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    try:
        parser = Parser(prog="launch.calibration", description=__doc__)
        parser.add_argument("--write", metavar="FILE", type=Path, required=True)
        parser.add_argument("--seconds", type=float, required=True)
        parser.add_argument("--limit", type=float, default=600.0, help="seconds to wait for another rank")
        parser.add_argument("--matmul", choices=("highest", "medium"), default="highest")
        arguments = parser.parse(argv)
        import torch

        from parallel.measure.microbenchmarks import measure
        from parallel.process import process_group

        def say(line: str) -> None:
            if rank == 0:
                print(line, flush=True)

        # What a rank does is no step of any model; but it joins the others as a rank of a run does.
        train = {"global_batch": world_size, "time_limit_seconds": arguments.limit}
        tables = {"name": "calibrate", "train": train, "parallel": {"dp_replicate": world_size}}
        torch.set_float32_matmul_precision(arguments.matmul)
        with process_group(recipe_from_tables(tables)) as (device, unused):
            if unused:
                say(unused)
            found = measure(device, seconds=arguments.seconds, say=say)
            if rank == 0:
                write_json(arguments.write, found)
        return 0
    except (RecipeError, CommandError) as error:
        print(f"launch.calibration: {printable(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
