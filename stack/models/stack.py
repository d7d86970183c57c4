"""Stacks of layers: the one place with the loop over them, and what it keeps for the backward pass."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from stack.kernels.attention import Tiled
from stack.kernels.matmul import PRODUCT
from stack.layers.dropout import layer_keys
from stack.layers.linear import without_float8
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.parallel.zero import gather_at_use, is_variable

Remat = Literal["none", "full", "dots", "save_qkv_proj"]
LAYER_INPUT = "layer_input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is run: what changes speed and memory, and the keys of dropout."""

    layout: Layout = ONE_DEVICE
    """How things lie on the mesh."""
    kernels: Mapping[str, str | Tiled] = dataclasses.field(default_factory=lambda: {"attention": "xla"})
    """The implementation of each operation that has several, with its tiles if they were tuned."""
    keys: jax.Array | None = None
    """[batch] dropout keys in training, else None."""
    packed: bool = True
    """Whether a row may hold several documents."""
    remat: Remat = "none"
    """What the backward pass computes again."""
    offload: bool = False
    """Whether what it does not waits for it in host memory; of remat `full` and `save_qkv_proj`."""
    plain_layers: tuple[int, int] = (0, 0)
    """Layers at the start and at the end of a stack that have no products in float8, where others have."""
    instead: Callable[..., Any] | None = None
    """What is called instead of running a stack of layers, with all that `run_layers` has of it: a pipeline
    runs them elsewhere."""


def _dots(primitive: Primitive, *inputs: Any, **parameters: Any) -> bool:
    """Saves the results of matmuls; where a device holds a partial sum of one, the sum.

    Those in float8 have a derivative of their own, within which no policy looks, and a name.
    """
    if primitive.name == "name":
        return parameters["name"] == PRODUCT
    if primitive.name == "reshard":
        return bool(inputs[0].sharding.spec.unreduced)
    sharding = parameters.get("out_sharding")
    if sharding is not None and sharding.spec.unreduced:
        return False
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **parameters)


SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _dots,
    "save_qkv_proj": jax.checkpoint_policies.save_only_these_names("qkv_proj"),
}
"""What the backward pass finds saved, by the name of the remat policy."""

_to_host = partial(
    jax.checkpoint_policies.save_and_offload_only_these_names,
    names_which_can_be_saved=[],
    offload_src="device",
    offload_dst="pinned_host",
)
OFFLOADED = {
    "full": _to_host(names_which_can_be_offloaded=[LAYER_INPUT]),
    "save_qkv_proj": _to_host(names_which_can_be_offloaded=[LAYER_INPUT, "qkv_proj"]),
}
"""The same with what is saved in host memory until the backward pass comes to it."""


def stack_layers[M: nnx.Module](make: Callable[[nnx.Rngs], M], number: int, *, rngs: nnx.Rngs) -> M:
    """Builds layers as one module whose parameters have `layers` in front.

    Args:
      make: builds one layer.
      number: of layers.
      rngs: gives the key that all of theirs come from.
    """
    keys = jax.random.split(rngs.params(), number)
    return _with_axes(jax.vmap(lambda key: make(nnx.Rngs(key)))(keys), lambda axes: ("layers", *axes))


def run_layers[M: nnx.Module, S](
    call: Callable[[M, jax.Array, jax.Array | None, S], tuple[jax.Array, S]],
    layers: M,
    x: jax.Array,
    run: Execution,
    *,
    state: S = None,
    first: int = 0,
    unroll: int = 1,
) -> tuple[jax.Array, S]:
    """Runs a stack of layers, one after another.

    Args:
      call: (layer, x, keys, state) -> (x, state): one layer; `keys` are its [batch] dropout keys or None.
      layers: from `stack_layers`, as they lie at rest at stage 3 and gathered below it.
      x: what the first layer gets; shape and dtype stay the same.
      run: how.
      state: arrays with the layers in front, of which each layer gets its own and gives them back.
      first: number of the first layer, for the dropout keys: no two layers of a model share one.
      unroll: layers per iteration of the loop; read with remat `none`.

    Returns:
      What the last layer gives, and the state of all of them.
    """
    if run.instead is not None:
        return run.instead(call, layers, x, run, state, first), state
    number = jax.tree.leaves(layers)[0].shape[0]
    stacked = layers, jnp.arange(first, first + number), state
    first_plain, last_plain = run.plain_layers
    begin, end = min(first_plain, number), max(number - last_plain, min(first_plain, number))
    parts = [(slice(0, begin), True), (slice(begin, end), False), (slice(end, number), True)]
    parts = [(where, is_plain) for where, is_plain in parts if where.start < where.stop]
    if len(parts) == 1:
        return _run_part(call, x, stacked, run, unroll=unroll, is_plain=parts[0][1])
    states = []
    for where, is_plain in parts:
        part = jax.tree.map(operator.itemgetter(where), stacked)
        x, after = _run_part(call, x, part, run, unroll=unroll, is_plain=is_plain)
        states.append(after)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)


def _run_part(call: Any, x: jax.Array, stacked: Any, run: Execution, *, unroll: int, is_plain: bool) -> Any:
    """Layers that are all alike; see `run_layers`."""
    layer = one_layer(call, run, is_plain=is_plain)
    # Unrolled, what is to be computed again is computed at once and kept: twice the memory.
    unroll = unroll if run.remat == "none" else 1
    return jax.lax.scan(layer, x, stacked, unroll=unroll)


def one_layer(call: Any, run: Execution, *, is_plain: bool = False) -> Any:
    """(x, (layer, its number, its state)) -> (x, state), which keeps what `remat` says."""
    layout = run.layout

    def layer(x: jax.Array, inputs: tuple[Any, jax.Array, Any]) -> tuple[jax.Array, Any]:
        module, index, state = inputs
        module = _with_axes(module, lambda axes: axes[1:])
        if is_plain:
            without_float8(module)
        x = checkpoint_name(x, LAYER_INPUT) if run.offload else x
        if run.remat != "none":  # Once for what is computed again and its gradients; else product by product.
            module = gather_at_use(module, layout)
        return call(module, x, None if run.keys is None else layer_keys(run.keys, index), state)

    if run.remat != "none":
        policy = OFFLOADED[run.remat] if run.offload else SAVED[run.remat]
        # Without the barrier the compiler, which unrolls the loop by two, computes the next layer again
        # beside this one and holds both (10.5 instead of 9.4 GiB for qwen3_0_6b). At stage 3 it would
        # hold back the gathers of the next layer's weights.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=layout.zero < 3)
    return layer


def _with_axes[M: nnx.Module](module: M, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> M:
    """The same parameters with other names of axes."""

    def rename(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(axes=change(variable.axes))

    return jax.tree.map(rename, module, is_leaf=is_variable)
