"""Muon against AdamW on the quickstart at equal time, each at the best of several learning rates.

    uv run python benchmarks/muon.py [--steps N] [--rates R ...] [--seeds S ...] [--json FILE]

A step of each is timed first, in turns, in seconds of the processor, which other work on the machine does
not lengthen; Muon then takes as many steps as fit the time of AdamW's.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from stack.config import Config, load
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.step.step import train_step
from stack.train.trainer import Trainer

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
KINDS = {"adamw": [], "muon": ["optimizer.momentum=0.95"]}


def config_of(kind: str, folder: str, *overrides: str) -> Config:
    """The quickstart with an optimizer."""
    return load(
        str(QUICKSTART),
        [
            f"output_dir={folder}",
            f"optimizer.kind={kind}",
            *KINDS[kind],
            "eval.every=0",
            "eval.baselines=false",
            "sample.at_end=false",
            "checkpoint.every=0",
            *overrides,
        ],
    )


def step_seconds(folder: str, rounds: int = 9, steps: int = 10) -> dict[str, float]:
    """Median processor seconds of a step of each, timed in turns."""
    turns, times = {}, {kind: [] for kind in KINDS}
    for kind in KINDS:
        trainer = Trainer(config_of(kind, folder, f"name=time-{kind}"))
        step = jax.jit(partial(train_step, trainer.program), donate_argnums=0)
        with meshes.use(trainer.mesh):
            turns[kind] = [trainer.mesh, step, states.init(trainer.program), trainer.batch(0)]
    for turn in range(rounds + 1):
        for kind, held in turns.items():
            mesh, step, state, batch = held
            with meshes.use(mesh):
                start = time.process_time()
                for _ in range(steps):
                    state, _ = step(state, batch)
                jax.block_until_ready(state)
            held[2] = state
            if turn:
                times[kind].append((time.process_time() - start) / steps)
    return {kind: statistics.median(values) for kind, values in times.items()}


def main() -> None:
    """Prints the times and a row for each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of AdamW")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict = {"runs": []}
    with tempfile.TemporaryDirectory() as folder:
        seconds = step_seconds(folder)
        steps = {kind: round(arguments.steps * seconds["adamw"] / seconds[kind]) for kind in KINDS}
        results |= {"step_seconds": seconds, "steps": steps}
        for kind in KINDS:
            print(f"{kind:<6} {1000 * seconds[kind]:.1f} ms of a processor a step: {steps[kind]} steps")
        for kind in KINDS:
            for rate in arguments.rates:
                for seed in arguments.seeds:
                    name = f"{kind}-{rate:g}-{seed}"
                    options = (f"optimizer.learning_rate={rate}", f"train.steps={steps[kind]}")
                    config = config_of(kind, folder, f"name={name}", f"seed={seed}", *options)
                    trainer = Trainer(config)
                    trainer.fit(progress=False)
                    nats = trainer.evaluate()["nats_per_byte"]
                    results["runs"].append({"kind": kind, "rate": rate, "seed": seed, "nats_per_byte": nats})
                    print(f"{kind:<6} learning rate {rate:<7g} seed {seed}: {nats:.4f}", flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
