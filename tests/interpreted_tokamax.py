"""Tokamax's backward kernels for Hopper in Pallas's interpreter of GPUs, on a CPU.

The interpreter has no sums in registers that a product of registers is added to; here such a sum is a value
that is carried. The forward kernel has barriers of single warps, which it lacks too: plain operations take
its place, and give the statistics that the backward kernels read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax.extend import backend

from stack.kernels.attention import tokamax


class Hopper:
    """What is asked of the default device."""

    platform, compute_capability, device_kind, core_count = "gpu", "9.0", "NVIDIA H200", 132


@jax.tree_util.register_pytree_node_class
class Sum:
    """An accumulator that is a value."""

    def __init__(self, value: jax.Array) -> None:
        self.value = value

    def __getitem__(self, _: Any) -> jax.Array:
        return self.value

    def tree_flatten(self) -> tuple[tuple[jax.Array], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[jax.Array]) -> "Sum":
        return cls(*children)


@contextmanager
def backward_interpreted() -> Iterator[None]:
    """What is traced within has Tokamax's own backward pass."""
    from tokamax._src.ops.attention.base import DotProductAttention
    from tokamax._src.ops.attention.pallas_mosaic_gpu_vjp import PallasMosaicGpuFlashAttentionVjp

    wgmma, run_scoped, emit, define = (
        plgpu.wgmma,
        pl.run_scoped,
        plgpu.emit_pipeline_warp_specialized,
        jax.custom_vjp.defvjp,
    )

    def multiply(result: Any, left: Any, right: Any) -> None:
        if isinstance(result, Sum):
            plgpu.commit_smem()  # A read of this kind needs it.
            result.value += jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        else:
            wgmma(result, left, right)

    def scoped(function: Callable[..., Any], *types: Any, **options: Any) -> Any:
        if getattr(function, "__name__", "") in ("compute_dq", "compute_dk_dv"):
            zeros = (jnp.zeros(each.shape, jnp.float32) for each in types)
            return function(*(Sum(plgpu.layout_cast(each, plgpu.Layout.WGMMA)) for each in zeros))
        cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
        sums = [each for each in cells if isinstance(each, Sum)]

        def inner(*refs: Any, **more: Any) -> Any:
            before = [each.value for each in sums]
            result = function(*refs, **more)
            after = [each.value for each in sums]
            _put(sums, before)
            return result, after

        result, after = run_scoped(inner, *types, **options)
        _put(sums, after)
        return result

    def pipeline(body: Any, *, compute_context: Callable[[Any], Any], **options: Any) -> Any:
        def context(steps: Callable[[Any], Any]) -> Any:
            def through(carry: Any) -> Any:
                result = steps(carry)
                pairs = [pair for pair in zip(carry, result, strict=True) if isinstance(pair[0], Sum)]
                _put([old for old, _ in pairs], [new.value for _, new in pairs])
                return result

            return compute_context(through)

        return emit(body, compute_context=context, **options)

    def defined(self: Any, forward: Any, back: Any, **_: Any) -> None:
        define(self, forward, back)  # No optimize_remat, which callbacks forbid.

    how = plgpu.InterpretGPUParams(inline_mgpu="_hack_model_inline_mgpu_tokamax")
    with pytest.MonkeyPatch.context() as patch, plgpu.force_gpu_interpret_mode(how):
        patch.setattr(backend, "get_default_device", Hopper)
        patch.setattr(plgpu, "wgmma", multiply)
        patch.setattr(pl, "run_scoped", scoped)
        patch.setattr(plgpu, "emit_pipeline_warp_specialized", pipeline)
        patch.setattr(jax.custom_vjp, "defvjp", defined)
        attention = DotProductAttention(vjp=PallasMosaicGpuFlashAttentionVjp())
        patch.setattr(tokamax, "operation", lambda: attention)
        yield


def _put(sums: list[Sum], values: list[jax.Array]) -> None:
    for each, value in zip(sums, values, strict=True):
        each.value = value
