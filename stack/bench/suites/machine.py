"""What the device is, as a process that uses it sees it."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from stack.bench.case import Machine

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "tokamax")


def describe() -> Machine:
    """The first device of this process."""
    device, versions = jax.devices()[0], {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are like "gfx942".
    is_number = capability.replace(".", "", 1).isdigit()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    kind = device.platform
    return Machine(
        platform="rocm" if kind == "gpu" and not is_number else kind,
        device_kind=device.device_kind,
        compute_capability=float(capability) if is_number else None,
        memory_bytes=float(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions=versions,
        client=device.client.platform_version.replace("\n", ", "),
    )


def _processor() -> str:
    """Its model, as the system prints it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
