"""What this machine has and what Stack makes of it."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import jax

from stack.plan.hardware import lookup

_PACKAGES = ("stack", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_EXTRAS = {
    "cuda13": "jax-cuda13-plugin",
    "cuda12": "jax-cuda12-plugin",
    "plan": "nvidia-nvvm",
    "parquet": "pyarrow",
    "hf": "safetensors",
    "tracking": "tensorboardx",
    "notebook": "matplotlib",
}


def report() -> str:
    """Versions, extras and devices, one per line."""
    lines = [
        f"python       {sys.version.split()[0]} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        *(f"{name:<12} {_version(name) or 'missing'}" for name in _PACKAGES if name != "stack"),
        f"{'stack':<12} {_version('stack')}",
        "",
    ]
    for extra, package in _EXTRAS.items():
        there = _version(package)
        lines.append(
            f"extra {extra:<9} {'installed' if there else f'not installed: pip install stack[{extra}]'}"
        )
    lines += ["", f"backend      {jax.default_backend()}, {jax.process_count()} process(es)"]
    lines += [_device(device) for device in jax.local_devices()]
    return "\n".join(lines)


def _device(device: jax.Device) -> str:
    memory = (device.memory_stats() or {}).get("bytes_limit")
    chip = lookup(device.device_kind)
    known = f"{chip.peak_flops.get('bfloat16', 0) / 1e12:.0f} TFLOP/s bfloat16" if chip else "no known peak"
    size = f", {memory / 2**30:.1f} GiB usable" if memory else ""
    return f"device {device.id:<5} {device.device_kind}{size}, {known}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
