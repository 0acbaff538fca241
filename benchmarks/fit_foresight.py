"""Fits the constants of parallel/foresight/constants.toml to published runs.

    python benchmarks/fit_foresight.py RUNS.csv                  # prints them
    python benchmarks/fit_foresight.py RUNS.csv --write          # into constants.toml
    python benchmarks/fit_foresight.py RUNS.csv --leave-out      # errors on each source, fitted without it

The posterior mode of the logarithms, by Gauss and Newton with weights that fall with the residual: a Gaussian around
what each constant was held to be before, an error common to the runs of a source, and one of each run. Runs of one
source are near-duplicates, and count as MOST of them at most. benchmarks/published.py reads RUNS.csv.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from published import DOUBTS, Prediction, Run, Score, Table, in_words, print_regret, read_rows, read_runs, scores

from parallel.foresight import constants
from parallel.foresight.constants import CONSTANTS
from parallel.foresight.uncertainty import Array

FILE = Path(constants.__file__).with_name("constants.toml")
NAMES = [(name, key) for name, by in CONSTANTS.items() for key in by]
SOURCE_DEVIATION, RUN_DEVIATION, OUTLIER = 0.10, 0.08, 0.15  # of log seconds
MOST = 20
ITERATIONS, STEP = 15, 0.01


def usable(run: Run) -> bool:
    """Fitted to: what says enough, and was not hindered by something that no formula here has."""
    if run.measured_seconds is None or {"layout", "offload", "limited power", "precision"} & set(run.doubts):
        return False
    if run.rates.gather_bytes != 1:  # DeepSpeed's ZeRO-3: what its messages take was set by these very rows
        return False
    mfu = run.model_flops / (run.measured_seconds * run.workload.world_size * (run.peak_flops or np.inf))
    return bool(mfu > 0.1 and run.workload.tp <= run.rates.node_ranks)


def fit(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """Constants by name and generation."""
    table = Table([run for run in runs if usable(run)])
    before = np.log([CONSTANTS[name][key].before for name, key in NAMES])
    spread = np.array([CONSTANTS[name][key].spread for name, key in NAMES])
    sources = [np.flatnonzero(table.sources == source) for source in dict.fromkeys(table.sources)]

    # What a source's rows leave open is likely to move them all.
    opened = np.array([sum(DOUBTS[doubt] ** 2 for doubt in run.doubts) for run in table.runs])
    doubtful = [SOURCE_DEVIATION**2 + np.median(opened[rows]) for rows in sources]

    def log_seconds(logs: Array) -> Array:
        return table.log_seconds(table.each(dict(zip(NAMES, np.exp(logs), strict=True))))

    logs = before.copy()
    for _ in range(ITERATIONS):
        base = log_seconds(logs)
        jacobian = np.stack([(log_seconds(logs + STEP * unit) - base) / STEP for unit in np.eye(len(logs))], axis=1)
        errors = table.log_measured - base
        precision, pull = np.diag(1 / spread**2), (before - logs) / spread**2
        for rows, common in zip(sources, doubtful, strict=True):
            off = np.abs(errors[rows] - np.median(errors[rows]))
            weights = np.minimum(1, OUTLIER / np.maximum(off, 1e-9)) * min(1, MOST / len(rows)) / RUN_DEVIATION**2
            # The inverse of diag(1 / weights) + SOURCE_DEVIATION², by Sherman and Morrison.
            shared = common / (1 + common * weights.sum())
            weighted = jacobian[rows] * weights[:, None]
            precision += jacobian[rows].T @ weighted - shared * np.outer(weighted.sum(0), weighted.sum(0))
            pull += weighted.T @ errors[rows] - shared * weighted.sum(0) * (weights @ errors[rows])
        step = np.clip(np.linalg.solve(precision, pull), -0.3, 0.3)
        logs = logs + step
        if np.abs(step).max() < 1e-4:
            break
    return dict(zip(NAMES, np.exp(logs).tolist(), strict=True))


def use(values: dict[tuple[str, str], float]) -> None:
    """From now on these constants are those of every prediction in this process."""
    for (name, key), value in values.items():
        CONSTANTS[name][key] = CONSTANTS[name][key]._replace(value=value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUNS.csv")
    parser.add_argument("--write", action="store_true", help="into constants.toml")
    parser.add_argument("--leave-out", action="store_true", help="errors on each source, fitted without it")
    parser.add_argument("--calibrate-on", metavar="N", type=int, default=0, help="with --leave-out, as in published.py")
    parser.add_argument("--markdown", action="store_true", help="the table as the docs have it")
    arguments = parser.parse_args()
    runs, _ = read_runs(read_rows(arguments.runs))
    if arguments.leave_out:
        found: list[Score] = []
        predictions: list[Prediction] = []
        for source in dict.fromkeys(run.source for run in runs):
            use(fit([run for run in runs if run.source != source]))
            of_source = scores([run for run in runs if run.source == source], arguments.calibrate_on)
            found += of_source[0]
            predictions += of_source[1]
        print(in_words(found, markdown=arguments.markdown))
        print_regret(predictions, markdown=arguments.markdown)
        return
    values = fit(runs)
    text = FILE.read_text(encoding="utf-8")
    for (name, key), value in values.items():
        print(f"{name + '.' + key:<24}{CONSTANTS[name][key].before:>8.3g} before{value:>8.3g}")
        text = re.sub(rf"(\[{name}\.{key}\][^\[]*?value = )[0-9.]+", rf"\g<1>{value:.3f}", text)
    if arguments.write:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
