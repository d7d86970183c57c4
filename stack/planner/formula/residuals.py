"""What the forward pass of one layer keeps for its backward pass, read from the model itself.

The layers are traced without arrays and differentiated; what the derivative holds is counted. It is the
same for every ZeRO stage: stage 3 keeps nothing that it gathered.
"""

import dataclasses
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, Var
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from stack.config import AdapterConfig
from stack.config.mesh import AXES
from stack.config.model import ModelConfig
from stack.layers.dropout import example_keys
from stack.models.stack import Execution, Remat
from stack.parallel.mesh import use
from stack.parallel.rules import Layout
from stack.parallel.zero import is_variable
from stack.planner.compiled.compile import traced_for
from stack.planner.formula.shapes import abstract_model, named_variables, names_of_frozen


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResiduals:
    """Bytes per row of one micro-batch."""

    whole: float
    """Of one layer: on every device of `tensor`."""
    split: float
    """Of one layer: divided over the devices of `tensor`."""
    once: float
    """Of all layers together, such as a mask."""

    def per_layer(self, tensor: int) -> float:
        """Bytes of one layer and one row on one of `tensor` devices."""
        return self.whole + self.split / tensor


_HOPPER: Any = SimpleNamespace(compute_capability="9.0")

# A number of layers that no other axis of a model is as long as: it tells what is kept of every layer.
_LAYERS = 7919


def trace_residuals(
    model: ModelConfig,
    *,
    length: int,
    remat: Remat,
    tensor: int,
    sequence_parallel: bool,
    fused_attention: bool,
    blocked_attention: bool = False,
    adapter: AdapterConfig | None = None,
    frozen: tuple[str, ...] = (),
) -> LayerResiduals:
    """What one layer keeps, by a trace without arrays.

    Args:
        model: shapes and kinds.
        length: tokens per row.
        remat: the policy.
        tensor: ways of tensor parallelism, only whether it is 1 matters for what is counted.
        sequence_parallel: of norms and residuals.
        fused_attention: a kernel that never writes all scores to memory.
        blocked_attention: it is the one of plain operations.
        adapter: what is added to the model.
        frozen: patterns of parameters that are not trained.
    """
    kernel = "xla"
    if fused_attention:  # cuDNN has neither soft cap nor dropout.
        kernel = "mosaic_gpu" if model.attention_softcap or model.attention_dropout else "cudnn"
    if blocked_attention:
        kernel = "xla_chunked"
    ways = 1 if tensor == 1 else 2 if tensor % 2 == 0 else tensor
    parts = (model.num_heads, model.kv_heads, model.mlp_width, length if sequence_parallel else ways)
    if any(size % ways for size in parts):
        whole = _trace(model, length, remat, 1, False, kernel, adapter, frozen)
        return LayerResiduals(whole=0.0, split=whole.whole + whole.split, once=whole.once)
    return _trace(model, length, remat, ways, sequence_parallel and tensor > 1, kernel, adapter, frozen)


@cache
def _trace(
    model: ModelConfig,
    length: int,
    remat: Remat,
    tensor: int,
    sequence_parallel: bool,
    kernel: str,
    adapter: AdapterConfig | None,
    frozen: tuple[str, ...],
) -> LayerResiduals:
    small = model.model_copy(update={"num_layers": _LAYERS, "scan_unroll": 1})
    if adapter is None:  # Whose rank may be more than one.
        small = small.model_copy(update={"vocab_size": 1, "vocab_multiple": tensor})
    mesh = AbstractMesh(
        tuple({"data": 2, "tensor": tensor}.get(axis, 1) for axis in AXES),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
    )
    layout = Layout(
        mesh=mesh,
        sequence_parallel=sequence_parallel and tensor > 1,
        dtype=model.dtype,
    )
    with use(mesh):
        jaxpr = _backward(small, layout, length, remat, kernel, adapter, frozen)
    inputs = set(jaxpr.invars)
    whole = split = once = 0.0
    for variable in {v for v in jaxpr.outvars if isinstance(v, Var)} - inputs:
        aval: Any = variable.aval
        axes = _mesh_axes(aval)
        if "data" not in axes:
            continue  # Weights: only what has rows is split over them.
        size = aval.size * aval.dtype.itemsize / 2
        if aval.shape[0] != _LAYERS:
            once += size / (tensor if "tensor" in axes else 1)
        elif "tensor" in axes:
            split += size / _LAYERS
        else:
            whole += size / _LAYERS
    return LayerResiduals(whole=whole, split=split, once=once)


def _backward(
    model: ModelConfig,
    layout: Layout,
    length: int,
    remat: Remat,
    kernel: str,
    adapter: AdapterConfig | None,
    frozen: tuple[str, ...],
) -> Jaxpr:
    """A program whose results are what the backward pass of a model is given."""
    abstract = abstract_model(model, adapter)
    fixed = names_of_frozen(named_variables(abstract), adapter, frozen)
    graph, trained, rest = nnx.split(abstract, lambda path, _: ".".join(map(str, path)) not in fixed, ...)

    def shape(variable: nnx.Variable) -> nnx.Variable:
        assert layout.mesh is not None
        spec = layout.parameter_spec(variable.axes, variable.shape, variable.role)
        dtype = "float32" if variable.role == "vector" else model.dtype
        return variable.replace(
            jax.ShapeDtypeStruct(variable.shape, dtype, sharding=NamedSharding(layout.mesh, spec))
        )

    trained, rest = (jax.tree.map(shape, state, is_leaf=is_variable) for state in (trained, rest))
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=layout.sharding("batch", "length"))
    drops = model.embedding_dropout or model.attention_dropout or model.residual_dropout

    def backward(trained: Any, rest: Any, ids: jax.Array) -> Any:
        batch = {"tokens": ids, "positions": ids, "segments": ids}
        keys = example_keys(0, jnp.zeros((), jnp.int32), ids[:, 0]) if drops else None

        def hidden(trained: Any) -> jax.Array:
            run = Execution(layout=layout, kernels={"attention": kernel}, keys=keys, remat=remat)
            return nnx.merge(graph, trained, rest)(batch, run).hidden

        return jax.vjp(hidden, trained)[1]

    with traced_for(_HOPPER):
        return jax.make_jaxpr(backward)(trained, rest, ids).jaxpr


def _mesh_axes(aval: Any) -> set[str]:
    entries = aval.sharding.spec.partitions
    return {axis for entry in entries if entry for axis in (entry if isinstance(entry, tuple) else (entry,))}
