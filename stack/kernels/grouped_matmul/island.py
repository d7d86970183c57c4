"""Products of each device's own tokens with the weights of their groups."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stack.parallel.rules import Layout

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Tokens, weights and sizes of one device -> result."""
Gradients = Callable[..., tuple[jax.Array, jax.Array]]
"""Tokens, weights, sizes and the cotangent of the result -> the gradients of tokens and weights."""


def differentiable(product: Product, gradients: Gradients) -> Product:
    """A product with its gradients written out."""

    @jax.custom_vjp
    def run(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return product(tokens, weights, sizes)

    run.defvjp(
        lambda *operands: (product(*operands), operands),
        lambda operands, cotangent: (*gradients(*operands, cotangent), None),
    )
    return run


@dataclass(frozen=True, kw_only=True)
class Island:
    """How operands and results lie on a mesh, and products inside `shard_map`; see `api`.

    Outside, the output and the gradients of a custom call are typed replicated, and the compiled step
    gathers the global batch without a word. What has a partial sum on each device, here a result whose
    `inputs` are split and the gradients, leaves as such: `unreduced`, to be added once.
    """

    layout: Layout
    names: tuple[str, str]
    """Logical axes of inputs and outputs."""

    def run(
        self,
        tokens: jax.Array,
        weights: jax.Array,
        sizes: jax.Array,
        product: Product,
        gradients: Gradients,
    ) -> jax.Array:
        """[tokens, outputs], its partial sums added.

        Raises:
          ValueError: tokens or weights lie otherwise than the layout says.
        """
        inputs, outputs = self.names
        replicas = self.layout.replicas
        summed = frozenset(self.layout.mesh_axes(inputs))
        rest = frozenset(self.layout.mesh_axes(outputs))
        of_tokens = self._spec("batch", inputs)
        of_weights = self._spec(None, inputs, outputs)
        of_result = self._spec("batch", outputs)
        of_sizes = self._spec("batch", None)
        operands = P(*of_tokens, reduced=rest), P(*of_weights, reduced=replicas), of_sizes

        def local(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
            return product(tokens, weights, sizes[0])

        def local_gradients(
            tokens: jax.Array, weights: jax.Array, sizes: jax.Array, cotangent: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return gradients(tokens, weights, sizes[0], cotangent)

        forward = jax.shard_map(
            local, in_specs=operands, out_specs=P(*of_result, unreduced=summed), check_vma=False
        )
        backward = jax.shard_map(
            local_gradients,
            in_specs=(*operands, P(*of_result, reduced=summed)),
            out_specs=(P(*of_tokens, unreduced=rest), P(*of_weights, unreduced=replicas)),
            check_vma=False,
        )
        self._check("tokens", tokens, of_tokens)
        self._check("weights", weights, of_weights)
        tokens = jax.reshard(tokens, operands[0])
        weights = _reduced(weights, operands[1])
        return self.layout.shard(differentiable(forward, backward)(tokens, weights, sizes), "batch", outputs)

    def _spec(self, *names: str | None) -> P:
        spec = self.layout.spec(*names)
        assert spec is not None
        return spec

    def _check(self, name: str, array: jax.Array, spec: P) -> None:
        found = jax.typeof(array).sharding.spec
        if found.partitions != spec.partitions or found.unreduced:
            gather = "; gather them first (stack.parallel.zero.gather_weight)" if name == "weights" else ""
            raise ValueError(f"grouped_matmul: {name} lie on the mesh as {found}, not as {spec}{gather}")


def _reduced(weights: jax.Array, spec: P) -> jax.Array:
    """Weights whose gradients are partial sums; of plain ones they are added in float32."""
    plain = jax.typeof(weights).sharding.spec
    if plain.reduced == spec.reduced:
        return weights

    @jax.custom_vjp
    def retype(weights: jax.Array) -> jax.Array:
        return jax.reshard(weights, spec)

    def add(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        wide = cotangent.astype(jnp.promote_types(cotangent.dtype, jnp.float32))
        return (jax.reshard(wide, P(*plain.partitions, unreduced=plain.reduced)).astype(cotangent.dtype),)

    retype.defvjp(lambda weights: (retype(weights), None), add)
    return retype(weights)
