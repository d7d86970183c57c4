"""What runs is a value with its reason; what was asked for runs or is refused."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import pytest

from stack.config import ConfigError
from stack.kernels.grouped_matmul import KERNELS, Request, choose, fitting, grouped_matmul

MIXTRAL = Request(
    platform="gpu",
    compute_capability=9.0,
    dtype="bfloat16",
    tokens=16_384,
    groups=8,
    inputs=4096,
    outputs=14_336,
)


def test_what_was_not_measured_is_not_taken():
    choice = choose(MIXTRAL)
    assert (choice.kernel, choice.measured) == ("xla_chunked", False)
    assert str(choice) == (
        "grouped_matmul: xla_chunked (nothing was measured at such shapes on such a device;"
        " xla would copy tokens for each group)"
    )


def test_what_cannot_is_told_beside():
    choice = choose(dataclasses.replace(MIXTRAL, compute_capability=8.0))
    assert choice.kernel == "xla_chunked"
    assert choice.reason.endswith(
        "; mosaic_gpu cannot: compute capability 8.0 is not 9.0 (H100, H200), whose instructions it uses"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_processor_it_was_measured(dtype):
    here = Request(platform="cpu", dtype=dtype, tokens=1024, groups=8, inputs=256, outputs=512)
    assert choose(here).kernel == "xla_chunked"
    assert re.match(r"measured on a CPU: [34]\.\d+ times as fast as xla", choose(here).reason)
    assert choose(here, "xla_chunked").measured
    others: list[dict[str, Any]] = [
        {"tokens": 1000},
        {"groups": 7},
        {"inputs": 64},
        {"outputs": 1800},
        {"dtype": "float64"},
    ]
    for change in others:
        other = dataclasses.replace(here, **change)
        assert not fitting(other, "xla_chunked"), change
        assert choose(other).kernel == "xla_chunked"


@pytest.mark.parametrize("name", KERNELS)
def test_who_is_asked_for_runs(name):
    assert str(choose(MIXTRAL, name)) == f"grouped_matmul: {name} (asked for)"


def test_what_is_unknown_is_refused():
    with pytest.raises(ConfigError, match=r"'fast' is unknown; take auto, .*xla"):
        choose(MIXTRAL, "fast")


def test_what_does_not_fit_is_refused():
    tokens, weights, sizes = jnp.ones((6, 4)), jnp.ones((2, 4, 3)), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="tokens are bfloat16, weights float32; cast one"):
        grouped_matmul(tokens.astype("bfloat16"), weights, sizes)
    with pytest.raises(ValueError, match="tokens have 4 numbers, weights take 3"):
        grouped_matmul(tokens, weights[:, :3], sizes)
    with pytest.raises(ValueError, match=r"sizes have the shape \[1, 2\]; for 1 weights .* must be \[1, 1\]"):
        grouped_matmul(tokens, weights[:1], sizes)
    with pytest.raises(ValueError, match=r"0 tokens of 4 numbers for weights .* one at least"):
        grouped_matmul(tokens[:0], weights, sizes)
