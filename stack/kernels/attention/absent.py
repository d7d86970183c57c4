"""Tracing attention for a GPU that is not here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax._src.cudnn import fused_attention_stablehlo as checks
from jax.extend import backend

OLDEST_CUDNN = 91_200
"""cuDNN 9.12, the oldest that JAX's CUDA packages allow."""


@contextmanager
def traced_for(device: Any) -> Iterator[None]:
    """What is traced within is for a GPU that is not here.

    JAX checks the call of cuDNN against this machine's cuDNN and GPU; Tokamax takes its kernel, and Mosaic
    its instructions, for the default device. They cannot be told of others, and the compiler needs none.
    """
    here = checks.check_cudnn_version, checks.check_compute_capability, backend.get_default_device

    def has_capability(capability: str) -> bool:
        return _version(device.compute_capability) >= _version(capability)

    checks.check_cudnn_version, checks.check_compute_capability = lambda: OLDEST_CUDNN, has_capability
    backend.get_default_device = lambda: device
    try:
        yield
    finally:
        checks.check_cudnn_version, checks.check_compute_capability, backend.get_default_device = here


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
