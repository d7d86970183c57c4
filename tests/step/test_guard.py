"""Whether a step is applied: what is not finite never, a spike only where that is asked for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import StabilityConfig
from stack.step import guard

WINDOW = 8
SPIKES = StabilityConfig(spike_deviations=5.0, spike_window=WINDOW)


def judge(config: StabilityConfig, losses: list[float], norms: list[float] | None = None) -> list[bool]:
    """Which of these steps, one after another, are applied."""
    step = jax.jit(
        lambda state, number, loss, norm: guard.judge(config, state, step=number, loss=loss, grad_norm=norm)
    )
    state, applied = guard.init(config), []
    for number, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        is_good, state = step(state, jnp.int32(number), jnp.float32(loss), jnp.float32(norm))
        applied.append(bool(is_good))
    assert int(state["skipped"]) == applied.count(False)
    return applied


def expected(losses: list[float]) -> list[bool]:
    """The same in NumPy, in float64, from the definition."""
    kept: list[float] = []
    applied = []
    for loss in losses:
        last = np.array(kept[-WINDOW:])
        spike = False
        if len(last) >= WINDOW / 2:
            median = np.median(last)
            spread = 1.4826 * np.median(np.abs(last - median))
            spike = loss > median + 5 * max(spread, 1e-3 * abs(median))
        good = math.isfinite(loss) and not spike
        applied.append(bool(good))
        kept += [loss] * good
    return applied


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_applied(bad) -> None:
    assert judge(StabilityConfig(), [1.0, bad, 1e30, 1.0]) == [True, False, True, True]
    assert judge(StabilityConfig(), [1.0] * 3, [1.0, bad, 1e30]) == [True, False, True]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([1.0, 1.01, 1.25, 1.5, 2.0, 3.0, 50.0, math.nan]), min_size=1, max_size=40))
def test_spikes_are_those_of_the_definition(losses) -> None:
    assert judge(SPIKES, losses) == expected(losses)


def test_a_spike_of_the_gradient_is_one_too_and_does_not_move_the_median() -> None:
    applied = judge(SPIKES, [1.0] * 30, [1.0] * 10 + [9.0] * 10 + [1.0] * 10)
    assert applied == [True] * 10 + [False] * 10 + [True] * 10


def test_a_state_is_chosen_bit_for_bit() -> None:
    old = {"a": jnp.array([1.0, jnp.nan, -0.0]), "b": jnp.arange(3)}
    new = jax.tree.map(lambda leaf: leaf + 1, old)
    for is_good, want in ((True, new), (False, old)):
        got = guard.choose(jnp.bool(is_good), new, old)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_numbers_are_all_finite_or_not() -> None:
    assert guard.all_finite({"a": jnp.ones(3), "b": jnp.zeros((), jnp.int32)})
    assert not guard.all_finite({"a": jnp.ones(3), "b": jnp.array([0.0, jnp.inf])})
