"""What this machine has and what Stack makes of it."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import jax

from stack.hardware.chip import lookup

_PACKAGES = ("stack", "jax", "jaxlib", "flax", "optax", "tensorstore", "grain", "numpy")
_EXTRAS = {
    # What only that extra brings: `plan` has the CUDA plugin too, without CUDA's libraries.
    "cuda13": "nvidia-nccl-cu13",
    "cuda12": "nvidia-nccl-cu12",
    "plan": "nvidia-nvvm",
    "parquet": "pyarrow",
    "hf": "safetensors",
    "tracking": "tensorboardx",
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "notebook": "matplotlib",
}


def report() -> str:
    """Versions, extras and devices, one per line."""
    rows = [
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("python", sys.version.split()[0]),
        *((name, _version(name) or "missing") for name in _PACKAGES),
        *((f"extra {name}", _extra(name, package)) for name, package in _EXTRAS.items()),
        ("backend", f"{jax.default_backend()}, process {jax.process_index()} of {jax.process_count()}"),
        *((f"device {device.id}", _device(device)) for device in jax.local_devices()),
    ]
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


def _extra(name: str, package: str) -> str:
    return "installed" if _version(package) else f"not installed: pip install 'stack[{name}]'"


def _device(device: jax.Device) -> str:
    memory = (device.memory_stats() or {}).get("bytes_limit")
    chip = lookup(device.device_kind)
    size = f", {memory / 2**30:.1f} GiB usable" if memory else ""
    peak = chip.peak_flops.get("bfloat16") if chip else None
    return f"{device.device_kind}{size}, " + (
        f"{peak / 1e12:.0f} TFLOP/s bfloat16" if peak else "no known peak"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
