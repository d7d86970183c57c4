"""How far the planner's memory formula is from the compiled step, over a fixed grid.

    uv run python benchmarks/plan_memory.py                  # compiles what the file lacks, then reports
    uv run python benchmarks/plan_memory.py --report         # reports only
    uv run python benchmarks/plan_memory.py --fit            # fits the formula's constants to the file
    uv run python benchmarks/plan_memory.py llama3_8b        # one recipe

Every recipe x zero 0-3 x remat none, full, dots x no tensor parallelism, tensor parallelism, and sequence
parallelism besides; each with the micro-batch and accumulation of the recipe on its own hardware, compiled
for H200. Needs the extra `plan`; 10 to 30 s of one core per cell. Each result is appended to the file as it
is known, so that a stopped run goes on where it was. Cells that hold more than the device does are reported
apart: there the compiler computes again what it can, and schedules in despair.

Every cell takes the loss in chunks of 1,024 tokens, the default when the file was begun, so that its rows
stay comparable. Recipes of today take as many tokens as the model is wide.
"""

import argparse
import csv
import math
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

from stack import load
from stack.config import Config
from stack.parallel.mesh import resolve
from stack.planner.compiled.compile import compile_lowered, devices, lower_step
from stack.planner.formula import memory as formula
from stack.planner.formula.memory import memory
from stack.planner.formula.workload import Workload, from_config
from stack.step import program as programs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plan_memory.csv"
COLUMNS = (
    "recipe", "zero", "remat", "tensor", "sequence_parallel", "devices", "micro_batch", "accumulation",
    "compiled_bytes", "jax",
)  # fmt: skip

DEVICE_BYTES = 141e9
"""Of an H200."""

LOSS_TOKENS = 1024
"""Tokens of a device whose logits exist at once, in every cell."""

CONSTANTS = {
    "STREAMS": [float(number) for number in range(1, 15)],
    "AHEAD": [step / 20 for step in range(21)],
    "SPLITS": [step * 2.0**18 for step in range(17)],
}
"""Constants of `stack.planner.formula.memory` that are fitted, and the values that are tried."""

RECIPES = {
    "nanogpt_cpu": 8,
    "quickstart": 8,
    "gpt2_124m": 8,
    "gpt2_355m": 8,
    "gpt2_774m": 8,
    "gpt2_1_5b": 8,
    "qwen3_0_6b": 8,
    "turing_nlg_small": 8,
    "llama3_8b": 16,
    "turing_nlg_17b": 32,
    "llama3_70b": 64,
}
"""Devices each is compiled for here; its micro-batch is that on the devices of its target."""


class Cell(NamedTuple):
    """One step of the grid."""

    recipe: str
    zero: int
    remat: str
    tensor: int
    sequence_parallel: bool


def cells(recipes: list[str]) -> Iterator[Cell]:
    """The grid of some recipes; those whose heads, MLP and vocabulary no number divides have no `tensor`."""
    for recipe in recipes:
        model = load(ROOT / "configs" / f"{recipe}.yaml").model
        common = math.gcd(model.num_heads, model.kv_heads, model.mlp_width, model.padded_vocab_size)
        tensor = next((n for n in range(2, common + 1) if common % n == 0), 1)
        splits = [(1, False), (tensor, False), (tensor, True)] if tensor > 1 else [(1, False)]
        for zero in range(4):
            for remat in ("none", "full", "dots"):
                for ways, sequence_parallel in splits:
                    yield Cell(recipe, zero, remat, ways, sequence_parallel)


