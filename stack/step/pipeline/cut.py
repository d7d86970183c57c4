"""A loss, cut at its model's stacks of layers.

Models and objectives know nothing of pipelines: a model hands each stack of layers to `run_layers`, with what
enters it. Whoever stands there instead sees where the model can be cut, may stop it, or may tell it what the
layers have given and let it go on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import nnx

from stack.models.stack import Execution, one_layer
from stack.parallel.rules import Layout
from stack.parallel.zero import is_variable

type Ends = dict[int, jax.Array]
"""The parameters that are in no layer, by their place among all."""


class Place(NamedTuple):
    """Where a model hands over a stack of layers."""

    call: Callable[..., Any]
    layers: Any
    """A module."""
    x: jax.Array
    """What enters the first layer."""
    run: Execution
    state: Any
    """Of each layer, the layers in front."""
    first: int
    """The number of the first layer."""


class _Stopped(Exception):  # noqa: N818 (no error: a model has come as far as it should)
    """A model has come to the stack that is asked for."""


@dataclass
class _Stand:
    """Stands where the layers would be run."""

    given: Sequence[Any]
    """What the stacks before have given."""
    place: Place | None = None
    passed: int = field(default=0)

    def __call__(self, *place: Any) -> Any:
        if self.passed == len(self.given):
            self.place = Place(*place)
            raise _Stopped
        self.passed += 1
        return self.given[self.passed - 1]


class _Absent(NamedTuple):
    """In place of a parameter of a layer, which is on some stage."""

    number: int


@dataclass(frozen=True)
class Cut:
    """A loss of a model's parameters and a micro-batch, in pieces."""

    loss: Callable[..., tuple[jax.Array, Any]]
    """(parameters, micro-batch, layout=, instead=) -> (scalar, sums)."""
    variables: tuple[nnx.Variable, ...]
    """Of the model, of which shapes and metadata alone are read."""
    tree: Any
    """How they make the parameters."""
    layout: Layout
    """Within a device's share of the batch."""

    def place(self, ends: Ends, micro: Any, given: Sequence[Any]) -> Place:
        """Where the model hands over the stack after those that have given something."""
        stand = _Stand(given)
        try:
            self.loss(self._parameters(ends), micro, layout=self.layout, instead=stand)
        except _Stopped:
            assert stand.place is not None
            return stand.place
        raise AssertionError("the model has no such stack")

    def finish(self, ends: Ends, micro: Any, given: Sequence[Any]) -> tuple[jax.Array, Any]:
        """The loss and its sums, of what all stacks have given."""
        return self.loss(self._parameters(ends), micro, layout=self.layout, instead=_Stand(given))

    def stacks(self, ends: Ends, micro: Any) -> list[Place]:
        """Every stack; for shapes."""
        places: list[Place] = []
        while True:
            stand = _Stand([place.x for place in places])
            try:
                self.loss(self._parameters(ends), micro, layout=self.layout, instead=stand)
            except _Stopped:
                assert stand.place is not None
                places.append(stand.place)
            else:
                return places

    def layer(self, place: Place) -> Callable[..., jax.Array]:
        """(weights, number, state, x) -> x: one layer of a stack, which keeps what `remat` says."""
        variables, tree = jax.tree.flatten(place.layers, is_leaf=is_variable)
        step = one_layer(place.call, place.run)

        def layer(weights: Sequence[jax.Array], number: jax.Array, state: Any, x: jax.Array) -> jax.Array:
            own = [variable.replace(weight) for variable, weight in zip(variables, weights, strict=True)]
            return step(x, (jax.tree.unflatten(tree, own), number, state))[0]

        return layer

    def members(self, place: Place) -> list[int]:
        """The parameters of a stack, by their places among all."""
        return [
            variable.get_value().number for variable in jax.tree.leaves(place.layers, is_leaf=is_variable)
        ]

    def _parameters(self, ends: Ends) -> Any:
        values = (ends.get(number, _Absent(number)) for number in range(len(self.variables)))
        pairs = zip(self.variables, values, strict=True)
        return jax.tree.unflatten(self.tree, [variable.replace(value) for variable, value in pairs])


def lift(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The same function with the arrays it has from around it as its first argument, and those.

    What a gradient needs of them need not be kept, if they can be made again.
    """
    closed = jax.make_jaxpr(function)(*args)

    def lifted(around: list[Any], *args: Any) -> Any:
        return jax.core.eval_jaxpr(closed.jaxpr, around, *jax.tree.leaves(args))[0]

    return lifted, list(closed.consts)
