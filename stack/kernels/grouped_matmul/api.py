"""One entry for every implementation of products of tokens with the weights of their groups."""

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int32

from stack.kernels.grouped_matmul.choice import KERNELS, Kernel, choose
from stack.kernels.grouped_matmul.island import Island, differentiable
from stack.kernels.grouped_matmul.request import Request
from stack.parallel.rules import ONE_DEVICE, Layout


def grouped_matmul(
    tokens: Float[Array, "tokens inputs"],
    weights: Float[Array, "groups _ outputs"],
    sizes: Int32[Array, "_ _"],
    layout: Layout = ONE_DEVICE,
    *,
    names: tuple[str, str] = ("embed", "mlp"),
    implementation: str = "auto",
) -> Float[Array, "tokens outputs"]:
    """Each token times the weight of its group: the products of a mixture of experts that drops no token.

    Groups have as many tokens as the router gave them, none is padded and none dropped (MegaBlocks, arXiv
    2211.15841, section 3). Differentiable in `tokens` and `weights`.

    On a mesh each device multiplies its own tokens by whole weights, split over `tensor` as the table says of
    `names`; nothing is gathered. Where `inputs` are split, results are partial sums, which are added; the
    gradient of the weights is summed over the devices that hold different tokens.

    Args:
      tokens: [tokens, inputs], bfloat16, float32 or float64, split as a batch is. On each device those of
        group 0 come first, then those of group 1, and so on; what remains belongs to none.
      weights: [groups, inputs, outputs] in the same dtype, whole over `fsdp`: as
        `stack.parallel.zero.gather_weight` makes them, or plain.
      sizes: [shards, groups] int32, tokens of each group on each of the devices that tokens are split over;
        none below 0, and of a device together at most its tokens: what goes beyond is cut off.
      layout: how the arrays lie on the mesh.
      names: logical axes of `inputs` and `outputs`.
      implementation: a name in `KERNELS`, or `auto`: see `choose`.

    Returns:
      [tokens, outputs] in the dtype of `tokens`, summed in float32 at the least. Tokens that belong to no
      group get zeros and give no gradient; a group without tokens gives its weight a gradient of zeros.

    Raises:
      ConfigError: the implementation is unknown, or cannot do what is asked, with all reasons.
      ValueError: shapes or dtypes do not fit one another, or arrays lie otherwise than told.
    """
    shards = math.prod(layout.size(axis) for axis in layout.mesh_axes("batch"))
    _check(tokens, weights, sizes, shards)
    request = _request(tokens, weights, layout, names, shards)
    kernel = KERNELS[choose(request, implementation).kernel]
    product = kernel.multiply
    gradients = partial(_gradients, kernel)
    if layout.trivial:
        return differentiable(product, gradients)(tokens, weights, sizes[0])
    return Island(layout=layout, names=names).run(tokens, weights, sizes, product, gradients)


def _gradients(
    kernel: Kernel, tokens: jax.Array, weights: jax.Array, sizes: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    of_tokens = kernel.multiply(cotangent, weights, sizes, transposed=True)
    return of_tokens, kernel.weight_gradient(tokens, cotangent, sizes)


def _check(tokens: jax.Array, weights: jax.Array, sizes: jax.Array, shards: int) -> None:
    if tokens.dtype != weights.dtype:
        raise ValueError(
            f"grouped_matmul: tokens are {tokens.dtype}, weights {weights.dtype}; cast one to the other"
        )
    if tokens.shape[1] != weights.shape[1]:
        raise ValueError(
            f"grouped_matmul: tokens have {tokens.shape[1]} numbers, weights take {weights.shape[1]}"
        )
    if sizes.shape != (shards, weights.shape[0]):
        raise ValueError(
            f"grouped_matmul: sizes have the shape {list(sizes.shape)}; for {weights.shape[0]} weights and"
            f" tokens on {shards} devices it must be [{shards}, {weights.shape[0]}]"
        )
    if tokens.shape[0] % shards or not tokens.size or not weights.size:
        raise ValueError(
            f"grouped_matmul: {tokens.shape[0]} tokens of {tokens.shape[1]} numbers for weights"
            f" {list(weights.shape)} cannot be shared by {shards} devices; give each as many, one at least"
        )


def _request(
    tokens: jax.Array, weights: jax.Array, layout: Layout, names: tuple[str, str], shards: int
) -> Request:
    platform, capability = device(layout)
    inputs, outputs = (
        size // math.prod(layout.size(axis) for axis in layout.mesh_axes(name))
        for name, size in zip(names, weights.shape[1:], strict=True)
    )
    return Request(
        platform=platform,
        compute_capability=capability,
        dtype=str(tokens.dtype),
        tokens=tokens.shape[0] // shards,
        groups=weights.shape[0],
        inputs=inputs,
        outputs=outputs,
    )


def device(layout: Layout) -> tuple[str, float | None]:
    """Platform and compute capability of the devices that a layout is for."""
    found: Any = None
    if isinstance(layout.mesh, Mesh):
        found = layout.mesh.devices.flat[0]
    elif isinstance(layout.mesh, AbstractMesh):
        found = layout.mesh.abstract_device
    found = found or jax.devices()[0]
    capability = str(getattr(found, "compute_capability", ""))  # "9.0"; AMD's are like "gfx942"
    if capability.startswith("gfx"):
        return "rocm", None
    return found.platform, float(capability) if capability else None
