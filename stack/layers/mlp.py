"""The position-wise MLP, plain or gated (arXiv 2002.05202)."""

import math
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from stack.config import BlockConfig
from stack.layers.linear import Linear
from stack.parallel.rules import Layout

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=True),
}


class Mlp(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Weights normal, of `matrix_std`; `down` writes to the residual stream."""
        embed, mlp = (("embed", config.embed_dim),), (("mlp", config.mlp_width),)
        linear = partial(Linear, bias=config.mlp_bias, rngs=rngs)
        self.kind = config.mlp
        std = matrix_std(config, config.embed_dim)
        self.gate = linear(embed, mlp, std=std) if config.gated else None
        self.up = linear(embed, mlp, std=std)
        self.down = linear(mlp, embed, std=residual_std(config, config.mlp_width))

    def __call__(
        self, x: Float[Array, "batch length embed"], layout: Layout
    ) -> Float[Array, "batch length embed"]:
        """[batch, length, embed] -> [batch, residual_length, embed]."""
        inside = ("batch", "length", "mlp")
        up = self.up(x, layout, inside)
        gate = None if self.gate is None else self.gate(x, layout, inside)

        # The backward pass is given the products alone, and makes the activation again: XLA keeps up to five
        # arrays as wide as the MLP for every layer otherwise, and copies each into its stack and out of it.
        @partial(jax.checkpoint, prevent_cse=False)
        def down(up: jax.Array, gate: jax.Array | None) -> jax.Array:
            activate = ACTIVATIONS[self.kind]
            y = activate(up) if gate is None else activate(gate) * up
            return self.down(y, layout, ("batch", "residual_length", "embed"))

        return down(up, gate)


def matrix_std(config: BlockConfig, inputs: int) -> float:
    """Deviation of a matrix of so many inputs."""
    return config.init_std / math.sqrt(inputs) if config.init == "fan_in" else config.init_std


def residual_std(config: BlockConfig, inputs: int) -> float:
    """Deviation of the projections that write to the residual stream (GPT-2, section 2.3)."""
    std = matrix_std(config, inputs)
    return std / math.sqrt(2 * config.num_layers) if config.scale_residual_init else std
