"""Products in 8 bits against those in bfloat16: how far a model learns, on real text.

    uv run python benchmarks/fp8.py [--config FILE] [--steps N] [--seeds S ...] [--ways WAY ...] [--json FILE]

Trains the quickstart in bfloat16 and, with the same rows in the same order, with each way of scaling 8 bits.
On a CPU, which has no products in 8 bits, this tells the numbers and nothing of the speed. It fails where a
held-out loss is more than `BAND` above that of bfloat16; one below it is none the worse.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from stack.config import load
from stack.train.trainer import Trainer

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
FP8 = "kernels.matmul=fp8"
WAYS = {
    "bfloat16": (),
    "current, tensor": (FP8,),
    "current, channel": (FP8, "kernels.fp8.blocks=channel"),
    "delayed, tensor": (FP8, "kernels.fp8.scaling=delayed"),
    "current, block": (FP8, "kernels.fp8.blocks=block"),
    "current, mx": (FP8, "kernels.fp8.blocks=mx"),
}
BAND = 0.01
"""Of the held-out loss in bfloat16."""
WINDOW = 20
"""Steps whose mean is compared."""


def train(config: str, way: str, seed: int, steps: int, folder: str) -> dict[str, Any]:
    """Losses of every step, and the held-out loss at the end, in nats per token."""
    name = f"{way.replace(', ', '-')}-{seed}"
    trainer = Trainer(
        load(
            config,
            [
                f"name={name}",
                f"output_dir={folder}",
                f"seed={seed}",
                f"train.steps={steps}",
                "train.log_every=1",
                "model.dtype=bfloat16",
                "eval.every=0",
                "eval.baselines=false",
                "sample.at_end=false",
                "checkpoint.every=0",
                *WAYS[way],
            ],
        ),
        devices=jax.devices()[:1],
    )
    trainer.fit(progress=False)
    lines = map(json.loads, (Path(folder) / name / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return {"losses": losses, "heldout": float(trainer.evaluate()["loss"])}


def smooth(losses: list[float]) -> list[float]:
    """Means of windows, one after another."""
    return [statistics.fmean(losses[at : at + WINDOW]) for at in range(0, len(losses) - WINDOW + 1, WINDOW)]


def main() -> int:
    """Prints a line for each way and seed; 1 if one is out of the band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(QUICKSTART))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[1:], default=list(WAYS)[1:])
    parser.add_argument("--json")
    options = parser.parse_args()
    results: dict[str, dict[str, dict]] = {}
    outside = []
    print(
        f"{'products':<18} seed  held-out  over bfloat16  curve: mean, largest difference of {WINDOW} steps"
    )
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for way in ("bfloat16", *options.ways):
                found = train(options.config, way, seed, options.steps, folder)
                results.setdefault(way, {})[str(seed)] = found
                base = results["bfloat16"][str(seed)]
                share = found["heldout"] / base["heldout"] - 1
                pairs = zip(smooth(found["losses"]), smooth(base["losses"]), strict=True)
                gaps = [ours / theirs - 1 for ours, theirs in pairs]
                print(
                    f"{way:<18} {seed:>4}  {found['heldout']:8.4f}  {share:+12.2%}"
                    f"  {statistics.fmean(gaps):+.2%} {max(gaps, key=abs):+.2%}",
                    flush=True,
                )
                if share > BAND:
                    outside.append((way, seed))
                if options.json:
                    Path(options.json).write_text(json.dumps(results, indent=1))
    print(f"more than {BAND:.0%} above bfloat16 on held-out text: {outside or 'none'}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
