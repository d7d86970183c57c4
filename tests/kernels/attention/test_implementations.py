"""Every implementation that runs here is the definition, forward and backward."""

from contextlib import nullcontext

import numpy as np
import pytest
from attention_cases import EVERY_DAY, Case, others, plain_tokamax, runs

from stack.kernels.attention import xla_chunked
from stack.kernels.attention.mosaic_gpu.tiles import interpreted

IMPLEMENTATIONS = ("xla", "xla_chunked", "mosaic_gpu", "tokamax")
"""Those that run on a CPU, or in an interpreter there; `obstacles` says which cases each is given."""

LIMITS = {"float32": 2e-6, "bfloat16": 8e-3}
"""Of the error of an array over its size, both as the root of the sum of squares. bfloat16 rounds by up to
2^-8, 0.0039, at each of several places."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Of which a row has several."""
    monkeypatch.setattr(xla_chunked, "BLOCKS", dict.fromkeys(("cpu", "gpu"), xla_chunked.BlockSizes(8, 2**9)))


HERE = {"mosaic_gpu": interpreted, "tokamax": plain_tokamax}
"""What some need to run on a CPU."""


def check(case, kernel):
    if not runs(case, kernel):
        pytest.skip(f"{kernel} cannot")
    # Of what nobody reads Tokamax's plain operations, unlike its kernels, make means of all values.
    of = case.read() if kernel == "tokamax" else None
    expected = case.expected(of=of)
    with HERE.get(kernel, nullcontext)():
        actual = case.actual(kernel, of=of)
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        error = np.linalg.norm(actual[name] - array) / np.linalg.norm(array)
        assert error <= LIMITS[case.dtype], (name, error)
    blind = ~np.asarray(case.mask().allowed()).any(-1)
    assert not actual["output"][blind].any(), "a query that sees no key gets zeros"
    assert not actual["query"][blind].any(), "and gives no gradient"


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", EVERY_DAY, ids=str)
def test_an_implementation_is_the_definition(case, kernel):
    check(case, kernel)


@pytest.mark.full
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", others(), ids=str)
def test_an_implementation_is_the_definition_for_every_mask_and_width(case, kernel):
    check(case, kernel)


def test_cases_have_queries_that_see_no_key():
    cases = [Case(rows="padded", window=4), *EVERY_DAY]
    assert any(not np.asarray(case.mask().allowed()).any(-1).all() for case in cases)
