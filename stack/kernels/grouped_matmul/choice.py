"""Which implementation runs, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from stack.config.errors import ConfigError
from stack.kernels.grouped_matmul import mosaic_gpu, xla, xla_chunked
from stack.kernels.grouped_matmul.request import Request
from stack.kernels.measured import MeasuredGroups, fastest, measured


@runtime_checkable
class Multiply(Protocol):
    """The product of one device's tokens, each with the weight of its group."""

    def __call__(
        self, tokens: jax.Array, weights: jax.Array, sizes: jax.Array, /, *, transposed: bool = False
    ) -> jax.Array:
        """[tokens, outputs] in the dtype of `tokens`, summed in float32 at the least.

        Args:
          tokens: [tokens, inputs], those of a group together.
          weights: [groups, inputs, outputs]; transposed, [groups, outputs, inputs].
          sizes: [groups] int32. Tokens beyond their sum get zeros.
          transposed: whether the weights' last axis is what is summed over.
        """
        ...


@runtime_checkable
class WeightGradient(Protocol):
    """The gradient of one device's weights."""

    def __call__(self, tokens: jax.Array, cotangent: jax.Array, sizes: jax.Array, /) -> jax.Array:
        """[groups, inputs, outputs] in the dtype of `tokens`, summed in float32 at the least.

        Args:
          tokens: [tokens, inputs], those of a group together.
          cotangent: [tokens, outputs], of the result.
          sizes: [groups] int32. Tokens beyond their sum count for nothing; a group without any gets zeros.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An implementation and what it can honour."""

    multiply: Multiply
    weight_gradient: WeightGradient
    obstacles: Callable[[Request], list[str]]
    """Everything that keeps it from computing what is asked; empty: it can."""
    copies_tokens: bool = False
    """Whether tokens are laid out once for each group."""


KERNELS: dict[str, Kernel] = {
    "mosaic_gpu": Kernel(
        multiply=mosaic_gpu.multiply,
        weight_gradient=mosaic_gpu.weight_gradient,
        obstacles=mosaic_gpu.obstacles,
    ),
    "xla_chunked": Kernel(
        multiply=xla_chunked.multiply,
        weight_gradient=xla_chunked.weight_gradient,
        obstacles=xla_chunked.obstacles,
    ),
    "xla": Kernel(
        multiply=xla.multiply,
        weight_gradient=xla.weight_gradient,
        obstacles=xla.obstacles,
        copies_tokens=True,
    ),
}
"""THE list. The last two can do everything."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation and the reason it was taken."""

    kernel: str
    reason: str
    measured: bool = False
    """Whether it was, at such shapes on such a device."""

    def __str__(self) -> str:
        """`grouped_matmul: xla (asked for)`."""
        return f"grouped_matmul: {self.kernel} ({self.reason})"


def choose(request: Request, wanted: str = "auto") -> Choice:
    """The implementation for what is asked.

    `auto` takes, of those that can, the fastest that was measured on such a device at such shapes, if it is
    faster than `xla`; else `xla_chunked`, which stores nothing beside operands and results.

    Args:
      request: shapes, dtype and device.
      wanted: a name in `KERNELS`, or `auto`.

    Raises:
      ConfigError: there is no such implementation, or it cannot; nothing falls back.
    """
    if wanted != "auto" and wanted not in KERNELS:
        raise ConfigError(f"grouped_matmul: {wanted!r} is unknown; take {_join(['auto', *KERNELS])}")
    obstacles = {name: kernel.obstacles(request) for name, kernel in KERNELS.items()}
    if wanted != "auto":
        if obstacles[wanted]:
            able = _join(["auto", *(name for name in KERNELS if not obstacles[name])])
            why = "; ".join(obstacles[wanted])
            raise ConfigError(f"grouped_matmul: implementation={wanted} cannot run: {why}; take {able}")
        return Choice(kernel=wanted, reason="asked for", measured=bool(fitting(request, wanted)))
    cannot = [f"{name} cannot: {'; '.join(texts)}" for name, texts in obstacles.items() if texts]
    able = [name for name, texts in obstacles.items() if not texts]
    if best := fastest(entry for name in able for entry in fitting(request, name)):
        kernel, reason = best
        return Choice(kernel=kernel, reason=reason, measured=True)
    plain = "nothing was measured at such shapes on such a device; xla would copy tokens for each group"
    return Choice(kernel="xla_chunked", reason="; ".join([plain, *cannot]))


def _join(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def fitting(request: Request, name: str) -> list[MeasuredGroups]:
    """What was measured of an implementation on such a device at such shapes."""
    device = request.platform if request.compute_capability is None else f"{request.compute_capability:.1f}"
    return [
        entry
        for entry in measured().grouped_matmul
        if entry.implementation == name
        and entry.device_class == device
        and request.dtype in entry.dtypes
        and request.groups >= entry.groups_from
        and request.tokens >= entry.tokens_from
        and entry.widths[0] <= min(request.inputs, request.outputs)
        and max(request.inputs, request.outputs) <= entry.widths[1]
    ]
