"""Parameters that are not trained alike: by pattern, and by how many layers are above them."""

import fnmatch
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from stack.config import ConfigError, OptimizerConfig


def matching(pattern: str, names: Collection[str], *, field: str) -> list[str]:
    """The names, of parameters or of matrices, that a pattern fits.

    Raises:
      ConfigError: it fits none.
    """
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ConfigError(f"{field}: {pattern!r} is the name of none of {', '.join(names)}")
    return found


def rates_and_decays(config: OptimizerConfig, roles: Any) -> tuple[Any, Any]:
    """What each parameter's learning rate is multiplied by, and its weight decay: two trees of numbers.

    Args:
      config: the options.
      roles: the role of every parameter that is trained.

    Raises:
      ConfigError: a pattern that fits none of them, or a parameter of two groups.
    """
    paths = {".".join(path): path for path in flatten_dict(roles)}
    decaying = {"matrix", "table"} if config.decay_embeddings else {"matrix"}
    decays = {path: config.weight_decay * (role in decaying) for path, role in flatten_dict(roles).items()}
    rates = dict.fromkeys(decays, 1.0)
    owners: dict[str, int] = {}
    for number, group in enumerate(config.groups):
        field = f"optimizer.groups.{number}.parameters"
        for name in {name for one in group.parameters for name in matching(one, paths, field=field)}:
            if name in owners:
                raise ConfigError(f"{field}: {name} is in optimizer.groups.{owners[name]} too; leave one out")
            owners[name] = number
            rates[paths[name]] = group.learning_rate_factor
            if group.weight_decay is not None:
                decays[paths[name]] = group.weight_decay
    return unflatten_dict(rates), unflatten_dict(decays)


def add_decay(decays: Any) -> optax.GradientTransformation:
    """Adds to each update its parameter times a number; a part of the tree may be left out."""

    def add(decay: float, updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: u + decay * p, updates, params) if decay else updates

    return optax.stateless(lambda updates, params: jax.tree.map(add, decays, updates, params))


def multiply(factors: Any, layer: jax.Array | None = None) -> optax.GradientTransformation:
    """Multiplies each update by a number, or each of its layers; a part of the tree may be left out.

    Args:
      factors: of each parameter a number, or [layers] of a stack.
      layer: of which the updates of stacks are, [1, ...] each; None: they are of all layers.
    """

    def scale(factor: Any, updates: Any) -> Any:
        if isinstance(factor, float):
            return jax.tree.map(lambda u: factor * u, updates) if factor != 1 else updates
        return jax.tree.map(lambda u: _along(factor, u, layer) * u, updates)

    return optax.stateless(lambda updates, _: jax.tree.map(scale, factors, updates))


BELOW = ("embed", "position", "types", "embedding_norm", "relative")
"""Modules that feed the layers. What else is outside of layers is above them: norms, heads."""


def depths(axes: Any, shapes: Any) -> Any:
    """How many layers are above each parameter: -1 for what is above all layers itself.

    Args:
      axes: the logical axes of every parameter.
      shapes: of every parameter, with `shape`.

    Returns:
      A tree like them: [layers] int of a stack, from its top; a number of each other parameter. What feeds
      several stacks, as the embedding of an encoder and a decoder, is below the deepest.
    """
    names: dict[Any, Any] = flatten_dict(axes)
    sizes: dict[Any, Any] = flatten_dict(shapes)
    stacks = {path: sizes[path].shape[0] for path in names if names[path][0] == "layers"}

    def depth(path: tuple[str, ...]) -> Any:
        if path in stacks:
            return np.arange(stacks[path])[::-1]
        place = next((place for place, module in enumerate(path) if module in BELOW), None)
        if place is None or path[0] == "task":  # A head, whose parts may have any names.
            return -1
        return max((number for other, number in stacks.items() if other[:place] == path[:place]), default=-1)

    return unflatten_dict({path: depth(path) for path in names})


def layer_rates(decay: float, rates: Any, depths: Any) -> Any:
    """Rates times `decay` to the number of layers above, the head among them (BEiT, arXiv 2106.08254).

    Args:
      decay: from one layer to the next below it.
      rates: a tree of numbers.
      depths: of `depths`.
    """

    def rate(rate: float, depth: Any) -> Any:
        factor = rate * decay ** (np.asarray(depth, np.float64) + 1)
        return float(factor) if factor.ndim == 0 else factor

    return jax.tree.map(rate, rates, depths)


class UnfreezeState(NamedTuple):
    """What `unfreeze` knows."""

    count: jax.Array
    """Steps applied, int32 scalar."""


def unfreeze(every: int, depths: Any, layer: jax.Array | None = None) -> optax.GradientTransformation:
    """Updates of zero for layers whose turn has not come (arXiv 1801.06146, section 3.3).

    Args:
      every: steps after which one more layer is trained, from the top down.
      depths: of `depths`.
      layer: as in `multiply`.
    """

    def hold(count: jax.Array, depth: Any, updates: Any) -> Any:
        start = every * np.maximum(depth, 0)
        if not start.any():
            return updates
        return jax.tree.map(
            lambda u: jnp.where(count >= (_along(start, u, layer) if start.ndim else start), u, 0.0), updates
        )

    def init(params: Any) -> Any:
        del params
        return UnfreezeState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        held = jax.tree.map(partial(hold, state.count), depths, updates)
        return held, UnfreezeState(count=jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


def _along(values: np.ndarray, updates: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Values of layers, [layers], as they are multiplied with updates of all of them or of one."""
    dtype = jnp.int32 if np.issubdtype(values.dtype, np.integer) else updates.dtype
    whole = jnp.asarray(values, dtype)
    those = whole if layer is None else jax.lax.dynamic_slice_in_dim(whole, layer, 1)
    return those.reshape(-1, *[1] * (updates.ndim - 1))
