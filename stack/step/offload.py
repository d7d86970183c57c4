"""The optimizer's update with its moments in host memory: on the device one layer at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from stack.step import guard
from stack.step import optimizer as optimizers
from stack.step.program import Program

type Within = Callable[[tuple], bool]
"""Whether the leaf at a path, of parameters, gradients or moments, is in a stack of layers."""


def apply_by_layer(
    program: Program, gradient: dict, opt_state: Any, params: dict, is_good: jax.Array
) -> tuple[dict, Any]:
    """The next parameters and the next state, the same as those of the whole update.

    Clipping looks at the whole gradient; what comes after looks at each parameter of each layer by
    itself. So a loop brings the moments of one layer to the device, updates that layer, and sends them
    back into their place; what is in no layer is updated once.
    """
    config = program.config
    (axes, _), (roles, _) = program.split(program.axes), program.split(program.roles)
    parts = partial(
        optimizers.parts,
        config.optimizer,
        steps=config.train.steps,
        axes=axes,
        roles=roles,
        depths=program.depths,
    )
    clip, _ = parts()
    before, state = opt_state[: len(clip)], opt_state[len(clip) :]
    for transformation, nothing in zip(clip, before, strict=True):
        gradient, _ = transformation.update(gradient, nothing)

    def update(gradient: Any, params: Any, state: Any, *, number: Any = None) -> tuple[Any, Any]:
        updates, after = optax.chain(*parts(layer=number)[1]).update(gradient, state, params)
        return guard.choose(is_good, (optax.apply_updates(params, updates), after), (params, state))

    def layer(number: jax.Array, whole: tuple[Any, Any], within: Within) -> tuple[Any, Any]:
        params, state = whole
        after = update(*_layer((gradient, params, state), number, within), number=number)
        return _with_layer(whole, after, number, within)

    depths = _depths(program)
    others = update(*_others((gradient, params, state), lambda path: _depth(path, depths) > 0))
    whole = params, state
    for depth in sorted(set(depths.values())):  # Stacks as deep as one another share a loop.
        within = partial(_is_as_deep, depths=depths, depth=depth)
        whole = jax.lax.fori_loop(0, depth, partial(layer, within=within), whole)
    params, state = _with_others(whole, others, lambda path: _depth(path, depths) > 0)
    return params, (*before, *state)


def _depths(program: Program) -> dict[tuple[str, ...], int]:
    """Layers of the stack that a parameter is in, by its path; those in none are left out."""
    axes = jax.tree.leaves(program.axes, is_leaf=optimizers.is_names)
    leaves = jax.tree_util.tree_flatten_with_path(program.parameters)[0]
    pairs = zip(leaves, axes, strict=True)
    return {_names(path): leaf.shape[0] for (path, leaf), names in pairs if names[0] == "layers"}


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _depth(path: tuple, depths: dict[tuple[str, ...], int]) -> int:
    """Layers of the stack of a leaf, 0 for none; a moment's path ends in its parameter's."""
    names = _names(path)
    return next((depths[names[start:]] for start in range(len(names)) if names[start:] in depths), 0)


def _is_as_deep(path: tuple, *, depths: dict[tuple[str, ...], int], depth: int) -> bool:
    return _depth(path, depths) == depth


def _layer(trees: Any, number: jax.Array, within: Within) -> Any:
    """One layer, as a stack of one, on the device; the clocks, and nothing of the rest."""

    def take(path: tuple, leaf: jax.Array) -> Any:
        if within(path):
            return jax.device_put(jax.lax.dynamic_slice_in_dim(leaf, number, 1), jax.memory.Space.Device)
        return optax.MaskedNode() if leaf.ndim else leaf

    return jax.tree_util.tree_map_with_path(take, trees)


def _with_layer(trees: Any, layer: Any, number: jax.Array, within: Within) -> Any:
    """The same with one layer replaced, each array where it was."""

    def put(path: tuple, leaf: jax.Array, new: Any) -> jax.Array:
        if not within(path):
            return leaf
        new = jax.device_put(new, jax.typeof(leaf).memory_space)
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, number, 0)

    return jax.tree_util.tree_map_with_path(put, trees, layer)


def _others(trees: Any, within: Within) -> Any:
    """What is in no layer, on the device."""

    def take(path: tuple, leaf: jax.Array) -> Any:
        return optax.MaskedNode() if within(path) else jax.device_put(leaf, jax.memory.Space.Device)

    return jax.tree_util.tree_map_with_path(take, trees)


def _with_others(trees: Any, others: Any, within: Within) -> Any:
    """The same with what is in no layer replaced, each array where it was."""

    def put(path: tuple, leaf: jax.Array, new: Any) -> jax.Array:
        return leaf if within(path) else jax.device_put(new, jax.typeof(leaf).memory_space)

    return jax.tree_util.tree_map_with_path(put, trees, others)
