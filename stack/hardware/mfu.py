"""How much of a chip's peak a run uses."""

import dataclasses
from typing import Literal

from stack.hardware.chip import Precision, lookup


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


def utilisation(
    *,
    full_flops_per_second: float,
    causal_flops_per_second: float,
    dtype: Literal["bfloat16", "float32"],
    device_kind: str,
) -> Mfu:
    """Model FLOP/s against a chip's peak.

    Args:
        full_flops_per_second: of each device, attention counted over whole rows.
        causal_flops_per_second: of each device, attention counted over half rows.
        dtype: what is computed in. In float32, XLA multiplies in TensorFloat-32 on NVIDIA chips that have
            it, so that peak is taken there.
        device_kind: `jax.Device.device_kind`.
    """
    chip = lookup(device_kind)
    precision: Precision = dtype
    if chip is not None and precision == "float32" and "tensorfloat32" in chip.peak_flops:
        precision = "tensorfloat32"
    peak_flops = chip.peak_flops.get(precision) if chip else None
    if chip is None:
        peak = f"no peak: {device_kind} is not in the table of chips"
    elif peak_flops is None:
        peak = f"no peak: {chip.title} has none listed for {precision}"
    else:
        peak = f"{peak_flops / 1e12:.4g} TFLOP/s, {chip.title}, dense {precision}"
    return Mfu(
        full_flops_per_second=full_flops_per_second,
        causal_flops_per_second=causal_flops_per_second,
        peak_flops=peak_flops,
        peak=peak,
    )
