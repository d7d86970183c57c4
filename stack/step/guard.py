"""Whether a step is applied: decided on the devices, the same on all of them, without a word to the host."""

from typing import Any

import jax
import jax.numpy as jnp

from stack.config import StabilityConfig

Guard = dict[str, jax.Array]
"""{"skipped": int32 scalar}, the steps not applied so far; where spikes are looked for also "loss" and
"grad_norm", float32 [spike_window], of the last applied steps, NaN where there was none yet."""

_DEVIATION = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
_FLOOR = 1e-3
"""Of the median: the least that counts as a standard deviation."""


def init(config: StabilityConfig) -> Guard:
    """At step 0."""
    skipped = {"skipped": jnp.zeros((), jnp.int32)}
    if not config.spike_deviations:
        return skipped
    return skipped | {name: jnp.full(config.spike_window, jnp.nan) for name in ("loss", "grad_norm")}


def judge(
    config: StabilityConfig, guard: Guard, *, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Guard]:
    """Whether a step is applied, and the guard after it.

    Args:
      config: how far is too far.
      guard: before it.
      step: optimizer steps taken before it, int32 scalar.
      loss: of its batch, float32 scalar.
      grad_norm: of its gradient before clipping, float32 scalar.
    """
    values = {"loss": loss, "grad_norm": grad_norm}
    is_good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    applied = step - guard["skipped"]
    for name, window in guard.items():
        if name != "skipped":
            is_good &= ~_is_spike(window, values[name], config.spike_deviations)
    after = {"skipped": guard["skipped"] + (1 - is_good.astype(jnp.int32))}
    for name, window in guard.items():
        if name != "skipped":
            place = jnp.arange(window.size) == applied % window.size
            after[name] = jnp.where(place & is_good, values[name], window)
    return is_good, after


def choose(is_good: jax.Array, new: Any, old: Any) -> Any:
    """The new tree, or the old one bit for bit."""
    return jax.tree.map(lambda after, before: jax.lax.select_n(is_good, before, after), new, old)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite: bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _is_spike(window: jax.Array, value: jax.Array, deviations: float) -> jax.Array:
    known = jnp.isfinite(window).sum()
    median = _median(window, known)
    spread = _DEVIATION * _median(jnp.abs(window - median), known)
    limit = median + deviations * jnp.maximum(spread, _FLOOR * jnp.abs(median))
    return (2 * known >= window.size) & (value > limit)


def _median(values: jax.Array, known: jax.Array) -> jax.Array:
    """Of those that are known: NaN is sorted to the end."""
    ordered = jnp.sort(values)
    low, high = ordered[jnp.maximum(known - 1, 0) // 2], ordered[known // 2 % values.size]
    return jnp.where(known > 0, (low + high) / 2, 0.0)
