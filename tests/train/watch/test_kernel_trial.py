"""A kernel of its own that was never measured is compared with the definition before the first step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from stack.config import Config, StackError
from stack.kernels.attention import KERNELS, Request
from stack.kernels.attention import trial as trials
from stack.kernels.attention.mosaic_gpu.tiles import interpreted
from stack.kernels.attention.trial import LIMIT, trial_error
from stack.kernels.matmul import Fp8, blocks
from stack.kernels.matmul import trial as products
from stack.step import program as programs
from stack.train.watch.kernel_trial import KernelTrial

ASKED = Request(platform="cpu", dtype="bfloat16", head_dim=32, length=200, packed_length=200)


def told(monkeypatch, change, *overrides: str) -> str:
    """What the introduction says of attention, where the kernel in blocks is taken for one of its own."""
    kernel = KERNELS["xla_chunked"]

    def attend(*arrays: Any, **options: Any) -> jax.Array:
        return change(kernel.attend(*arrays, **options))

    monkeypatch.setitem(KERNELS, "xla_chunked", dataclasses.replace(kernel, attend=attend, own_code=True))
    tiny = ("model.num_layers=1", "model.embed_dim=64", "model.num_heads=4", "model.head_dim=32")
    asked = ("kernels.attention=xla_chunked", "data.sequence_length=128", "model.dtype=bfloat16")
    program = programs.build(Config().replace(*tiny, *asked, *overrides), jax.devices()[:1])
    assert not program.attention.measured
    info = {"attention": str(program.attention)}
    return (info | (KernelTrial(program).on_start(info) or {}))["attention"]


def test_it_says_how_far_off_the_kernel_is(monkeypatch):
    line = told(monkeypatch, jnp.asarray, "model.sliding_window=50", "model.attention_dropout=0.1")
    assert line.startswith("attention: xla_chunked (asked for); tried here: 0.")
    assert line.endswith("% off the definition")


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda output: output.at[:, 5].set(0), "off by"), (lambda output: output * jnp.nan, "no number")],
)
def test_one_that_is_wrong_ends_the_run_before_it_begins(monkeypatch, change, message):
    with pytest.raises(StackError, match=f"xla_chunked is wrong on cpu: {message}.*set kernels.attention="):
        told(monkeypatch, change)


@pytest.mark.parametrize("name", ["xla", "xla_chunked"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kind": "full", "softcap": 5.0},
        {"kind": "prefix"},
        {"dropout": 0.2},
        {"packed_length": None},
        {"cross": True},
    ],
    ids=str,
)
def test_the_definition_is_within_the_limit(name, more):
    assert trial_error(name, dataclasses.replace(ASKED, **more), window=60, shared_by=2) < LIMIT / 2


def test_the_kernel_for_hopper_is_tried_as_others(monkeypatch):
    monkeypatch.setattr(trials, "_LONGEST", 128)
    with interpreted():
        assert trial_error("mosaic_gpu", ASKED, shared_by=2) < LIMIT / 2


def test_products_by_a_kernel_of_its_own_are_tried_too(monkeypatch):
    monkeypatch.setattr(products, "_SHAPE", (1, 130, 100, 72))
    how = Fp8(blocks="block", kernel="mosaic_gpu")
    with interpreted():
        assert products.trial_error(how, "bfloat16") < products.LIMIT / 2

    def other_scales(left, *more):
        return blocks.multiply_reference(left._replace(scale=left.scale[::-1]), *more)

    monkeypatch.setitem(blocks.MULTIPLY, "mosaic_gpu", other_scales)
    assert products.trial_error(how, "bfloat16") > 10 * products.LIMIT
