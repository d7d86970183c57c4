"""What a config asks of the operations that have several implementations."""

from typing import Any

from stack.config import Config
from stack.kernels import matmul
from stack.kernels.attention import Choice, Request, choose
from stack.objectives import build


def platform_of(device: Any) -> tuple[str, float | None]:
    """`cpu`, `gpu` (NVIDIA's), `rocm` or `tpu`, and the compute capability of an NVIDIA GPU.

    Args:
      device: a `jax.Device`, or a description of one that is not here.
    """
    capability = getattr(device, "compute_capability", None)  # "9.0"; AMD's are like "gfx942"
    if capability and capability.startswith("gfx"):
        return "rocm", None
    return device.platform, float(capability) if capability else None


def attention_request(config: Config, *, platform: str, compute_capability: float | None = None) -> Request:
    """The attention of a config's model on a platform.

    Args:
      config: what is trained.
      platform: `cpu`, `gpu`, `rocm` or `tpu`.
      compute_capability: of an NVIDIA GPU, e.g. 9.0; None: not known, taken as that of a new one.
    """
    model, data = config.model, config.data
    objective = build(config)
    plain = "full" if model.shape == "encoder" else "causal"
    return Request(
        platform=platform,
        compute_capability=compute_capability,
        length=max(size for name, size in objective.sizes.items() if name != "masked"),
        dtype=model.dtype,
        head_dim=model.head_width,
        kind="prefix" if any(field.name == "prefix" for field in objective.fields) else plain,
        window=model.window is not None,
        packed_length=data.sequence_length if data.packed else None,
        dropout=model.attention_dropout,
        softcap=model.attention_softcap,
        bias=model.position == "relative",
        cross=model.shape == "encoder_decoder",
    )


def choose_attention(config: Config, *, platform: str, compute_capability: float | None = None) -> Choice:
    """The attention kernel of a config on a platform, and why; see `attention_request`.

    Raises:
      ConfigError: a kernel was asked for that cannot run; nothing falls back.
    """
    request = attention_request(config, platform=platform, compute_capability=compute_capability)
    return choose(request, config.kernels.attention)


def choose_matmul(config: Config, *, platform: str, compute_capability: float | None = None) -> matmul.Choice:
    """How the products of a config's layers are computed on a platform; see `attention_request`.

    Raises:
      ConfigError: 8 bits were asked for where a device has none; nothing falls back.
    """
    asked = config.kernels
    return matmul.choose(
        asked.matmul,
        platform=platform,
        compute_capability=compute_capability,
        dtype=config.model.dtype,
        scaling=asked.fp8.scaling,
        blocks=asked.fp8.blocks,
    )
