"""The contract fails when the thing it guards is broken: each test breaks one thing and sees it fail."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from stack.doctor.numerics import LIMIT, ONE_DEVICE, Numbers, cells, compute, errors
from stack.kernels.attention.mask import Mask
from stack.kernels.linear_cross_entropy import logits, xla_chunked
from stack.layers import embedding
from stack.parallel import zero
from stack.step import step

CELLS = {cell.name: cell for cell in cells()}


@cache
def reference() -> Numbers:
    return compute(ONE_DEVICE, "gpt")


def worst_error(name: str) -> float:
    """The largest error of a cell, computed anew with whatever is broken now."""
    jax.clear_caches()
    return max(errors(compute(CELLS[name], "gpt"), reference()).values())


@pytest.fixture(autouse=True)
def whole_reference():
    """The reference is computed before anything is broken; afterwards nothing broken stays traced."""
    reference()
    yield
    jax.clear_caches()


@pytest.mark.full
def test_an_all_reduce_that_is_dropped_is_seen(monkeypatch):
    def only_the_first(rows, axis):
        return jax.lax.psum(jnp.where(jax.lax.axis_index(axis) == 0, rows, 0.0), axis)

    monkeypatch.setattr(embedding, "_sum_over", only_the_first)
    assert worst_error("tensor") > 100 * LIMIT


@pytest.mark.full
def test_segments_that_are_ignored_are_seen(monkeypatch):
    whole = Mask.allowed
    monkeypatch.setattr(Mask, "allowed", lambda mask: whole(dataclasses.replace(mask, query_segments=None)))
    assert worst_error("data") > 100 * LIMIT


@pytest.mark.full
def test_a_padded_vocabulary_that_is_not_masked_is_seen(monkeypatch):
    def unmasked(hidden, table, *, vocab_size, **options):  # noqa: ARG001
        return logits(hidden, table, vocab_size=table.shape[0], **options)

    monkeypatch.setattr(xla_chunked, "logits", unmasked)
    assert worst_error("tensor") > 100 * LIMIT


@pytest.mark.full
def test_micro_batches_that_are_averaged_are_seen(monkeypatch):
    def averaged(loss, model, batch, layout, *, accumulation):
        labels = (batch["labels"] >= 0).sum()

        def mean(weights, micro):
            value, sums = loss(weights, micro)
            return value * labels / ((micro["labels"] >= 0).sum() * accumulation), sums

        return zero.gradients(mean, model, batch, layout, accumulation=accumulation)

    monkeypatch.setattr(step, "gradients", averaged)
    assert worst_error("accumulation") > 100 * LIMIT


@pytest.mark.full
def test_dropout_that_depends_on_the_layout_is_seen(monkeypatch):
    whole = step.example_keys
    monkeypatch.setattr(
        step, "example_keys", lambda seed, number, example: whole(seed, number, example % example.shape[0])
    )
    assert worst_error("accumulation") > 100 * LIMIT


@pytest.mark.full
def test_unbroken_it_holds():
    assert worst_error("tensor") <= LIMIT
