"""The largest numbers of the last steps, by which delayed scaling rounds to 8 bits (arXiv 2209.05433)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from stack.kernels.matmul.float8 import BACKWARD, FORWARD
from stack.step.program import Program

History = dict[str, Any]
"""A tree like the parameters, a leaf for each `Linear` in 8 bits, float32 [layers, 2, history]: of its input
and of the gradient of its result, the newest step first; 0 where there was none yet."""


def is_kept(program: Program) -> bool:
    """Whether a program's state has a history."""
    return program.matmul.fp8 is not None and program.matmul.fp8.scaling == "delayed"


def init(program: Program) -> History:
    """At step 0: a guess that the first step replaces.

    An input is taken to be about 1, as a norm leaves it; a gradient about one over the tokens of a batch, by
    which the loss is divided, in the middle of the 30 powers of two that its format holds.
    """
    config = program.config
    tokens = config.train.batch_size * config.data.sequence_length
    guess = jnp.array([float(jnp.finfo(FORWARD).max), float(jnp.finfo(BACKWARD).max) / tokens], jnp.float32)
    leaves = {}
    for name, layers in program.float8.items():
        nothing = jnp.zeros((layers, 2, config.kernels.fp8.history), jnp.float32)
        leaves[tuple(name.split("."))] = nothing.at[:, :, -1].set(guess)
    return unflatten_dict(leaves)


def amaxes(program: Program, history: History | None) -> Mapping[str, jax.Array | None]:
    """What each product in 8 bits takes for the largest numbers, [layers, 2]; None: it looks by itself."""
    if history is None:
        return dict.fromkeys(program.float8)
    leaves = jax.tree_util.tree_flatten_with_path(history)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.max(axis=-1) for path, leaf in leaves
    }


def extract(gradient: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A gradient without the largest numbers in it; and those, a tree of [layers, 2]."""
    flat = flatten_dict(gradient)
    rest = {path: leaf for path, leaf in flat.items() if path[-1] != "amax"}
    return unflatten_dict(rest), unflatten_dict(
        {path[:-1]: leaf for path, leaf in flat.items() if path[-1] == "amax"}
    )


def advance(history: History, latest: dict[str, Any]) -> History:
    """The history after a step; where all was 0 it stays as large as it was."""

    def push(past: jax.Array, now: jax.Array) -> jax.Array:
        now = jnp.where(now > 0, now, past.max(axis=-1))
        return jnp.concatenate([now[..., None], past[..., :-1]], axis=-1)

    return jax.tree.map(push, history, latest)


def excess(history: History, latest: dict[str, Any]) -> jax.Array:
    """The largest number of a step over what it was taken for, float32 scalar.

    Above 1 some may, above 2 some do become the largest that their format holds.
    """
    ratios = jax.tree.map(lambda past, now: (now / past.max(axis=-1)).max(), history, latest)
    return jnp.stack(jax.tree.leaves(ratios)).max()
