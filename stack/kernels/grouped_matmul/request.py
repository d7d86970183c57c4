"""What is asked of a kernel, before anything is traced."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Request:
    """A product of groups of tokens with weights, and the device it is to run on; sizes of one device."""

    platform: str
    """`cpu`, `gpu` (NVIDIA's), `rocm` or `tpu`."""
    compute_capability: float | None = None
    """Of an NVIDIA GPU, e.g. 9.0; None: not known, taken as new enough."""
    dtype: str
    """Of the operands and the result."""
    tokens: int
    """Of all groups and beyond."""
    groups: int
    """Of tokens, each of which has a weight."""
    inputs: int
    """Numbers of a token."""
    outputs: int
    """Numbers of a result."""
