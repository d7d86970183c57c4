import math

import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import RopeConfig
from stack.layers.rotary import amplitude, frequencies, rotate

LLAMA_3_1 = RopeConfig(
    theta=500_000.0,
    scaling="llama3",
    factor=8.0,
    low_frequency_factor=1.0,
    high_frequency_factor=4.0,
    original_length=8192,
)
PLAIN = RopeConfig(theta=500_000.0)


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_frequencies_fall_from_one_to_one_over_theta():
    expected = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(frequencies(RopeConfig(), 64), expected, rtol=1e-6)


def test_rotation_is_multiplication_of_complex_numbers():
    x, positions = draw(2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], np.int32)
    radians = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    turn = np.exp(1j * positions[:, :, None, None] * radians)
    rotated = (x[..., :4] + 1j * x[..., 4:]) * turn
    expected = np.concatenate([rotated.real, rotated.imag], axis=-1)
    actual = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies(RopeConfig(), 8))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_scores_depend_on_the_distance_alone():
    query, key = draw(1, 1, 1, 64), draw(1, 1, 2, 64)[:, :, :1]
    radians = frequencies(PLAIN, 64)

    def score(query_position, key_position):
        q = rotate(jnp.asarray(query), jnp.full((1, 1), query_position), radians)
        k = rotate(jnp.asarray(key), jnp.full((1, 1), key_position), radians)
        return float((q * k).sum())

    assert score(107, 100) == pytest.approx(score(7, 0), abs=1e-3)
    assert abs(score(7, 0) - score(8, 0)) > 0.1


def test_position_zero_is_left_alone_and_lengths_are_kept():
    x = jnp.asarray(draw(1, 4, 2, 16))
    rotated = rotate(x, jnp.array([[0, 1, 50, 2000]]), frequencies(PLAIN, 16))
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)


def test_bfloat16_is_rotated_in_float32():
    x, positions = jnp.asarray(draw(1, 1, 1, 64)).astype("bfloat16"), jnp.full((1, 1), 1001)
    radians = frequencies(PLAIN, 64)
    rotated = rotate(x, positions, radians)
    assert rotated.dtype == "bfloat16"
    np.testing.assert_array_equal(
        rotated, rotate(x.astype(jnp.float32), positions, radians).astype("bfloat16")
    )


def test_linear_scaling_divides_positions():
    stretched = RopeConfig(scaling="linear", factor=4.0)
    x = jnp.asarray(draw(1, 3, 2, 16))
    np.testing.assert_allclose(
        rotate(x, jnp.array([[4, 8, 400]]), frequencies(stretched, 16)),
        rotate(x, jnp.array([[1, 2, 100]]), frequencies(RopeConfig(), 16)),
        atol=1e-5,
    )


def test_llama_3_keeps_short_wavelengths_and_stretches_long_ones():
    plain, scaled = (np.asarray(frequencies(rope, 128)) for rope in (PLAIN, LLAMA_3_1))
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert short.sum() == 29, "of the 64 pairs of Llama 3.1"
    assert long.sum() == 29
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    share = (8192 / wavelength[between] - 1) / (4 - 1)
    np.testing.assert_allclose(
        scaled[between], (1 - share) * plain[between] / 8 + share * plain[between], rtol=1e-5
    )
    assert (np.diff(scaled) < 0).all(), "stretching never changes the order of the channels"


# As Qwen 2.5 is used beyond its context: factor 4 on 32,768 tokens.
YARN = RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_length=32768)


def test_yarn_keeps_what_turns_often_and_stretches_what_does_not_turn_once():
    plain = 1e6 ** (-np.arange(64) / 64)
    scaled = np.asarray(frequencies(YARN, 128))
    turns = 32768 * plain / (2 * math.pi)
    # Rounded outwards, the bounds are of 32 turns and of one, to a channel each.
    first, last = np.searchsorted(-turns, -32.0) - 1, np.searchsorted(-turns, -1.0)
    assert (first, last) == (23, 40)
    keep = 1 - np.clip((np.arange(64) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(scaled, plain * (keep + (1 - keep) / 4), rtol=2e-5)
    unrounded = np.asarray(frequencies(YARN.model_copy(update={"whole_channels": False}), 128))
    moved = np.abs(unrounded / scaled - 1) > 1e-3
    assert moved[first + 1 : last].any()
    assert not moved[: first + 1].any()
    assert not moved[last:].any()


def test_yarn_makes_queries_and_keys_larger():
    assert amplitude(PLAIN) == 1.0
    assert amplitude(YARN) == pytest.approx(0.1 * math.log(4) + 1)
    assert amplitude(YARN.model_copy(update={"factor": 0.5})) == 1.0
    assert amplitude(YARN.model_copy(update={"attention_factor": 0.9})) == 0.9
    x, positions = jnp.asarray(draw(1, 3, 2, 16)), jnp.array([[4, 8, 400]])
    radians = frequencies(YARN, 16)
    np.testing.assert_allclose(
        rotate(x, positions, radians, 1.25), 1.25 * rotate(x, positions, radians), rtol=1e-6, atol=1e-6
    )
