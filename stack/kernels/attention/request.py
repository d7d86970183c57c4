"""What is asked of an attention kernel, before anything is traced."""

from dataclasses import asdict, dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The same with its sizes: what one device attends to at a time in a training step."""

    request: Request
    rows: int
    heads: int
    kv_heads: int
    window: int | None = None
    """Tokens that each sees in layers that have one."""

    def __str__(self) -> str:
        """`12 rows of 128, 4 heads of 32, causal, packed, float32`."""
        asked = self.request
        shared = f" (keys of {self.kv_heads})" if self.kv_heads != self.heads else ""
        extras = {
            "packed": asked.packed_length is not None,
            f"window {self.window}": self.window is not None,
            f"soft cap {asked.softcap}": asked.softcap is not None,
            f"dropout {asked.dropout}": asked.dropout > 0,
            "bias": asked.bias,
        }
        parts = [
            f"{self.rows} rows of {asked.length:,}",
            f"{self.heads} heads of {asked.head_dim}{shared}",
            asked.kind,
            *(extra for extra, has in extras.items() if has),
            asked.dtype,
        ]
        return ", ".join(parts)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> "Problem":
        """The way back."""
        return cls(**plain | {"request": Request(**plain["request"])})
