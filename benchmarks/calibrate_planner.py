"""Fits the planner's efficiencies to the published runs, and judges the fit by leaving sources out.

    uv run python benchmarks/calibrate_planner.py

Fitted, per generation of chips: matmul, matmul_half, attention, link and overlap, within their physical
ranges; `memory` and `launch_seconds` are set by hand. Blackwell has six runs only: there matmul alone is
fitted and the rest is Hopper's. Each run's residual is the logarithm of predicted over published step
time; a soft loss keeps single outliers from pulling, and a source of n runs weighs n^0.3, so that one
project's table does not decide alone. Prints the constants for `stack/hardware/chips/generations.yaml`.
"""

import argparse
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from stack.hardware import chip as chips
from stack.planner.formula.time import published_time
from stack.planner.validate import Run, percentile, validate

FITTED = {
    "ampere": ("matmul", "matmul_half", "attention", "link", "overlap"),
    "hopper": ("matmul", "matmul_half", "attention", "link", "overlap"),
    "blackwell": ("matmul",),
}
RANGES = {
    "matmul": (0.5, 0.92),
    "matmul_half": (50.0, 2000.0),
    "attention": (0.2, 0.85),
    "link": (0.4, 0.95),
    "overlap": (0.0, 1.0),
}
START = {"matmul": 0.8, "matmul_half": 600.0, "attention": 0.4, "link": 0.7, "overlap": 0.5}
MEMORY, LAUNCH_SECONDS = 0.8, 4e-6


def fit(runs: Sequence[Run], generation: str, start: dict[str, float]) -> dict[str, float]:
    """The fitted constants of one generation; those that are not fitted are as in `start`."""
    names = FITTED[generation]
    mine = [run for run in runs if _generation(run) == generation]
    count = Counter(run.source for run in mine)
    low, high = np.array([RANGES[name] for name in names]).T

    def residuals(shares: np.ndarray) -> list[float]:
        constants = start | dict(zip(names, (low + shares * (high - low)).tolist(), strict=True))
        return [math.log(_predict(run, constants) / run.seconds) * count[run.source] ** -0.35 for run in mine]

    first = (np.array([start[name] for name in names]) - low) / (high - low)
    solution = least_squares(
        residuals, np.clip(first, 0.01, 0.99), bounds=(0, 1), loss="soft_l1", f_scale=0.05
    )
    return start | dict(zip(names, (low + solution.x * (high - low)).tolist(), strict=True))


def fit_all(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """The constants of all fitted generations."""
    constants = {name: fit(runs, name, START) for name in ("ampere", "hopper")}
    return constants | {"blackwell": fit(runs, "blackwell", constants["hopper"])}


def main() -> None:
    """Fits, prints, leaves each source out in turn."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    runs = validate().runs
    constants = fit_all(runs)
    for name, values in constants.items():
        print(name, {key: float(f"{value:.3g}") for key, value in values.items()})
    _report("fitted on all", runs, {run.line: _error(run, constants) for run in runs})
    cross_validation = {}
    for source in dict.fromkeys(run.source for run in runs):
        others = fit_all([run for run in runs if run.source != source])
        cross_validation |= {run.line: _error(run, others) for run in runs if run.source == source}
    _report("each source predicted from the others", runs, cross_validation)


def _report(title: str, runs: Sequence[Run], errors: dict[int, float]) -> None:
    print(f"\n{title}")
    for precision in ("bf16", "fp8"):
        medians = []
        for source in dict.fromkeys(run.source for run in runs):
            mine = [errors[run.line] for run in runs if (run.source, run.precision) == (source, precision)]
            if mine:
                absolute = [abs(error) for error in mine]
                medians.append(statistics.median(absolute))
                print(
                    f"  {source[:52]:52} {precision} {len(mine):4} runs, median {medians[-1]:6.1%},"
                    f" p90 {percentile(absolute, 0.9):6.1%}, bias {statistics.median(mine):+6.1%}"
                )
        every = [abs(errors[run.line]) for run in runs if run.precision == precision]
        print(
            f"  {precision}: median {statistics.median(every):.1%}, median of the sources' medians"
            f" {statistics.median(medians):.1%}, p90 {percentile(every, 0.9):.1%}"
        )


def _error(run: Run, constants: dict[str, dict[str, float]]) -> float:
    return _predict(run, constants[_generation(run)]) / run.seconds - 1


def _predict(run: Run, constants: dict[str, float]) -> float:
    chip = chips.load(run.hardware)
    efficiency = chips.Efficiency(**constants, memory=MEMORY, launch_seconds=LAUNCH_SECONDS)
    return published_time(run.work, dataclasses.replace(chip, efficiency=efficiency)).total


def _generation(run: Run) -> str:
    return chips.load(run.hardware).generation


if __name__ == "__main__":
    main()
