"""What averaging now and then costs in quality: the quickstart with four instances, by the steps of a period.

    uv run python benchmarks/averaging.py FOLDER [--steps 400] [--instances 4] [--seeds 1] [--data 1]

All runs read the same batches, of as many times the quickstart's rows as there are instances: data
parallelism, local SGD (the average as it is) and DiLoCo (an outer step). `alone` is the quickstart itself,
which reads one share of them. Runs that FOLDER holds already are read and not made again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
WAYS = {
    "alone": [],
    "data parallel": [],
    **{f"local SGD, {every}": [f"average.every={every}"] for every in (10, 50)},
    **{f"DiLoCo, {every}": [f"average.every={every}", "average.outer=nesterov"] for every in (1, 10, 50)},
    **{
        f"DiLoCo of momentum 0.5, {every}": [
            *(f"average.every={every}", "average.outer=nesterov", "average.outer_momentum=0.5"),
        ]
        for every in (10, 50)
    },
}


def main() -> None:
    """Makes the runs that are not there, and prints their held-out losses by tokens."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", type=int, default=1, help="virtual devices that the instances lie on")
    options = parser.parse_args()
    found = {}
    for way, overrides in WAYS.items():
        found[way] = [run(way, overrides, seed, options) for seed in range(options.seeds)]
        (options.folder / "averaging.json").write_text(json.dumps(found, indent=1) + "\n")
    steps = sorted(next(iter(found.values()))[0])
    print("| way, steps of a period |" + "".join(f" {step} steps |" for step in steps))
    print("|---|" + "---|" * len(steps))
    for way, losses in found.items():
        cells = ([one[step] for one in losses] for step in steps)
        print(f"| {way} |" + "".join(f" {_cell(values)} |" for values in cells))


def run(way: str, overrides: list[str], seed: int, options: argparse.Namespace) -> dict[int, float]:
    """Held-out loss in nats per byte by step."""
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    folder = options.folder / name
    rows = 12 * (1 if way == "alone" else options.instances)
    if overrides:
        overrides = [*overrides, f"average.instances={options.instances}"]
    command = [
        *(
            sys.executable,
            "-m",
            "stack",
            "train",
            str(CONFIG),
            f"name={name}",
            f"output_dir={options.folder}",
        ),
        *(f"train.steps={options.steps}", f"train.batch_size={rows}", f"seed={seed}", "eval.every=100"),
        *("checkpoint.every=0", f"mesh.data={options.data}", "mesh.fsdp=1", *overrides),
    ]
    if not _is_done(folder, options.steps):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(options.data), "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return {one["step"]: one["nats_per_byte"] for one in _records(folder) if one["kind"] == "heldout"}


def _is_done(folder: Path, steps: int) -> bool:
    return any(one["kind"] == "heldout" and one["step"] == steps for one in _records(folder))


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
