"""How well this machine is foretold: it is measured, then every strategy runs, and three of them tell of the others.

    make foresight
    python benchmarks/foresight_here.py --cluster runs/foresight/here.toml --runs runs/foresight/strategies    # again

Each of the 18 rows of recipes/compare/strategies.toml is foretold by `lab calibrate` alone; then with the constants
fitted to the first, the middle and the last row. On a CPU what is foretold is CPU seconds of a step, over all ranks.
docs/foresight.md has the table.
"""

import argparse
import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.commands.calibrate import runs_in
from parallel.foresight.calibration import Run, calibrated_on, predicted_seconds
from parallel.foresight.clusters import Cluster, load_cluster

COMPARISON = "recipes/compare/strategies.toml"
APART = 0.10  # from which two rows' order must be right
TRIPLES = 100  # other threes that are tried


def lab(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launch.cli", *arguments], check=True)


def foretold(runs: Sequence[Run], cluster: Cluster) -> np.ndarray:
    return np.array([predicted_seconds(run.recipe, cluster) for run in runs])


def unseen_error(runs: Sequence[Run], cluster: Cluster, seen: Sequence[int]) -> float:
    """Mean of |foretold / measured - 1| over the runs that the cluster was not calibrated on."""
    after = foretold(runs, calibrated_on([runs[i] for i in seen], cluster))
    off = np.abs(after / [run.seconds for run in runs] - 1)
    return float(np.delete(off, seen).mean())


def wrong_pairs(runs: Sequence[Run], seconds: np.ndarray) -> tuple[list[str], int]:
    """Pairs in which one is more than APART slower and is foretold to be the faster; and of how many."""
    wrong, n = [], 0
    for (i, a), (j, b) in itertools.permutations(enumerate(runs), 2):
        if a.seconds > (1 + APART) * b.seconds:
            n += 1
            if seconds[i] < seconds[j]:
                wrong.append(f"{a.name} before {b.name}")
    return wrong, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/foresight"), help="for all that is new")
    parser.add_argument("--cluster", metavar="FILE", type=Path, help="of an earlier lab calibrate")
    parser.add_argument("--runs", metavar="DIR", type=Path, help="of an earlier lab compare")
    arguments = parser.parse_args()
    file, folder = arguments.cluster, arguments.runs
    if file is None:
        file = arguments.out / "here.toml"
        file.unlink(missing_ok=True)
        lab("calibrate", "--ranks", "4", "--out", str(file))
    if folder is None:
        lab("compare", COMPARISON, "--out", str(arguments.out), "--cluster", str(file))
        folder = arguments.out / "strategies"
    cluster = load_cluster(str(file))
    runs, left_out = runs_in([folder], cluster)
    print("\n".join(left_out))
    seen = (0, len(runs) // 2 - 1, len(runs) - 1)
    measured, before = np.array([run.seconds for run in runs]), foretold(runs, cluster)
    after = foretold(runs, calibrated_on([runs[i] for i in seen], cluster))

    print("| row | measured | by the machine alone | off, % | after three rows | off, % |\n|---|--:|--:|--:|--:|--:|")
    for i, run in enumerate(runs):
        name = f"{run.name} (seen)" if i in seen else run.name
        off = [f"{100 * (seconds[i] / measured[i] - 1):+.1f}" for seconds in (before, after)]
        print(f"| {name} | {measured[i]:.3f} | {before[i]:.3f} | {off[0]} | {after[i]:.3f} | {off[1]} |")
    alone = np.abs(before / measured - 1).mean()
    print(
        f"\nmean of |off|: {100 * alone:.1f} % by the machine alone, {100 * unseen_error(runs, cluster, seen):.1f} % of"
    )
    print(f"the {len(runs) - len(seen)} rows that were not seen")
    threes = list(itertools.combinations(range(len(runs)), len(seen)))
    tried = random.Random(0).sample(threes, min(TRIPLES, len(threes)))
    errors = np.quantile([unseen_error(runs, cluster, three) for three in tried], (0.1, 0.5, 0.9))
    print(
        f"with {len(tried)} other threes: median {100 * errors[1]:.1f} %, 80 % of them {100 * errors[0]:.1f} to",
        end=" ",
    )
    print(f"{100 * errors[2]:.1f} %")
    for what, seconds in (("by the machine alone", before), ("after three", after)):
        wrong, n = wrong_pairs(runs, seconds)
        names = f": {', '.join(wrong)}" if wrong else ""
        print(f"order {what}: {n - len(wrong)} of {n} pairs that differ by more than {APART:.0%} are right{names}")


if __name__ == "__main__":
    main()
