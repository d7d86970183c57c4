"""The layers that a stage has: one of them forward, and backward from what was kept of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stack.parallel.pipeline.pipeline import Pipeline
from stack.parallel.pipeline.places import Rows
from stack.parallel.rules import ELEMENTWISE
from stack.step.pipeline.cut import Cut, Ends, Place, lift
from stack.step.pipeline.slots import at, take_layer, zeros
from stack.step.pipeline.split import Split


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A model cut at its stacks, and the weights of a stage's layers."""

    cut: Cut
    plan: Pipeline
    places: list[Place]
    """Of each stack, as seen once; for shapes."""
    members: list[list[int]]
    """The parameters of each stack."""
    ends: Ends
    layers: dict[int, jax.Array]
    """[slots, ...]: the parameters of this stage's layers."""
    micros: Any
    """[micro-batches, ...]."""
    pulls: dict[int, Any] = dataclasses.field(default_factory=dict)
    """How the gradient of a layer of each stack is made; known once its forward pass is traced."""
    splits: dict[int, Split] = dataclasses.field(default_factory=dict)
    """The same in two, where gradients of weights are put off."""

    def again(
        self,
        stack: int,
        row: Rows[jax.Array],
        kept: Any,
        micro: Any,
        before: list[jax.Array],
        index: jax.Array,
    ) -> tuple[tuple[Any, ...], list[jax.Array]]:
        """What a layer was given in the forward pass, and what else was kept of it."""
        found = take_layer(kept, row.live, index)
        # Its input is read only where it was kept; zeros stand for it else.
        x = found[0][0] if found[0] else zeros(jax.typeof(self.places[stack].x))
        _, read, args = self.layer(stack, row, micro, before, index, x)
        return (read, *args), found[1]

    def pulled(
        self, stack: int, again: tuple[tuple[Any, ...], list[jax.Array]], dx: jax.Array
    ) -> tuple[tuple[list[jax.Array], jax.Array, dict[int, jax.Array]], dict[int, jax.Array]]:
        """The gradients of what a layer reads besides, of its input and its vectors; and of its matrices."""
        read, weights, _, _, dx = _pull(self.pulls[stack], *again)(dx)
        members = self.members[stack]
        vectors = {member for member in members if self.cut.variables[member].role in ELEMENTWISE}
        gradients = dict(zip(members, weights, strict=True))
        small, large = (
            {member: gradient for member, gradient in gradients.items() if (member in vectors) == is_small}
            for is_small in (True, False)
        )
        return ([one for one in read if is_float(one)], dx, small), large

    def layer(
        self,
        stack: int,
        row: Rows[jax.Array],
        micro: Any,
        before: list[jax.Array],
        index: jax.Array,
        x: jax.Array,
    ) -> tuple[Callable[..., jax.Array], list[Any], tuple[Any, ...]]:
        """A layer of a chunk, what it reads besides, and (weights, number, state, x)."""
        return self.lifted(stack, self.cut.place(self.ends, micro, before), row, index, x)

    def lifted(
        self, stack: int, place: Place, row: Rows[jax.Array], index: jax.Array, x: jax.Array
    ) -> tuple[Callable[..., jax.Array], list[Any], tuple[Any, ...]]:
        """The same of a place where the model hands over its layers."""
        number = jnp.asarray(self.plan.first)[row.chunk, jax.lax.axis_index("stage")] + index
        slot = self.slot(stack, row, index)
        weights = [at(self.layers[member], slot) for member in self.members[stack]]
        args = weights, place.first + number, jax.tree.map(lambda own: at(own, number), place.state), x
        step, read = lift(self.cut.layer(place), *args)
        return step, read, args

    def keeps(self, stack: int) -> tuple[Any, list[jax.Array], list[jax.Array]]:
        """What the backward pass needs of a layer, what is put off of it, and the floats it reads besides.

        For shapes.
        """
        row = Rows(*[jnp.int32(0)] * len(Rows._fields))
        before = [zeros(jax.typeof(place.x)) for place in self.places[:stack]]
        x = zeros(jax.typeof(self.places[stack].x))
        step, read, args = self.layer(stack, row, self.micro(0), before, jnp.int32(0), x)
        x, self.pulls[stack] = jax.vjp(step, read, *args)
        kept, late = kept_of(self.pulls[stack]), []
        if self.plan.turns(stack, "weight_gradient")[0]:
            again = (read, *args), kept[1]
            late = Split.of(partial(self.pulled, stack), again, x).begin(again, x)[1]
        return kept, late, [one for one in read if is_float(one)]

    def with_layer(
        self,
        totals: dict[int, jax.Array],
        stack: int,
        row: Rows[jax.Array],
        index: jax.Array,
        weights: dict[int, jax.Array],
    ) -> dict[int, jax.Array]:
        """The totals with the gradient of one layer in them."""
        slot = self.slot(stack, row, index)
        new = {}
        for member, gradient in weights.items():
            total = totals[member]
            one = at(total, slot) + gradient.astype(total.dtype)
            new[member] = jax.lax.dynamic_update_index_in_dim(total, one, slot, 0)
        return totals | new

    def slot(self, stack: int, row: Rows[jax.Array], index: jax.Array) -> jax.Array:
        """Where a stage has a layer of a chunk."""
        chunk = row.chunk - self.plan.stack_of.index(stack)
        return chunk * self.plan.most[stack] + index

    def is_first(self, stack: int, row: Rows[jax.Array]) -> jax.Array:
        """Whether a chunk is the first part of its stack."""
        first = row.chunk == self.plan.stack_of.index(stack)
        return first & (jax.lax.axis_index("stage") == 0)

    def micro(self, number: jax.Array | int) -> Any:
        """A micro-batch."""
        return jax.tree.map(lambda values: at(values, number), self.micros)


def kept_of(pull: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of `jax.vjp` of a layer: its input, if that is needed, and what is none of its arguments."""
    x = pull.args_res[-1]
    return [x] if isinstance(x, jax.Array | jax.core.Tracer) else [], pull.opaque_residuals


def _pull(pull: Any, args: tuple[Any, ...], kept: list[jax.Array]) -> Callable[[jax.Array], Any]:
    """The same with other arrays in the place of those it has."""

    def is_array(one: Any) -> bool:
        return isinstance(one, jax.Array)

    def is_leaf(one: Any) -> bool:
        return one is not None and not isinstance(one, list | tuple | dict)

    old, tree = jax.tree.flatten(pull.args_res, is_leaf=is_leaf)
    new = [
        after if is_array(before) else before
        for before, after in zip(old, jax.tree.leaves(args), strict=True)
    ]
    return pull.replace(args_res=jax.tree.unflatten(tree, new), opaque_residuals=kept)


def is_float(value: Any) -> bool:
    """Whether an array has a gradient."""
    return jnp.issubdtype(value.dtype, jnp.floating)
