"""One entry for every implementation of attention."""

from typing import Any

from jaxtyping import Array, Float

from stack.kernels.attention.choice import KERNELS
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.tiling import Tiled
from stack.parallel.rules import Layout


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    layout: Layout,
    *,
    kernel: str | Tiled,
    bias: Float[Array, "#groups #heads #queries #keys"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: Dropout | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(scale query key^T + bias) value, over the keys that a mask allows.

    Args:
      query: [batch, queries, heads, head_dim], any float dtype.
      key: [batch, keys, kv_heads, head_dim]; heads / kv_heads queries share each.
      value: as `key`.
      mask: who sees whom.
      layout: how the arrays lie on the mesh.
      kernel: a name in `KERNELS`, or one with tiles that are not its own; nothing falls back.
      bias: added to the scores before the soft cap's result is masked, broadcast to
        [groups, heads, queries, keys]; any float dtype. The rows of the batch are so many groups, one
        after another, each of which shares one.
      scale: what scores are multiplied by; None: 1 / sqrt(head_dim).
      softcap: c of c x tanh(score / c); None: as they are.
      dropout: of the weights, in training; None: nothing is dropped.

    Returns:
      Shape and dtype of `query`. Of a query that sees no key zeros, without a gradient (where it is padding,
      cudnn gives what it likes).

    Raises:
      ValueError: there is no such kernel, or it cannot do what is asked; `choose` tells beforehand.
    """
    name, tiles = (kernel, None) if isinstance(kernel, str) else kernel
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}: {', '.join(KERNELS)}")
    if tiles is not None and KERNELS[name].tiling is None:
        raise ValueError(f"attention kernel {name!r} has no tiles to choose")
    implementation, told = KERNELS[name].attend, {"softcap": softcap, "dropout": dropout}
    more: dict[str, Any] = told if tiles is None else told | {"tiles": tiles}
    return implementation(query, key, value, mask, layout, bias=bias, scale=scale, **more)
