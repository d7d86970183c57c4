"""How the layers' products are computed, and whether a device can."""

from dataclasses import dataclass

from stack.config.errors import ConfigError
from stack.kernels.matmul.blocks import FORMS
from stack.kernels.matmul.operands import Blocks, Fp8, Kernel

OLDEST = 8.9
"""The first NVIDIA compute capability, Ada's, with matrix products in 8-bit floats; Hopper's is 9.0."""


KERNELS: dict[Blocks, Kernel] = {"block": "mosaic_gpu", "mx": "scaled_matmul"}
"""Of blocks, on NVIDIA's GPUs."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How products are computed."""

    fp8: Fp8 | None = None
    """In 8 bits, so; None: in the model's dtype."""
    dtype: str
    """The model's."""

    def __str__(self) -> str:
        """`products: fp8 (current scale per tensor; ...)`."""
        if self.fp8 is None:
            return f"products: xla ({self.dtype})"
        scale = f"{self.fp8.scaling} scale per {self.fp8.blocks}"
        if form := FORMS.get(self.fp8.blocks):
            scale = f"{self.fp8.blocks}: a scale for each {form.size} of a sum, by {self.fp8.kernel}"
        return f"products: fp8 ({scale}; evaluation, embeddings and head in {self.dtype})"


def choose(
    wanted: str,
    *,
    platform: str,
    compute_capability: float | None,
    dtype: str,
    scaling: str,
    blocks: Blocks,
) -> Choice:
    """How products are computed where they are asked for so.

    Args:
      wanted: `xla` or `fp8`.
      platform: `cpu`, `gpu` (NVIDIA's), `rocm` or `tpu`.
      compute_capability: of an NVIDIA GPU; None: not known, taken as new enough.
      dtype: of the model.
      scaling: of 8 bits, `current` or `delayed`.
      blocks: of 8 bits.

    Raises:
      ConfigError: 8 bits were asked for where a device has none; nothing falls back.
    """
    if wanted == "xla":
        return Choice(dtype=dtype)
    if told := obstacles(platform, compute_capability):
        raise ConfigError(f"kernels.matmul=fp8 cannot run: {'; '.join(told)}; set kernels.matmul=xla")
    if told := obstacles(platform, compute_capability, blocks):
        reasons = "; ".join(told)
        raise ConfigError(f"kernels.fp8.blocks={blocks} cannot run: {reasons}; set it to tensor or channel")
    kernel: Kernel = "xla"
    if blocks in FORMS:
        kernel = "reference" if platform == "cpu" else KERNELS[blocks]
    return Choice(fp8=Fp8(blocks=blocks, scaling=scaling, kernel=kernel), dtype=dtype)


def obstacles(platform: str, compute_capability: float | None, blocks: Blocks = "tensor") -> list[str]:
    """What keeps products in 8 bits from running on a device; empty: they can."""
    if platform in ("gpu", "cuda") and (compute_capability or OLDEST) < OLDEST:
        found = f"compute capability {compute_capability} is below {OLDEST}"
        return [f"{found} and multiplies no float8: XLA would widen it without a word"]
    if platform not in ("gpu", "cuda", "cpu"):
        return [f"on {platform} float8 is another format, or has not been compiled"]
    if platform == "cpu" or compute_capability is None or blocks not in FORMS:
        return []
    if blocks == "block" and compute_capability != 9.0:
        found = f"compute capability {compute_capability} is not 9.0 (H100, H200), for which its kernel is"
        return [f"{found}, and XLA has no product whose scale changes along the sum but a slower, wider one"]
    if blocks == "mx" and int(compute_capability) != 10:
        found = f"compute capability {compute_capability} is not 10.0 to 10.3 (B200, B300)"
        return [f"{found}, whose tensor cores scale: XLA would widen the product without a word"]
    return []
