"""The NVIDIA GPUs of this machine, asked of their driver: what must be known before JAX starts."""

import ctypes
import os
from dataclasses import dataclass

from stack import environment

_LIBRARY = "libnvidia-ml.so.1"  # NVML, which comes with every driver.


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """Those that this process may use."""

    number: int
    compute_capability: float
    """The lowest of them, as 9.0."""


def find() -> Gpus | None:
    """The GPUs that CUDA_VISIBLE_DEVICES lets through; None where there is no driver, or it says nothing.

    Takes no memory of them, unlike a CUDA context.
    """
    if not environment.has_driver():
        return None
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    if library.nvmlInit_v2():
        return None
    try:
        capabilities = _capabilities(library)
    finally:
        library.nvmlShutdown()
    visible = [capabilities[index] for index in _visible(len(capabilities))]
    return Gpus(number=len(visible), compute_capability=min(visible)) if visible else None


def _capabilities(library: ctypes.CDLL) -> list[float]:
    """Compute capability of each GPU of the machine; empty if one does not tell."""
    number = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(number)):
        return []
    capabilities = []
    for index in range(number.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if library.nvmlDeviceGetHandleByIndex_v2(
            ctypes.c_uint(index), ctypes.byref(device)
        ) or library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
            return []
        capabilities.append(major.value + minor.value / 10)
    return capabilities


def _visible(number: int) -> list[int]:
    """The numbers in CUDA_VISIBLE_DEVICES, up to the first that is none; all where it has other names."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return list(range(number))
    names = [name.strip() for name in text.split(",")]
    if any(name.startswith(("GPU-", "MIG-")) for name in names):
        return list(range(number))
    shown = []
    for name in names:
        if not name.isdecimal() or int(name) >= number:
            break
        shown.append(int(name))
    return shown
