"""Attentions to compare implementations on: what is asked, arrays for it, and what the definition answers."""

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.kernels.attention import KERNELS, Dropout, Kind, Mask, Request, Tiled, attend, reference, tokamax
from stack.parallel.rules import ONE_DEVICE

Rows = Literal["whole", "padded", "packed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention."""

    dtype: str = "float32"
    batch: int = 2
    length: int = 19
    """Of queries."""
    keys: int | None = None
    """Of another row that is attended to; None: the same."""
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    kind: Kind = "causal"
    rows: Rows = "whole"
    window: int | None = None
    local: bool | None = None
    """Told when it runs whether the window holds."""
    softcap: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    bias: tuple[bool, bool, bool] | None = None
    """Whether it has each of batch, heads and queries."""
    seed: int = 0

    def __str__(self) -> str:
        """What is not usual of it."""
        usual = Case()
        names = [field.name for field in dataclasses.fields(self)]
        return " ".join(
            f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(usual, name)
        )

    def request(self) -> Request:
        """The same, as it is asked of an implementation on an H100."""
        return Request(
            platform="gpu",
            compute_capability=9.0,
            dtype=self.dtype,
            head_dim=self.head_dim,
            kind=self.kind,
            packed_length=self.length if self.rows == "packed" else None,
            dropout=self.dropout,
            softcap=self.softcap,
            bias=self.bias is not None,
            cross=self.keys is not None,
        )

    def mask(self) -> Mask:
        """Documents, positions and prefixes of a row are drawn; padding comes last."""
        queries, keys = self.length, self.keys or self.length
        query = _documents(self, queries, seed=1)
        key = query if self.keys is None else _documents(self, keys, seed=1)
        packed = self.rows == "packed"
        lengths = jnp.asarray([keys - 5 * row - 1 for row in range(self.batch)], jnp.int32)
        prefix = (key[1] < 4) & (key[0] > 0) if packed else key[1] < 6
        return Mask(
            kind=self.kind,
            window=self.window,
            local=None if self.local is None else jnp.asarray(self.local),
            query_positions=query[1],
            key_positions=key[1],
            query_segments=query[0] if packed else None,
            key_segments=key[0] if packed else None,
            lengths=lengths if self.rows == "padded" else None,
            prefix=prefix if self.kind == "prefix" else None,
        )

    def arrays(self) -> dict[str, jax.Array]:
        """Query, key, value, and the bias if there is one: what has a gradient."""
        draw = np.random.default_rng(self.seed).normal
        keys = self.keys or self.length

        def array(*shape: int) -> jax.Array:
            return jnp.asarray(draw(0, 1.3, shape), self.dtype)

        found = {
            "query": array(self.batch, self.length, self.heads, self.head_dim),
            "key": array(self.batch, keys, self.kv_heads, self.head_dim),
            "value": array(self.batch, keys, self.kv_heads, self.head_dim),
        }
        if self.bias is not None:
            sizes = (self.batch, self.heads, self.length)
            shape = [size if has else 1 for size, has in zip(sizes, self.bias, strict=True)]
            found["bias"] = array(*shape, keys).astype(jnp.float32)
        return found

    def options(self) -> dict[str, Any]:
        """What else `attend` is told."""
        dropout = None
        if self.dropout:
            words = np.random.default_rng(7).integers(
                0, 2**32, (self.batch, self.heads, self.length, 2), np.uint32
            )
            dropout = Dropout(rate=self.dropout, rows=jnp.asarray(words))
        return {"softcap": self.softcap, "scale": self.scale, "dropout": dropout}

    def read(self) -> jax.Array:
        """[batch, queries] bool: those that see a key and are no padding."""
        mask = self.mask()
        sees = mask.allowed().any(-1)
        if mask.lengths is None or self.keys is not None:
            return sees
        return sees & (jnp.arange(self.length) < mask.lengths[:, None])

    def expected(self, *, of: jax.Array | None = None) -> dict[str, np.ndarray]:
        """By the definition: the output, of the queries named or of all, and the gradients for `slope`."""

        def attention(arrays: dict[str, Any], mask: Mask, dropout: Dropout | None) -> jax.Array:
            return reference.attend(**arrays, mask=mask, **(self.options() | {"dropout": dropout}))

        return self._both_ways(attention, of)

    def actual(self, kernel: str | Tiled, *, of: jax.Array | None = None) -> dict[str, np.ndarray]:
        """The same by an implementation; shapes and dtypes are looked at too."""

        def attention(arrays: dict[str, Any], mask: Mask, dropout: Dropout | None) -> jax.Array:
            options = self.options() | {"dropout": dropout}
            output = attend(mask=mask, layout=ONE_DEVICE, kernel=kernel, **arrays, **options)
            assert (output.shape, output.dtype) == (arrays["query"].shape, jnp.dtype(self.dtype))
            return output.astype(jnp.float32)

        return self._both_ways(attention, of)

    def _both_ways(self, attention: Any, of: jax.Array | None) -> dict[str, np.ndarray]:
        arrays = self.arrays()
        slope = jnp.asarray(np.random.default_rng(11).normal(size=arrays["query"].shape), self.dtype)

        @jax.jit
        def run(arrays: dict[str, jax.Array], mask: Mask, dropout: Dropout | None) -> Any:
            read = 1 if of is None else of[..., None, None]
            output, back = jax.vjp(lambda arrays: attention(arrays, mask, dropout) * read, arrays)
            (gradients,) = back(slope.astype(output.dtype))
            return {"output": output} | gradients

        found = run(arrays, self.mask(), self.options()["dropout"])
        for name, array in arrays.items():
            assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        return {name: np.asarray(array, np.float64) for name, array in found.items()}


def _documents(case: Case, length: int, *, seed: int) -> tuple[jax.Array, jax.Array]:
    """Segments and positions, [batch, length] int32 each."""
    segments = np.ones((case.batch, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (case.batch, 1))
    if case.rows == "packed":
        random = np.random.default_rng(seed)
        for row in range(case.batch):
            # Each row has documents of its own; the last words are padding, of the second row many.
            ends = np.sort(random.choice(np.arange(1, length), 3, replace=False))
            segments[row] = 1 + np.searchsorted(ends, np.arange(length), side="right")
            segments[row, length - 1 - 4 * row :] = 0
            begins = np.concatenate([[0], ends, [length - 1 - 4 * row]])
            starts = begins[np.where(segments[row] > 0, segments[row] - 1, 4)]
            positions[row] = np.arange(length) - starts
    return jnp.asarray(segments), jnp.asarray(positions)


@contextmanager
def plain_tokamax() -> Iterator[None]:
    """Tokamax answers the same call in plain operations, on a CPU too; masks and scales are its own."""
    from tokamax._src.ops.attention.base import DotProductAttention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokamax, "operation", DotProductAttention)
        yield


def runs(case: Case, kernel: str) -> bool:
    """Whether an implementation says that it can."""
    return not KERNELS[kernel].obstacles(case.request())


EVERY_DAY = (
    Case(),
    Case(rows="packed", softcap=2.0, dropout=0.3),
    Case(rows="packed", kind="prefix", dtype="bfloat16", window=5),
    Case(rows="padded", kind="full", window=4, kv_heads=2, bias=(True, True, True)),
    Case(rows="padded", kind="full", keys=13, head_dim=80, bias=(False, True, True)),
    Case(dtype="bfloat16", head_dim=152, kv_heads=2, dropout=0.2, softcap=3.0),
    Case(rows="packed", window=6, local=False, scale=0.3, heads=3),
)
"""Something of everything."""


def others() -> list[Case]:
    """Head widths and groups of heads; then each kind of mask with each kind of row and what goes with it."""
    random = np.random.default_rng(0)
    kinds: tuple[Kind, ...] = ("causal", "full", "prefix")
    every_row: tuple[Rows, ...] = ("whole", "padded", "packed")
    widths = [
        Case(head_dim=width, dtype=dtype, rows=every_row[number % 3], heads=4, kv_heads=(1, 2, 4)[number % 3])
        for number, width in enumerate((64, 80, 96, 128, 152, 256))
        for dtype in ("float32", "bfloat16")
    ]
    masks = [
        Case(
            kind=kind,
            rows=rows,
            window=window,
            local=None if window is None else (None, True, False)[random.integers(3)],
            length=int(random.integers(9, 40)),
            dtype=("float32", "bfloat16")[random.integers(2)],
            softcap=(None, 1.5)[random.integers(2)],
            dropout=(0.0, 0.25)[random.integers(2)],
            bias=(None, None, (False, True, True), (True, False, False))[random.integers(4)],
        )
        for kind, rows, window in itertools.product(kinds, every_row, (None, 2, 7))
    ]
    cross = [Case(kind="full", rows="padded", keys=keys, dropout=0.1) for keys in (7, 16, 33)]
    return [*widths, *masks, *cross]
