"""Parameters by pattern: those that are not trained, and those with a rate and a decay of their own."""

import fnmatch
from collections.abc import Collection
from typing import Any

import jax
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


def multiply(factors: Any) -> optax.GradientTransformation:
    """Multiplies each update by a number; a part of the tree may be left out."""

    def scale(factor: float, updates: Any) -> Any:
        return jax.tree.map(lambda u: factor * u, updates) if factor != 1 else updates

    return optax.stateless(lambda updates, _: jax.tree.map(scale, factors, updates))
