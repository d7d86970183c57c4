"""Chips by name: peak arithmetic, memory, bandwidth; and how much of the peak a run uses.

Peaks are dense (vendors print twice as much "with sparsity") and at the maximum boost clock; no
program reaches them: the best matrix products get about 80 % of them on H100 and H200.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from stack.config.model import ModelConfig
from stack.plan.flops import train_flops_per_token

Precision = Literal["float32", "tensorfloat32", "float16", "bfloat16", "float8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as JAX sees it, one device."""

    name: str
    """Name in print."""
    device_kinds: tuple[str, ...]
    """What `jax.Device.device_kind` calls it."""
    peak_flops: Mapping[Precision, float]
    """Dense FLOP/s of matrix products by precision of the operands; what the chip lacks is absent."""
    memory_bytes: float
    """Device memory in bytes, 1 GB = 1e9, as printed by the vendor."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float | None
    """Bytes per second one way to the other chips of its node, over all links; None: PCIe only."""
    source: str
    """Where the figures are printed."""


def _chip(
    name: str,
    *device_kinds: str,
    tflops: Mapping[Precision, float],
    memory_gb: float,
    memory_gb_per_second: float,
    link_gb_per_second: float | None,
    source: str,
) -> Chip:
    return Chip(
        name=name,
        device_kinds=device_kinds,
        peak_flops={precision: value * 1e12 for precision, value in tflops.items()},
        memory_bytes=memory_gb * 1e9,
        memory_bandwidth=memory_gb_per_second * 1e9,
        link_bandwidth=None if link_gb_per_second is None else link_gb_per_second * 1e9,
        source=source,
    )


_AMPERE: Mapping[Precision, float] = {
    "float32": 19.5,
    "tensorfloat32": 156,
    "float16": 312,
    "bfloat16": 312,
}
_HOPPER: Mapping[Precision, float] = {
    "float32": 67,
    "tensorfloat32": 494.5,
    "float16": 989,
    "bfloat16": 989,
    "float8": 1979,
}

# A device kind is matched whole: "... MIG 3g.40gb" is a part of a chip and has not its peak.
CHIPS = (
    _chip(
        "NVIDIA V100 SXM 32 GB",
        "Tesla V100-SXM2-32GB",
        "Tesla V100-SXM3-32GB",
        tflops={"float32": 15.7, "float16": 125},
        memory_gb=32,
        memory_gb_per_second=900,
        link_gb_per_second=150,
        source="NVIDIA V100 datasheet, 2020",
    ),
    _chip(
        "NVIDIA T4",
        "Tesla T4",
        tflops={"float32": 8.1, "float16": 65},
        memory_gb=16,
        memory_gb_per_second=320,
        link_gb_per_second=None,
        source="NVIDIA T4 datasheet, 2019",
    ),
    _chip(
        "NVIDIA A100 SXM 40 GB",
        "NVIDIA A100-SXM4-40GB",
        tflops=_AMPERE,
        memory_gb=40,
        memory_gb_per_second=1555,
        link_gb_per_second=300,
        source="NVIDIA A100 datasheet, 2020",
    ),
    _chip(
        "NVIDIA A100 SXM 80 GB",
        "NVIDIA A100-SXM4-80GB",
        tflops=_AMPERE,
        memory_gb=80,
        memory_gb_per_second=2039,
        link_gb_per_second=300,
        source="NVIDIA A100 datasheet, 2021",
    ),
    _chip(
        "NVIDIA A100 PCIe 80 GB",
        "NVIDIA A100 80GB PCIe",
        tflops=_AMPERE,
        memory_gb=80,
        memory_gb_per_second=1935,
        link_gb_per_second=None,
        source="NVIDIA A100 datasheet, 2021",
    ),
    _chip(
        "NVIDIA L4",
        "NVIDIA L4",
        tflops={"float32": 30.3, "tensorfloat32": 60, "float16": 121, "bfloat16": 121, "float8": 242.5},
        memory_gb=24,
        memory_gb_per_second=300,
        link_gb_per_second=None,
        source="NVIDIA L4 datasheet, 2023",
    ),
    _chip(
        "NVIDIA H100 SXM",
        "NVIDIA H100 80GB HBM3",
        tflops=_HOPPER,
        memory_gb=80,
        memory_gb_per_second=3350,
        link_gb_per_second=450,
        source="NVIDIA H100 datasheet, 2023",
    ),
    _chip(
        "NVIDIA H100 PCIe",
        "NVIDIA H100 PCIe",
        tflops={"float32": 51, "tensorfloat32": 378, "float16": 756, "bfloat16": 756, "float8": 1513},
        memory_gb=80,
        memory_gb_per_second=2000,
        link_gb_per_second=None,
        source="NVIDIA H100 datasheet, 2022",
    ),
    _chip(
        "NVIDIA H200 SXM",
        "NVIDIA H200",
        tflops=_HOPPER,
        memory_gb=141,
        memory_gb_per_second=4800,
        link_gb_per_second=450,
        source="NVIDIA H200 datasheet, 2024",
    ),
    _chip(
        "NVIDIA B200",
        "NVIDIA B200",
        tflops={"float32": 75, "tensorfloat32": 1100, "float16": 2250, "bfloat16": 2250, "float8": 4500},
        memory_gb=180,
        memory_gb_per_second=8000,
        link_gb_per_second=900,
        source="NVIDIA Blackwell datasheet, HGX B200, 2024",
    ),
    _chip(
        "NVIDIA GB200",
        "NVIDIA GB200",
        tflops={"float32": 80, "tensorfloat32": 1250, "float16": 2500, "bfloat16": 2500, "float8": 5000},
        memory_gb=186,
        memory_gb_per_second=8000,
        link_gb_per_second=900,
        source="NVIDIA Blackwell datasheet, GB200 NVL72, 2024",
    ),
    _chip(
        "NVIDIA B300",
        "NVIDIA B300 SXM6 AC",
        tflops={"float16": 2250, "bfloat16": 2250, "float8": 4500},
        memory_gb=288,
        memory_gb_per_second=8000,
        link_gb_per_second=900,
        source="NVIDIA Blackwell Ultra datasheet, HGX B300, 2025",
    ),
    _chip(
        "AMD MI300X",
        "AMD Instinct MI300X",
        tflops={"float32": 163, "float16": 1307, "bfloat16": 1307, "float8": 2615},
        memory_gb=192,
        memory_gb_per_second=5300,
        link_gb_per_second=448,
        source="AMD Instinct MI300X datasheet, 2023",
    ),
    _chip(
        "TPU v5e",
        "TPU v5 lite",
        "TPU v5e",
        tflops={"bfloat16": 197},
        memory_gb=16,
        memory_gb_per_second=819,
        link_gb_per_second=200,
        source="Google Cloud TPU v5e documentation: 1,600 Gbit/s between chips",
    ),
    _chip(
        "TPU v5p",
        "TPU v5",
        "TPU v5p",
        tflops={"bfloat16": 459},
        memory_gb=95,
        memory_gb_per_second=2765,
        link_gb_per_second=600,
        source="Google Cloud TPU v5p documentation: 4,800 Gbit/s between chips",
    ),
    _chip(
        "TPU v6e",
        "TPU v6 lite",
        "TPU v6e",
        tflops={"bfloat16": 918},
        memory_gb=32,
        memory_gb_per_second=1640,
        link_gb_per_second=400,
        source="Google Cloud TPU v6e documentation: 3,200 Gbit/s between chips",
    ),
)


def lookup(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None if it is not in the table, as a CPU never is."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mfu:
    """Model FLOPs utilisation in both conventions (arXiv 2204.02311, appendix B)."""

    full_flops_per_second: float
    """Model FLOP/s per device, attention counted over whole rows."""
    causal_flops_per_second: float
    """Model FLOP/s per device, attention counted over half rows."""
    peak_flops: float | None
    """FLOP/s the utilisation is against; None if it is not known."""
    peak: str
    """That peak in words, or why there is none."""

    @property
    def full(self) -> float | None:
        """Fraction of the peak in the `full` convention; None without a peak."""
        return None if self.peak_flops is None else self.full_flops_per_second / self.peak_flops

    @property
    def causal(self) -> float | None:
        """Fraction of the peak in the `causal` convention; None without a peak."""
        return None if self.peak_flops is None else self.causal_flops_per_second / self.peak_flops


def mfu(model: ModelConfig, *, length: int, tokens_per_second_per_device: float, device_kind: str) -> Mfu:
    """Utilisation of a training run.

    Args:
        model: its dtype chooses the peak. In float32, XLA multiplies in TensorFloat-32 on NVIDIA
            chips that have it, so that peak is taken there.
        length: tokens per row.
        tokens_per_second_per_device: tokens trained on, padding included, over seconds and devices.
        device_kind: `jax.Device.device_kind`.
    """
    chip = lookup(device_kind)
    precision: Precision = model.dtype
    if chip is not None and precision == "float32" and "tensorfloat32" in chip.peak_flops:
        precision = "tensorfloat32"
    peak_flops = chip.peak_flops.get(precision) if chip else None
    if chip is None:
        peak = f"no peak: {device_kind} is not in the table of chips"
    elif peak_flops is None:
        peak = f"no peak: {chip.name} has none listed for {precision}"
    else:
        peak = f"{peak_flops / 1e12:.4g} TFLOP/s, {chip.name}, dense {precision}"
    return Mfu(
        full_flops_per_second=tokens_per_second_per_device * train_flops_per_token(model, length, "full"),
        causal_flops_per_second=tokens_per_second_per_device * train_flops_per_token(model, length, "causal"),
        peak_flops=peak_flops,
        peak=peak,
    )
