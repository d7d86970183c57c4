"""Which attention kernel runs, and why: a value that is printed and logged."""

from dataclasses import dataclass

from stack.config import ConfigError, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel of an operation and the reason it was taken."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        """`attention: xla (no NVIDIA GPU)`."""
        return f"attention: {self.kernel} ({self.reason})"


def choose(
    model: ModelConfig,
    *,
    platform: str,
    compute_capability: float | None = None,
    packed_length: int | None = None,
) -> Choice:
    """The kernel for a model on a platform.

    Args:
      model: the model.
      platform: `cpu`, `gpu`, `rocm` or `tpu`.
      compute_capability: of the GPU, e.g. 9.0; None: not known, taken as new enough.
      packed_length: tokens of a row that documents share; None: each has rows of its own.

    Raises:
      ConfigError: `attention: cudnn` was asked for and cannot be honoured; nothing falls back.
    """
    obstacles = cudnn_obstacles(model, platform, compute_capability, packed_length)
    if model.attention == "xla":
        return Choice(kernel="xla", reason="asked for")
    if model.attention == "cudnn":
        if obstacles:
            raise ConfigError(
                f"model.attention=cudnn cannot run: {'; '.join(obstacles)}; set model.attention=xla"
            )
        return Choice(kernel="cudnn", reason="asked for")
    if obstacles:
        return Choice(kernel="xla", reason="cudnn cannot: " + "; ".join(obstacles))
    return Choice(kernel="cudnn", reason="honours the whole config")


def cudnn_obstacles(
    model: ModelConfig, platform: str, compute_capability: float | None, packed_length: int | None
) -> list[str]:
    """Everything that keeps cuDNN from computing this model's attention."""
    largest = 256 if compute_capability is None or compute_capability >= 9.0 else 128
    checks = (
        (platform != "gpu", f"the platform is {platform}, not an NVIDIA GPU"),
        (
            compute_capability is not None and compute_capability < 8.0,
            f"compute capability {compute_capability} < 8.0",
        ),
        (model.dtype != "bfloat16", f"dtype is {model.dtype}, not bfloat16"),
        (model.head_width % 8 != 0, f"head width {model.head_width} is not a multiple of 8"),
        (model.head_width > largest, f"head width {model.head_width} is over {largest}"),
        (model.attention_dropout > 0, "it has no attention dropout"),
        (model.attention_softcap is not None, "it has no soft cap"),
        (
            packed_length is not None and packed_length % 2 == 1,
            f"packed rows of {packed_length} tokens, an odd number",
        ),
    )
    return [text for failed, text in checks if failed]
