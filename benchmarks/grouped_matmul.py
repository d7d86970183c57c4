"""How fast each implementation of `grouped_matmul` is on this device, and how far from the definition.

    JAX_PLATFORMS=cpu python benchmarks/grouped_matmul.py

The product and both gradients, with groups as unequal as routers leave them; implementations take turns.
The processor's time is told beside the clock's, as other work on a machine does not lengthen it.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from stack.bench import data
from stack.bench.suites.attention import relative_error
from stack.bench.suites.grouped_matmul import sizes
from stack.kernels.grouped_matmul import KERNELS, Request, grouped_matmul, reference
from stack.kernels.grouped_matmul.api import device
from stack.parallel.rules import ONE_DEVICE

SHAPES = (
    (256, 2, 64, 128),
    (1024, 8, 256, 512),
    (2048, 8, 512, 1792),
    (2048, 32, 256, 512),
    (2048, 128, 256, 128),
)
"""Tokens, groups, inputs and outputs."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    platform, capability = device(ONE_DEVICE)
    for text, dtype in itertools.product(options.shapes, options.dtypes):
        shape = dict(zip(("tokens", "groups", "inputs", "outputs"), map(int, text.split(",")), strict=True))
        request = Request(platform=platform, compute_capability=capability, dtype=dtype, **shape)
        measure(request, options.rounds)


def measure(request: Request, rounds: int) -> None:
    """Every implementation that can, on one case."""
    tokens, groups, inputs, outputs = request.tokens, request.groups, request.inputs, request.outputs
    operands = [
        jnp.asarray(data.normal(seed, *shape), request.dtype)
        for seed, shape in enumerate(((tokens, inputs), (groups, inputs, outputs), (tokens, outputs)))
    ]
    counts = jnp.asarray(sizes(tokens, groups))
    runs = {name: both_ways(name) for name, kernel in KERNELS.items() if not kernel.obstacles(request)}
    expected = None
    if tokens * groups * outputs <= 2**26:  # The definition multiplies each token by every weight.
        expected = both_ways("reference")(*(each.astype(jnp.float32) for each in operands), counts)
    for run in runs.values():
        jax.block_until_ready(run(*operands, counts))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*operands, counts))
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    for name, run in runs.items():
        clock, processor = (statistics.median(each) for each in zip(*seconds[name], strict=True))
        case = {"tokens": tokens, "groups": groups, "inputs": inputs, "outputs": outputs}
        result = case | {
            "dtype": request.dtype,
            "kernel": name,
            "ms": 1e3 * clock,
            "processor_ms": 1e3 * processor,
        }
        if expected is not None:
            result["error"] = max(map(relative_error, run(*operands, counts), expected))
        print(json.dumps(result), flush=True)


def both_ways(name: str) -> jax.stages.Wrapped:
    """The result and the gradients of tokens and weights."""

    @jax.jit
    def run(tokens: jax.Array, weights: jax.Array, slope: jax.Array, counts: jax.Array) -> tuple:
        def product(tokens: jax.Array, weights: jax.Array) -> jax.Array:
            if name == "reference":
                return reference.grouped_matmul(tokens, weights, counts)
            return grouped_matmul(tokens, weights, counts[None], implementation=name)

        result, pull = jax.vjp(product, tokens, weights)
        return result, *pull(slope)

    return run


if __name__ == "__main__":
    main()