def config_of(cell: Cell) -> Config:
    """The recipe on the grid's mesh, with the micro-batch and accumulation it was written with."""
    path = ROOT / "configs" / f"{cell.recipe}.yaml"
    recipe = load(path)
    assert recipe.target is not None
    here = RECIPES[cell.recipe]
    sizes = resolve(recipe.mesh, recipe.target.devices)
    micro = recipe.train.batch_size // recipe.train.accumulation // (sizes["data"] * sizes["fsdp"])
    rows = micro * recipe.train.accumulation * here // cell.tensor
    logits_bytes = LOSS_TOKENS * (4 * recipe.model.padded_vocab_size // cell.tensor)
    # Layers that are computed again are never unrolled.
    rolled = ["model.scan_unroll=1"] if cell.remat != "none" and recipe.model.scan_unroll > 1 else []
    # These cells were compiled before there was a kernel that drops weights.
    stored = ["kernels.attention=xla"] if recipe.model.attention_dropout else []
    return load(
        path,
        [
            *rolled,
            *stored,
            f"objective.logits_bytes={logits_bytes}",
            "mesh.data=1",
            f"mesh.fsdp={here // cell.tensor}",
            f"mesh.tensor={cell.tensor}",
            f"mesh.zero={cell.zero}",
            f"mesh.sequence_parallel={str(cell.sequence_parallel).lower()}",
            f"train.remat={cell.remat}",
            f"train.batch_size={rows}",
            f"eval.batch_size={here // cell.tensor}",
        ],
    )


def workload_of(config: Config) -> Workload:
    """What the formula is asked."""
    return from_config(config, config.mesh.fsdp * config.mesh.tensor)


def compiled_bytes(config: Config) -> int:
    """What the runtime takes on one device to run the step.

    State and batch, what is returned besides them, and the block of temporaries, which is allocated
    whole when the step starts: XLA's own peak leaves out the holes in it.
    """
    ways = config.mesh.fsdp * config.mesh.tensor
    target = devices("h200", ways, per_host=math.gcd(8, ways))
    lowered = lower_step(programs.build(config, target))
    plan = compile_lowered(lowered, target[0]).memory_analysis()
    assert plan is not None
    state = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return state + plan.temp_size_in_bytes


def record(cell: Cell, results: Path) -> None:
    """Compiles one cell and appends what it holds."""
    config, start = config_of(cell), time.perf_counter()
    size = compiled_bytes(config)
    workload = workload_of(config)
    print(f"{cell}: {size / 2**30:.3f} GiB, {time.perf_counter() - start:.0f} s", flush=True)
    new = not results.exists()
    with results.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(
            (*cell, workload.devices, workload.micro_batch, workload.accumulation, size, jax.__version__)
        )


def read_results(results: Path) -> dict[Cell, int]:
    """Compiled bytes of every cell in the file."""
    if not results.exists():
        return {}
    with results.open(newline="") as file:
        return {_cell(row): int(row["compiled_bytes"]) for row in csv.DictReader(file)}


def _cell(row: dict[str, str]) -> Cell:
    split = row["sequence_parallel"] == "True"
    return Cell(row["recipe"], int(row["zero"]), row["remat"], int(row["tensor"]), split)


def fit(sizes: dict[Cell, int]) -> dict[str, float]:
    """The constants that make the mean of |log(formula / compiled)| smallest, one after the other.

    Args:
        sizes: compiled bytes of each cell.
    """
    works = [(workload_of(config_of(cell)), size) for cell, size in sizes.items()]
    best = {name: float(getattr(formula, name)) for name in CONSTANTS}

    def error(constants: dict[str, float]) -> float:
        with mock.patch.dict(vars(formula), constants):
            return statistics.fmean(abs(math.log(memory(work).program / size)) for work, size in works)

    before = None
    while best != before:
        before = dict(best)
        for name, values in CONSTANTS.items():
            errors = {value: error(best | {name: value}) for value in values}
            best[name] = min(errors, key=errors.__getitem__)
            low = errors[best[name]]
            same = [value for value in values if errors[value] <= low + 1e-4]
            print(f"{name} {best[name]:g}: {low:.3%}; {same[0]:g} to {same[-1]:g} are as good to 0.01%")
    return best


def report(sizes: dict[Cell, int], total: int) -> None:
    """Prints the distribution of (formula / compiled - 1), over all and by each column."""
    errors = {cell: memory(workload_of(config_of(cell))).program / size - 1 for cell, size in sizes.items()}
    print(f"{len(errors)} of {total} cells")

    def line(name: str, cells: list[Cell]) -> None:
        if not cells:
            return
        absolute = sorted(abs(errors[cell]) for cell in cells)
        p90 = absolute[math.ceil(0.9 * len(absolute)) - 1]
        within = sum(error <= 0.05 for error in absolute)
        print(
            f"{name:34} {len(absolute):4} cells  median {statistics.median(absolute):6.1%}  p90 {p90:6.1%}"
            f"  worst {absolute[-1]:6.1%}  within 5%: {within / len(absolute):4.0%}"
        )

    line("all", list(errors))
    fits = [cell for cell in errors if sizes[cell] <= DEVICE_BYTES]
    line("that fit on the device", fits)
    line("that do not", [cell for cell in errors if cell not in fits])
    for column in Cell._fields:
        for value in dict.fromkeys(getattr(cell, column) for cell in errors):
            line(f"{column} {value}", [cell for cell in errors if getattr(cell, column) == value])
    for cell in sorted(errors, key=lambda cell: -abs(errors[cell])):
        print(f"{errors[cell]:+7.1%}  {sizes[cell] / 2**30:8.3f} GiB  {' '.join(map(str, cell))}")


def main() -> None:
    """Compiles what is missing, then reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help="all by default")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--fit", action="store_true", help="compile nothing; fit the formula's constants")
    parser.add_argument("--limit", type=int, help="compile at most this many; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    grid = list(cells(arguments.recipes or list(RECIPES)))
    # In no order, the same each time: what a stopped run leaves is a fair sample.
    random.Random(0).shuffle(grid)
    missing = [cell for cell in grid if cell not in read_results(arguments.results)]
    for cell in [] if arguments.report or arguments.fit else missing[: arguments.limit]:
        record(cell, arguments.results)
    results = read_results(arguments.results)
    sizes = {cell: results[cell] for cell in grid if cell in results}
    if arguments.fit:
        print(fit(sizes))
    else:
        report(sizes, len(grid))


if __name__ == "__main__":
    main()
