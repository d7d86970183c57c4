"""The optimizer's update with its moments in host memory: on the device one layer at a time."""

from typing import Any

import jax
import optax

from stack.step import optimizer as optimizers
from stack.step.program import Program


def apply_by_layer(program: Program, gradient: dict, opt_state: Any, params: dict) -> tuple[dict, Any]:
    """The next parameters and the next state, the same as those of the whole update.

    Clipping looks at the whole gradient; what comes after looks at each parameter of each layer by
    itself. So a loop brings the moments of one layer to the device, updates that layer, and sends them
    back into their place; what is in no layer is updated once.
    """
    config = program.config
    clip, rest = optimizers.parts(config.optimizer, steps=config.train.steps, axes=program.axes)
    rule, before, state = optax.chain(*rest), opt_state[: len(clip)], opt_state[len(clip) :]
    for transformation, nothing in zip(clip, before, strict=True):
        gradient, _ = transformation.update(gradient, nothing)

    def update(gradient: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def layer(number: jax.Array, whole: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = whole
        return _with_layer(whole, update(*_layer((gradient, params, state), number)), number)

    others = update(*_others((gradient, params, state)))
    whole = jax.lax.fori_loop(0, config.model.num_layers, layer, (params, state))
    params, state = _with_others(whole, others)
    return params, (*before, *state)


def _in_layers(path: tuple) -> bool:
    return any(getattr(key, "key", None) == "layers" for key in path)


def _layer(trees: Any, number: jax.Array) -> Any:
    """One layer, as a stack of one, on the device; the clocks, and nothing of the rest."""

    def take(path: tuple, leaf: jax.Array) -> Any:
        if _in_layers(path):
            return jax.device_put(jax.lax.dynamic_slice_in_dim(leaf, number, 1), jax.memory.Space.Device)
        return optax.MaskedNode() if leaf.ndim else leaf

    return jax.tree_util.tree_map_with_path(take, trees)


def _with_layer(trees: Any, layer: Any, number: jax.Array) -> Any:
    """The same with one layer replaced, each array where it was."""

    def put(path: tuple, leaf: jax.Array, new: Any) -> jax.Array:
        if not _in_layers(path):
            return leaf
        new = jax.device_put(new, jax.typeof(leaf).memory_space)
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, number, 0)

    return jax.tree_util.tree_map_with_path(put, trees, layer)


def _others(trees: Any) -> Any:
    """What is in no layer, on the device."""

    def take(path: tuple, leaf: jax.Array) -> Any:
        return optax.MaskedNode() if _in_layers(path) else jax.device_put(leaf, jax.memory.Space.Device)

    return jax.tree_util.tree_map_with_path(take, trees)


def _with_others(trees: Any, others: Any) -> Any:
    """The same with what is in no layer replaced, each array where it was."""

    def put(path: tuple, leaf: jax.Array, new: Any) -> jax.Array:
        return leaf if _in_layers(path) else jax.device_put(new, jax.typeof(leaf).memory_space)

    return jax.tree_util.tree_map_with_path(put, trees, others)
