"""What is asked of an attention kernel, before anything is traced."""

from dataclasses import dataclass

from stack.kernels.attention.mask import Kind


@dataclass(frozen=True, kw_only=True)
class Request:
    """The attention of a model, and the device it is to run on."""

    platform: str
    """`cpu`, `gpu` (NVIDIA's), `rocm` or `tpu`."""
    length: int | None = None
    """Keys of the longest row; None: not known, taken as long."""
    compute_capability: float | None = None
    """Of an NVIDIA GPU, e.g. 9.0; None: not known, taken as new enough."""
    dtype: str
    """What it is computed in, `bfloat16` or `float32`."""
    head_dim: int
    """Width of a head."""
    kind: Kind = "causal"
    """Of the mask."""
    window: bool = False
    """Whether some layers see a part of the row alone."""
    packed_length: int | None = None
    """Tokens of a row that documents share; None: each has rows of its own."""
    dropout: float = 0.0
    """Share of attention weights dropped in training."""
    softcap: float | None = None
    """c of c x tanh(score / c); None: scores are as they are."""
    bias: bool = False
    """Whether something is added to the scores."""
    cross: bool = False
    """Whether some layers attend to a row of another length."""
