"""Every objective on Python's own text: how far the held-out loss falls, and how fast rows are made.

    uv run python benchmarks/objectives.py [--steps N] [--only NAME ...] [--json FILE]

Models have the quickstart's size and read bytes; an encoder, a decoder or both as the objective needs.
Losses of different objectives are of different labels and compare with their own beginning alone.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from stack.config import Config, load
from stack.data.examples import TRAINING
from stack.train.trainer import Trainer

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ENCODER = {"kind": "encoder", "num_types": 4, "tied_embeddings": True}
TWO_STACKS = {"kind": "encoder_decoder", "num_layers": 2, "position": "relative", "attention_scale": 1.0}
TWO_STACKS |= {"init": "fan_in", "init_std": 1.0, "scale_residual_init": False}
CASES: dict[str, dict] = {
    "causal": {},
    "prefix_lm": {},
    "fill_in_middle": {},
    "span_corruption": {},
    "sentence_removal": {},
    "masked_words": ENCODER,
    "masked_words, whole words": ENCODER,
    "unilm": ENCODER,
    "span_corruption, two stacks": TWO_STACKS,
}
"""The objective, up to a comma, and what its model has besides."""


def config_of(name: str, steps: int, folder: str) -> Config:
    """The quickstart with another objective."""
    kind, _, more = name.partition(", ")
    tree = load(str(QUICKSTART)).model_dump(mode="json")
    tree["name"] = name.replace(", ", "-").replace(" ", "-")
    tree["output_dir"] = folder
    tree["model"] |= {"vocab_size": 361} | CASES[name]
    tree["objective"] = {"kind": kind} | ({"whole_words": True} if more == "whole words" else {})
    tree["data"] |= {"sequence_length": 256 if kind == "sentence_removal" else 128}
    tree["train"] |= {"steps": steps}
    tree["eval"] |= {"every": 25, "batches": 20, "baselines": False}
    tree["checkpoint"] |= {"every": steps}
    tree["sample"] = {} if tree["model"]["kind"] == "encoder" else {"at_end": False}
    return Config.model_validate(tree)


def measure(name: str, steps: int, folder: str) -> dict[str, Any]:
    """One run: the held-out figures at its first evaluation and at its end, and rows made a second."""
    trainer = Trainer(config_of(name, steps, folder))
    data, fields = trainer.data.train, trainer.program.objective.fields
    places = np.arange(256)
    draws = np.stack([np.zeros_like(places), np.full_like(places, TRAINING), places], axis=1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.examples.read(data, places, draws, fields)
        times.append(time.perf_counter() - start)
    history = trainer.fit(progress=False)
    evaluated = [record for record in history.records if record["kind"] == "heldout"]
    first, last = evaluated[0], evaluated[-1]
    return {
        "objective": name,
        "first_step": first["step"],
        "first_loss": first["loss"],
        "steps": last["step"],
        "loss": last["loss"],
        "accuracy": last["accuracy"],
        "tokens_per_second_of_one_thread": 256 * data.sequence_length / sorted(times)[2],
    }


def main() -> None:
    """Prints a row for each objective."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            results.append(row := measure(name, arguments.steps, folder))
            print(
                f"{name:<26} step {row['first_step']:>3} {row['first_loss']:.3f}   step {row['steps']:>3}"
                f" {row['loss']:.3f} nats a label, {row['accuracy']:.1%} right;"
                f" {row['tokens_per_second_of_one_thread'] / 1e6:.2f} million tokens/s made",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
