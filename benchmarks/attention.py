"""How fast each implementation of attention is on this device, and how far from the definition.

    python benchmarks/attention.py --lengths 128 256 1024 4096 --json attention.json

Forward and backward of one attention, rows of one document and of several; implementations take turns. The
processor's time is told beside the clock's, as other work on a machine does not lengthen it.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stack.kernels.attention import KERNELS, Dropout, Mask, Request, attend, reference, row_mask
from stack.parallel.rules import ONE_DEVICE

NAMES = ("output", "query", "key", "value")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=4096, help="of all rows together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=["causal"], choices=["causal", "full", "prefix"])
    parser.add_argument("--documents", nargs="+", type=int, default=[1, 8], help="of each row")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--window", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    sizes = (options.dtypes, options.kinds, options.lengths, options.documents)
    for dtype, kind, length, documents in itertools.product(*sizes):
        case = {"dtype": dtype, "kind": kind, "length": length, "documents": documents}
        results += measure(options, case)
    if options.json:
        told = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "results": results}
        options.json.write_text(json.dumps(told, indent=1))


def measure(options: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Every implementation that can, on one case."""
    arrays, mask, dropout = draw(options, case)
    able = [name for name in options.kernels if not KERNELS[name].obstacles(request(options, case))]
    more = {"softcap": options.softcap, "dropout": dropout}
    runs = {name: both_ways(partial(attend, layout=ONE_DEVICE, kernel=name, **more)) for name in able}
    few = [array[:1, :1024] for array in arrays]
    expected = None
    if case["length"] <= 1024:  # The definition holds all scores several times over.
        some = None if dropout is None else Dropout(rate=dropout.rate, rows=dropout.rows[:1])
        first = jax.tree.map(lambda array: array[:1], mask)
        exact = both_ways(partial(reference.attend, softcap=options.softcap, dropout=some))
        expected = jax.device_get(exact(*few, first))
    for run in runs.values():
        jax.block_until_ready(run(*arrays, mask))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*arrays, mask))
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    results = []
    for name, run in runs.items():
        clock, processor = (statistics.median(each) for each in zip(*seconds[name], strict=True))
        result = case | {"kernel": name, "ms": 1e3 * clock, "processor_ms": 1e3 * processor}
        if expected is not None:
            found = jax.device_get([array[:1] for array in run(*arrays, mask)])
            errors = map(error, found, expected)
            result |= {f"error_{part}": value for part, value in zip(NAMES, errors, strict=True)}
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the sum of squares, relative."""
    wide = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(wide) / np.linalg.norm(np.asarray(expected, np.float64)))


def both_ways(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """The output, and the gradients of query, key and value for a slope of one and minus one in turn."""

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> tuple[jax.Array, ...]:
        output, back = jax.vjp(lambda *arrays: attention(*arrays, mask=mask), query, key, value)
        slope = jnp.where(jnp.arange(output.shape[-1]) % 2 == 0, 1, -1).astype(output.dtype)
        return output, *back(jnp.broadcast_to(slope, output.shape))

    return run


def request(options: argparse.Namespace, case: dict[str, Any]) -> Request:
    """What is asked of an implementation here."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return Request(
        platform=device.platform,
        compute_capability=float(capability) if capability else None,
        dtype=case["dtype"],
        head_dim=options.head_dim,
        kind=case["kind"],
        window=options.window is not None,
        packed_length=case["length"] if case["documents"] > 1 else None,
        dropout=options.dropout,
        softcap=options.softcap,
    )


def draw(options: argparse.Namespace, case: dict[str, Any]) -> tuple[list[jax.Array], Mask, Dropout | None]:
    """Random arrays; documents end at random places."""
    random, length, documents = np.random.default_rng(0), case["length"], case["documents"]
    rows = max(1, options.tokens // length)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    shapes = [(rows, length, number, options.head_dim) for number in heads]
    arrays = [jnp.asarray(random.normal(size=shape), case["dtype"]) for shape in shapes]
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for row in range(rows if documents > 1 else 0):
        ends = np.sort(random.choice(np.arange(1, length), documents - 1, replace=False))
        segments[row] = 1 + np.searchsorted(ends, np.arange(length), side="right")
        positions[row] -= np.concatenate([[0], ends])[segments[row] - 1]
    prefix = jnp.asarray(positions < length // 8, jnp.int32) if case["kind"] == "prefix" else None
    places = map(jnp.asarray, (segments, positions))
    told: dict[str, Any] = {"kind": case["kind"], "window": options.window, "prefix": prefix}
    mask = row_mask(*places, packed=documents > 1, **told)
    words = random.integers(0, 2**32, (rows, options.heads, length, 2), np.uint32)
    return arrays, mask, Dropout(rate=options.dropout, rows=jnp.asarray(words)) if options.dropout else None


if __name__ == "__main__":
    main()
