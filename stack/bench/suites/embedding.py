"""The gradient of a table of words: summed in an order that stays, beside a plain scatter."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stack.bench.case import Case, Machine
from stack.bench.serve import Ready
from stack.bench.timing import queued
from stack.layers.embedding import sum_sorted_rows

_LIMIT = 1e-5
_AGAIN = 5


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """GPT-2 124M's and Llama 3 8B's, of one micro-batch."""
    sizes = [(32_768, 768, 50_304), (8_192, 4_096, 128_256)]
    if machine.is_cpu:
        sizes = [(1_536, 128, 384), (2_048, 768, 50_304)]
    if tiny:
        sizes = [(1_000, 16, 99)]
    return [
        Case(
            suite="embedding",
            title=f"{tokens:,} x {width:,} into {words:,} rows, bfloat16",
            spec={"tokens": tokens, "width": width, "words": words},
            priority=50 + place,
            seconds=60,
        )
        for place, (tokens, width, words) in enumerate(sizes)
    ]


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """Both ways."""
    del peers
    return {"sorted": partial(_prepare, spec, "sorted"), "scatter": partial(_prepare, spec, "scatter")}


def _prepare(spec: dict[str, Any], which: str) -> Ready:
    """The error against float64, and whether the bits are the same each time."""
    tokens, width, words = spec["tokens"], spec["width"], spec["words"]
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(words) + 2.7)  # Zipf's law, as in text.
    ids = rng.choice(words, tokens, p=share / share.sum()).astype(np.int32)
    values = rng.normal(size=(tokens, width)).astype("bfloat16")
    exact = np.zeros((words, width))
    np.add.at(exact, ids, values.astype(np.float64))

    def scatter(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values.astype(jnp.float32), ids, words)

    add = scatter if which == "scatter" else partial(sum_sorted_rows, number=words)
    compiled, arrays = jax.jit(add), jax.device_put((values, ids))
    results = [np.asarray(compiled(*arrays)) for _ in range(_AGAIN)]
    error = float(np.abs(results[0] - exact).max() / np.abs(exact).max())
    same = all((one == results[0]).all() for one in results)
    facts = {"ok": error <= _LIMIT, "error": error, "limit": _LIMIT, "same_bits": same}
    return Ready(queued(compiled, *arrays), facts | {"note": "the same bits" if same else "other bits"})
