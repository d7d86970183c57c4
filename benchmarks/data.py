"""Tokens a second read per core, and the time to a far step.

    uv run python benchmarks/data.py

Everything runs on one thread; the corpus is the `python` source, whose pages the first pass brings into
memory, so what is measured is the work and not the disk.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from stack.config import Config, MeshConfig
from stack.data import Dataset, open_data
from stack.data.loader import training_batches
from stack.data.packing import best_fit
from stack.objectives.causal import Causal
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout

SEQUENCE_LENGTH = 1024
BATCH_SIZE = 64
REPEATS = 40


def seconds(work: Callable[[], object]) -> float:
    """Median wall time of one call."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as cache:
        tree = {"data": {"sequence_length": SEQUENCE_LENGTH, "cache_dir": cache, "heldout_fraction": 0.05}}
        config = Config.model_validate(tree)
        start = time.perf_counter()
        train = open_data(config, show_progress=False).train
        size = train.num_bytes / 1e6
        print(f"tokenize and pack {size:.1f} MB of bytes: {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        open_data(config, show_progress=False)
        print(f"open from the cache: {time.perf_counter() - start:.3f} s")
        report(train)
    lengths = np.minimum(1 + np.random.default_rng(0).lognormal(6, 1, 2_000_000).astype(np.int64), 4096)
    start = time.perf_counter()
    bins = best_fit(lengths, 4096)
    fill = lengths.sum() / (4096 * (bins.max() + 1))
    took = time.perf_counter() - start
    print(f"pack 2,000,000 documents into rows of 4,096: {took:.2f} s, fill {fill:.4%}")


def report(train: Dataset) -> None:
    """Reading, from rows to device arrays."""
    tokens = BATCH_SIZE * SEQUENCE_LENGTH
    draw = np.random.default_rng(0)
    rows = seconds(lambda: train.read(draw.integers(0, train.num_rows, BATCH_SIZE), Causal.fields))
    print(f"read rows: {tokens / rows / 1e6:.1f} M tokens/s")
    config = MeshConfig(fsdp=1)
    layout = Layout.of(meshes.build(config, jax.devices()[:1]), config)
    loader = partial(
        training_batches, train, fields=Causal.fields, batch_size=BATCH_SIZE, seed=0, shuffle=True
    )
    make = loader(layout=layout)
    batches = map(make, itertools.count())
    batch = seconds(lambda: jax.block_until_ready(next(batches)))
    print(f"whole batch (order, rows, arrays on the device): {tokens / batch / 1e6:.1f} M tokens/s")
    for step in (10**3, 10**6, 10**9):
        batches = map(make, itertools.count(step))
        print(f"batch of step {step:,}: {1e3 * seconds(partial(next, batches)):.2f} ms")
    start = time.perf_counter()
    make = loader(layout=layout)
    jax.block_until_ready(make(10**6))
    print(f"new loader straight to step 1,000,000: {1e3 * (time.perf_counter() - start):.2f} ms")


if __name__ == "__main__":
    main()
