"""Which implementation runs an operation that has several."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.section import Section


class Fp8Config(Section):
    """How products with weights are computed in 8 bits (arXiv 2209.05433)."""

    conditions = (Condition(fields=("history",), other="scaling", values=("delayed",)),)

    scaling: Literal["current", "delayed"] = "current"
    """What an activation or a gradient is scaled for: `current`, its own largest number; `delayed`, that
    of the last steps, which is known beforehand. A weight always has its own."""
    history: PositiveInt = 16
    """`delayed`: steps looked back on."""
    blocks: Literal["tensor", "channel", "block", "mx"] = "tensor"
    """What shares a scale: a whole `tensor`; each token of an activation and each output `channel` of a
    weight; a `block`, 1 x 128 of an activation or a gradient and 128 x 128 of a weight (arXiv 2412.19437), on
    H100, H200 and, slowly, a CPU; or 32 along a sum, `mx` (MXFP8), on B200, B300 and, slowly, a CPU."""
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    """Weights of layers whose products stay in model.dtype, by name, `*` for anything: `layers.attention.*`.
    Embeddings, the head and what is outside the layers always do."""
    first_layers: NonNegativeInt = 0
    """Layers at the start of a stack whose products stay in model.dtype. With this or last_layers above 0, a
    step holds a copy of the other layers' weights."""
    last_layers: NonNegativeInt = 0
    """Layers at the end of a stack whose products stay in model.dtype."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scaling == "delayed" and self.blocks != "tensor":
            what = "token" if self.blocks == "channel" else "block"
            raise ValueError(
                f"blocks={self.blocks} needs scaling=current: no {what} has a past; set one of them otherwise"
            )
        return self


class KernelsConfig(Section):
    """Implementations of operations; `stack kernels explain` tells what runs and why, docs/kernels.md how."""

    conditions = (Condition(fields=("fp8",), other="matmul", values=("fp8",)),)

    attention: Literal["auto", "cudnn", "mosaic_gpu", "tokamax", "xla_chunked", "xla"] = "auto"
    """`auto` takes the fastest that was measured on such a chip at such shapes, else one that stores no
    scores; a name takes that one, or is refused with all that keeps it from running."""
    matmul: Literal["xla", "fp8"] = "xla"
    """Products of a layer with its weights in a training step: `xla` in model.dtype; `fp8` in 8 bits, on
    NVIDIA's chips from Ada and Hopper on, and slowly on a CPU. Evaluation and generation use model.dtype."""
    fp8: Fp8Config = Fp8Config()
    """How, with matmul `fp8`."""
