"""Affine maps between named axes."""

import math
import zlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from stack.kernels.matmul import Fp8, fp8
from stack.layers.adapter import Adapter, adapt
from stack.layers.parameter import parameter
from stack.parallel.rules import Layout
from stack.parallel.zero import project

Axes = tuple[tuple[str, int], ...]
"""Names and sizes, e.g. (("heads", 12), ("head_dim", 64))."""


class Linear(nnx.Module):
    """y[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs] + bias[outputs]."""

    def __init__(self, inputs: Axes, outputs: Axes, *, bias: bool, std: float, rngs: nnx.Rngs):
        """Kernel normal with deviation `std`, bias zero, both float32."""
        names = tuple(name for name, _ in inputs + outputs)
        shape = tuple(size for _, size in inputs + outputs)
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.num_inputs = len(inputs)
        self.kernel: nnx.Variable = parameter(kernel, axes=names, role="matrix")
        self.bias = _bias(outputs) if bias else None
        self.fp8: Fp8 | None = None
        self.amax: nnx.Variable | None = None
        self.adapter: Adapter | None = None
        self.lora_a: nnx.Variable | None = None
        self.lora_b: nnx.Variable | None = None
        self.dora_magnitude: nnx.Variable | None = None

    def __call__(
        self, x: Float[Array, "batch length *inputs"], layout: Layout, names: tuple[str, ...]
    ) -> Float[Array, "batch length *outputs"]:
        """`x` ends in the input axes; the result has its dtype and the logical axes `names`."""
        if self.fp8 is None:
            y = project(x, self.kernel, layout, names, contracted=self.num_inputs)
        else:
            amax = None if self.amax is None else self.amax[...]
            y = fp8.project(
                x, self.kernel, layout, names, contracted=self.num_inputs, how=self.fp8, amax=amax
            )
        if self.adapter is not None:
            assert self.lora_a is not None
            assert self.lora_b is not None
            both, contracted = (self.lora_a, self.lora_b), self.num_inputs
            how = self.adapter, layout, names
            y = adapt(y, x, self.kernel, both, self.dora_magnitude, *how, contracted=contracted)
        return y if self.bias is None else add_bias(y, self.bias[...])


def use_float8(model: nnx.Module, how: Fp8, amaxes: Mapping[str, jax.Array | None]) -> None:
    """Makes products of stacks of layers ones in float8, from here on; the model is changed in place.

    Args:
      model: whole.
      how: in 8 bits.
      amaxes: of each `Linear` that is to be, by its path, as `layers.mlp.up`, what `fp8.project` takes as
        `amax`, [layers, 2] float32, or None.
    """
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and name in amaxes:
            module.fp8, amax = how, amaxes[name]
            module.kernel = module.kernel.replace(role="float8")
            if amax is not None:
                module.amax = nnx.data(nnx.Param(amax, axes=("layers", "amax"), role="amax"))


def without_float8(model: nnx.Module) -> None:
    """Takes that back."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.fp8 is not None:
            module.fp8, module.amax = None, None
            module.kernel = module.kernel.replace(role="matrix")


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """The `Linear` modules of a model, each of all layers of a stack, by path, as `layers.mlp.up`."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def sizes(linear: Linear) -> tuple[int, int]:
    """Inputs and outputs, in numbers, of one layer."""
    first = int(linear.kernel.axes[0] == "layers")
    shape, last = linear.kernel.shape, first + linear.num_inputs
    return math.prod(shape[first:last]), math.prod(shape[last:])


def use_adapters(model: nnx.Module, adapters: Mapping[str, Adapter], *, seed: int) -> None:
    """Adds adapters to products of a model, which is changed in place.

    A is normal with deviation 1 / sqrt(inputs) and B zero, so that nothing is added yet; what each draws
    depends on the seed and its own name alone. A magnitude is 1 until it is set to what the matrix has, of
    `stack.layers.adapter.magnitudes`: the matrices of a run with an adapter are read from elsewhere.

    Args:
        model: whole.
        adapters: of each `Linear` that is to have one, by its path.
        seed: of the run.
    """
    for name, module in linears(model):
        if name not in adapters:
            continue
        adapter, kernel = adapters[name], module.kernel
        stack = int(kernel.axes[0] == "layers")
        axes, shape, last = kernel.axes, kernel.shape, stack + module.num_inputs
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        a = jax.random.normal(key, (*shape[:last], adapter.rank), jnp.float32) / math.sqrt(sizes(module)[0])
        b = jnp.zeros((*shape[:stack], adapter.rank, *shape[last:]), jnp.float32)
        module.adapter = adapter
        module.lora_a = nnx.data(parameter(a, axes=(*axes[:last], "rank"), role="matrix"))
        module.lora_b = nnx.data(parameter(b, axes=(*axes[:stack], "rank", *axes[last:]), role="matrix"))
        if adapter.has_magnitude:
            ones = jnp.ones((*shape[:stack], *shape[last:]), jnp.float32)
            outputs = (*axes[:stack], *axes[last:])
            module.dora_magnitude = nnx.data(parameter(ones, axes=outputs, role="vector"))


def _bias(outputs: Axes) -> nnx.Param:
    names, shape = zip(*outputs, strict=True)
    return parameter(jnp.zeros(shape, jnp.float32), axes=names, role="vector")


def add_bias(y: Float[Array, "*whole"], bias: Float32[Array, "..."]) -> Float[Array, "*whole"]:
    """Y + bias, in the dtype of y; added in float32, so that the bias's gradient is summed in float32."""
    return (y.astype(jnp.float32) + bias).astype(y.dtype)
