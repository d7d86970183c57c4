"""Which attention kernel runs, and why: a value that is printed and logged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from stack.config.errors import ConfigError
from stack.kernels.attention import cudnn, mosaic_gpu, tokamax, xla, xla_chunked
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.mask import Kind, Mask
from stack.kernels.attention.request import Request
from stack.kernels.attention.tiling import TILINGS, Tiled, Tiles, Tiling
from stack.kernels.measured import MeasuredAttention, fastest, measured
from stack.parallel.rules import Layout

LONG = 256
"""Keys of a row from which on scores that are stored matter, where nothing was measured: 256 KiB in float32
for every head, row and layer."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel of an operation and the reason it was taken."""

    kernel: str
    reason: str
    measured: bool = False
    """Whether it was, at such shapes on such a device."""
    tiles: Tiles | None = None
    """Those that were tuned; None: its own."""
    tiles_from: str = ""
    """What is told of them, once somebody has looked: `default tiles`, or where they were tuned."""

    def __str__(self) -> str:
        """`attention: xla_chunked (asked for); default tiles`."""
        tiles = f"; {self.tiles_from}" if self.tiles_from else ""
        return f"attention: {self.kernel} ({self.reason}){tiles}"

    @property
    def implementation(self) -> str | Tiled:
        """What `attend` is told."""
        return self.kernel if self.tiles is None else Tiled(self.kernel, self.tiles)

    @property
    def stores_scores(self) -> bool:
        """Whether scores of all queries and keys are written to memory."""
        return KERNELS[self.kernel].stores_scores


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
    stores_scores: bool = False
    """Whether scores of all queries and keys are written to memory."""
    own_code: bool = True
    """Whether it is more than array operations that XLA compiles: until it was measured, a run tries it."""
    tiling: Tiling | None = None
    """Of its blocks, where there are others to choose from; its `attend` then takes `tiles`."""
    installed: Callable[[], bool] = lambda: True
    """Whether the package that it is of is here; if not, that is among its obstacles."""


KERNELS: dict[str, Kernel] = {
    "cudnn": Kernel(attend=cudnn.attend, obstacles=cudnn.obstacles),
    "mosaic_gpu": Kernel(
        attend=mosaic_gpu.attend, obstacles=mosaic_gpu.obstacles, tiling=TILINGS["mosaic_gpu"]
    ),
    "tokamax": Kernel(attend=tokamax.attend, obstacles=tokamax.obstacles, installed=tokamax.installed),
    "xla_chunked": Kernel(
        attend=xla_chunked.attend,
        obstacles=xla_chunked.obstacles,
        own_code=False,
        tiling=TILINGS["xla_chunked"],
    ),
    "xla": Kernel(attend=xla.attend, obstacles=xla.obstacles, stores_scores=True, own_code=False),
}
"""THE list; those that were not measured are preferred in this order. The last two can do everything."""


def choose(request: Request, wanted: str = "auto") -> Choice:
    """The kernel for what is asked.

    `auto` takes, of those that can:

    1. the fastest that was measured on such a device at such shapes, if it is faster than `xla`;
    2. else, on a GPU or TPU, the first that stores no scores, measured or not; attention in blocks only
       where a row has `LONG` keys or more;
    3. else `xla`.

    Args:
      request: the attention of a model, on a platform.
      wanted: a kernel by name, or `auto`.

    Raises:
      ConfigError: the wanted kernel cannot; nothing falls back.
    """
    obstacles = {name: kernel.obstacles(request) for name, kernel in KERNELS.items()}
    if wanted != "auto":
        if obstacles[wanted]:
            able = " or ".join(name for name in KERNELS if not obstacles[name])
            raise ConfigError(
                f"kernels.attention={wanted} cannot run: {'; '.join(obstacles[wanted])};"
                f" set kernels.attention=auto, {able}"
            )
        return Choice(kernel=wanted, reason="asked for", measured=bool(fitting(request, wanted)))
    here = {name: texts for name, texts in obstacles.items() if KERNELS[name].installed()}
    cannot = [f"{_listed(names)} cannot: {text}" for text, names in _by_text(here).items()]
    able = [name for name, texts in obstacles.items() if not texts]
    if best := fastest(entry for name in able for entry in fitting(request, name)):
        kernel, reason = best
        return Choice(kernel=kernel, reason=reason, measured=True)
    stores_none = [name for name in able if not KERNELS[name].stores_scores]
    long = request.length is None or request.length >= LONG
    if request.platform != "cpu":
        for name in stores_none:
            if name != "xla_chunked" or long:
                reason = "not measured at such shapes on such a device, but xla would store all scores"
                return Choice(kernel=name, reason="; ".join([reason, *cannot]))
    plain = "nothing was measured to be faster" if request.platform == "cpu" or long else "its rows are short"
    return Choice(kernel="xla", reason="; ".join([plain, *cannot]))


def _by_text(obstacles: dict[str, list[str]]) -> dict[str, list[str]]:
    """Kernels by what keeps them from running, those that can left out."""
    found: dict[str, list[str]] = {}
    for name, texts in obstacles.items():
        if texts:
            found.setdefault("; ".join(texts), []).append(name)
    return found


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def fitting(request: Request, name: str) -> list[MeasuredAttention]:
    """What was measured of a kernel on such a device at such shapes."""
    device = request.platform if request.compute_capability is None else f"{request.compute_capability:.1f}"
    if request.platform == "gpu" and request.compute_capability is None:
        device = "9.0"  # What is planned without a chip is planned for a new one.
    extras = {
        "window": request.window,
        "softcap": request.softcap is not None,
        "dropout": request.dropout > 0,
        "bias": request.bias,
        "cross": request.cross,
    }
    used = {extra for extra, has in extras.items() if has}
    return [
        entry
        for entry in measured().attention
        if entry.implementation == name
        and entry.device_class == device
        and request.dtype in entry.dtypes
        and entry.head_dims[0] <= request.head_dim <= entry.head_dims[1]
        and ("whole" if request.packed_length is None else "packed") in entry.rows
        and request.kind in entry.kinds
        and used <= set(entry.extras)
        and (request.length is None or request.length >= entry.length_from)
    ]


__all__ = ["KERNELS", "Choice", "Kernel", "Kind", "Request", "choose", "fitting"]
