"""Products of groups to compare implementations on, and what NumPy answers in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stack.kernels.grouped_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Case:
    """One product."""

    sizes: tuple[int, ...]
    tokens: int
    """Of all groups and beyond."""
    inputs: int = 64
    outputs: int = 64
    dtype: str = "float32"

    def __str__(self) -> str:
        """A name for the test."""
        sizes = ",".join(map(str, self.sizes))
        return f"{self.tokens}x{self.inputs}x{self.outputs} {self.dtype} {sizes}"

    def arrays(self) -> dict[str, jax.Array]:
        """Tokens and weights: what has a gradient."""
        draw = np.random.default_rng(0).normal
        shapes = {
            "tokens": (self.tokens, self.inputs),
            "weights": (len(self.sizes), self.inputs, self.outputs),
        }
        return {name: jnp.asarray(draw(size=shape), self.dtype) for name, shape in shapes.items()}

    def slope(self) -> jax.Array:
        """The cotangent of the result."""
        return jnp.asarray(np.random.default_rng(1).normal(size=(self.tokens, self.outputs)), self.dtype)

    def expected(self) -> dict[str, np.ndarray]:
        """Group by group, written out."""
        tokens, weights = (np.asarray(each, np.float64) for each in self.arrays().values())
        slope = np.asarray(self.slope(), np.float64)
        result, of_tokens, of_weights = np.zeros_like(slope), np.zeros_like(tokens), np.zeros_like(weights)
        begin = 0
        for group, size in enumerate(self.sizes):
            mine = slice(begin, min(begin + size, self.tokens))
            result[mine] = tokens[mine] @ weights[group]
            of_tokens[mine] = slope[mine] @ weights[group].T
            of_weights[group] = tokens[mine].T @ slope[mine]
            begin += size
        return {"result": result, "tokens": of_tokens, "weights": of_weights}

    def actual(self, implementation: str) -> dict[str, np.ndarray]:
        """The same by an implementation; shapes and dtypes are looked at too."""
        arrays = self.arrays()

        @jax.jit
        def run(tokens: jax.Array, weights: jax.Array, sizes: jax.Array, slope: jax.Array) -> tuple:
            def product(tokens: jax.Array, weights: jax.Array) -> jax.Array:
                return grouped_matmul(tokens, weights, sizes, implementation=implementation)

            result, pull = jax.vjp(product, tokens, weights)
            return result, *pull(slope)

        found = run(**arrays, sizes=jnp.asarray([self.sizes], jnp.int32), slope=self.slope())
        for array, like in zip(found, (self.slope(), *arrays.values()), strict=True):
            assert (array.shape, array.dtype) == (like.shape, like.dtype)
        names = ("result", "tokens", "weights")
        return {name: np.asarray(array, np.float64) for name, array in zip(names, found, strict=True)}


SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "even": ((64, 64), 128),
    "odd": ((37, 5, 90, 61), 193),
    "empty ones": ((0, 40, 0, 0, 88, 0), 128),
    "one has all": ((0, 150, 0), 150),
    "none has any": ((0, 0, 0), 70),
    "some tokens belong to none": ((30, 0, 41), 140),
    "skewed": ((1, 170, 2, 1, 3, 1, 0, 14), 192),
    "many small ones": ((3,) * 40, 130),
    "one token": ((0, 1), 1),
    "more than there are": ((60, 60), 100),
}
"""Sizes of groups, and tokens."""
