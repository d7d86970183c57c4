"""Which attention kernel runs, and why: a value that is printed and logged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from stack.config.errors import ConfigError
from stack.kernels.attention import cudnn, mosaic_gpu, xla, xla_chunked
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.mask import Kind, Mask
from stack.kernels.attention.request import Request
from stack.parallel.rules import Layout


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel of an operation and the reason it was taken."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        """`attention: xla (no NVIDIA GPU)`."""
        return f"attention: {self.kernel} ({self.reason})"


@runtime_checkable
class Attend(Protocol):
    """An implementation; see `stack.kernels.attention.attend` for what it computes."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Mask,
        layout: Layout,
        /,
        *,
        bias: jax.Array | None,
        scale: float | None,
        softcap: float | None,
        dropout: Dropout | None,
    ) -> jax.Array:
        """[batch, queries, heads, head_dim], in the dtype of `query`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An implementation and what it can honour."""

    attend: Attend
    obstacles: Callable[[Request], list[str]]
    """Everything that keeps it from computing what is asked; empty: it can."""


KERNELS: dict[str, Kernel] = {
    "cudnn": Kernel(attend=cudnn.attend, obstacles=cudnn.obstacles),
    "mosaic_gpu": Kernel(attend=mosaic_gpu.attend, obstacles=mosaic_gpu.obstacles),
    "xla": Kernel(attend=xla.attend, obstacles=xla.obstacles),
    "xla_chunked": Kernel(attend=xla_chunked.attend, obstacles=xla_chunked.obstacles),
}
"""THE list, the fastest first; the last can do everything."""


def choose(request: Request, wanted: str = "auto") -> Choice:
    """The kernel for what is asked.

    Args:
      request: the attention of a model, on a platform.
      wanted: a kernel by name, or `auto`: the first that can.

    Raises:
      ConfigError: the wanted kernel cannot; nothing falls back.
    """
    if wanted != "auto":
        if obstacles := KERNELS[wanted].obstacles(request):
            raise ConfigError(
                f"model.attention={wanted} cannot run: {'; '.join(obstacles)}; set model.attention=xla"
            )
        return Choice(kernel=wanted, reason="asked for")
    reasons = []
    for name, kernel in KERNELS.items():
        obstacles = kernel.obstacles(request)
        if not obstacles:
            return Choice(kernel=name, reason="; ".join(reasons) or "honours the whole config")
        reasons.append(f"{name} cannot: " + "; ".join(obstacles))
    raise AssertionError("xla can do everything")


__all__ = ["KERNELS", "Choice", "Kernel", "Kind", "Request", "choose"]
