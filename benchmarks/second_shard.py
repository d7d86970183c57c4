"""What crosses nodes in 8 bits against what crosses as it is: how far a model learns, on real text.

    uv run python benchmarks/second_shard.py [--config FILE] [--steps N] [--seeds S ...]

Trains the quickstart over `data` 4 x `fsdp` 2 of virtual CPU devices with a second shard, on the same rows in
the same order: weights and gradients cross `data` as they are, weights in 8 bits, and both. How far runs
drift apart that differ in the order of sums alone is told by another layout. It tells the numbers, and
nothing of the speed. It fails where the mean held-out loss of all seeds is more than `BAND` above that of
the first.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

from stack.config import load
from stack.train.trainer import Trainer

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MESH = ("mesh.data=4", "mesh.fsdp=2", "mesh.second_shard=true", "train.batch_size=16")
WAYS = {
    "as they are": (),
    "the same, data 2 x fsdp 4": ("mesh.data=2", "mesh.fsdp=4"),
    "int8 weights": ("mesh.gather_dtype=int8",),
    "int8 weights and gradients": ("mesh.gather_dtype=int8", "mesh.scatter_dtype=int8"),
}
BAND = 0.01
"""Of the held-out loss of what crosses as it is."""
WINDOW = 20
"""Steps whose mean is compared."""


def train(config: str, way: str, seed: int, steps: int, folder: str) -> tuple[list[float], float]:
    """The loss of every step, and the held-out loss at the end, in nats per token."""
    name = f"{way.replace(' ', '-')}-{seed}"
    own = (f"name={name}", f"output_dir={folder}", f"seed={seed}", f"train.steps={steps}")
    quiet = ("train.log_every=1", "eval.every=0", "eval.baselines=false")
    none = ("sample.at_end=false", "checkpoint.every=0", "target=null")
    trainer = Trainer(load(config, [*own, *quiet, *none, *MESH, *WAYS[way]]))
    trainer.fit(progress=False)
    lines = map(json.loads, (Path(folder) / name / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"], float(trainer.evaluate()["loss"])


def smooth(losses: list[float]) -> list[float]:
    """Means of windows, one after another."""
    return [statistics.fmean(losses[at : at + WINDOW]) for at in range(0, len(losses) - WINDOW + 1, WINDOW)]


def main() -> int:
    """Prints a line for each way and seed; 1 if a way is out of the band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(QUICKSTART))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    shares: dict[str, list[float]] = {}
    print(f"{'across data':<27} seed  held-out  over the first  curve: mean, largest of {WINDOW} steps")
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            first: tuple[list[float], float] | None = None
            for way in WAYS:
                losses, heldout = train(options.config, way, seed, options.steps, folder)
                first = first or (losses, heldout)
                share = heldout / first[1] - 1
                pairs = zip(smooth(losses), smooth(first[0]), strict=True)
                gaps = [ours / theirs - 1 for ours, theirs in pairs]
                print(
                    f"{way:<27} {seed:>4}  {heldout:8.4f}  {share:+14.2%}"
                    f"  {statistics.fmean(gaps):+.2%} {max(gaps, key=abs):+.2%}",
                    flush=True,
                )
                shares.setdefault(way, []).append(share)
    for way, values in shares.items():
        print(f"{way:<27} mean  {statistics.fmean(values):+24.2%}")
    outside = [way for way, values in shares.items() if statistics.fmean(values) > BAND]
    print(f"more than {BAND:.0%} above the first on held-out text: {outside or 'none'}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
