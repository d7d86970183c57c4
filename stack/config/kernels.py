"""Which implementation runs an operation that has several."""

from typing import Literal

from stack.config.section import Section


class KernelsConfig(Section):
    """Implementations of operations; `stack kernels explain` tells what runs and why, docs/kernels.md how."""

    attention: Literal["auto", "cudnn", "mosaic_gpu", "xla_chunked", "xla"] = "auto"
    """`auto` takes the fastest that was measured on such a chip at such shapes, else one that stores no
    scores; a name takes that one, or is refused with all that keeps it from running."""
