"""What the devices of a machine do, measured: products, memory, attention, starting kernels, collectives.

All devices of the process work at once, as in training: virtual devices share their cores, real ones
their power. Data is random, for GPUs multiply zeros faster. Each time is the median of several, of as
many repetitions in one program as make starting it negligible.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stack.hardware.chip import Precision, lookup

Kind = Literal["all-gather", "all-reduce"]
_AXIS = "device"
_REPEATS = 5
_OPERATIONS = 64
"""Tiny products in a row, whose time per product is that of starting one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured, and how long."""

    rows: int
    """Of the left operand of a product: the tokens of a micro-batch."""
    weights: tuple[tuple[int, int], ...]
    """Shapes [k, n] of the right operand."""
    stream_bytes: int
    """Of an array on one device, several times larger than its cache."""
    attention: tuple[int, int, int]
    """Length, heads and head width."""
    collective_bytes: tuple[int, ...]
    """Of the whole array of a collective, on every device."""
    unroll: int
    """Repetitions between two looks of the host at their count."""
    seconds: float
    """Least time of what is timed as one."""


ACCELERATOR = Sizes(
    rows=8192,
    weights=((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 14336), (8192, 8192)),
    stream_bytes=2**29,
    attention=(4096, 16, 128),
    collective_bytes=(2**18, 2**20, 2**22, 2**24, 2**26, 2**28),
    unroll=16,
    seconds=0.05,
)
PROCESSOR = Sizes(
    rows=512,
    weights=((128, 128), (256, 256), (512, 512), (512, 2048), (1024, 1024)),
    stream_bytes=2**26,
    attention=(512, 4, 64),
    collective_bytes=(2**16, 2**18, 2**20, 2**22),
    unroll=1,
    seconds=0.05,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product [rows, inner] x [inner, columns]."""

    precision: Precision
    rows: int
    inner: int
    columns: int
    seconds: float

    @property
    def flops(self) -> int:
        """A multiplication and an addition are two."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def rate(self) -> float:
        """FLOP/s of one device."""
        return self.flops / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A collective over all devices."""

    kind: Kind
    bytes: int
    """Of its result on one device."""
    members: int
    seconds: float

    @property
    def rounds(self) -> int:
        """Times the data goes round a ring: to be summed, and to be handed out."""
        return 2 if self.kind == "all-reduce" else 1

    @property
    def traffic(self) -> float:
        """Bytes each device sends."""
        return self.rounds * self.bytes * (self.members - 1) / self.members

    @property
    def hops(self) -> int:
        """Messages each device sends."""
        return self.rounds * (self.members - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention, forward, of one row."""

    precision: Precision
    length: int
    heads: int
    width: int
    fused: bool
    """The scores are never written to memory."""
    seconds: float

    @property
    def flops(self) -> float:
        """Of its two products; the masked half of the scores is not counted."""
        return 2 * self.heads * self.length**2 * self.width

    @property
    def rate(self) -> float:
        """FLOP/s of one device."""
        return self.flops / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one device does while all others do the same."""

    device_kind: str
    platform: str
    compute_capability: float | None
    """Of an NVIDIA GPU."""
    devices: int
    memory_bytes: float
    products: tuple[Product, ...]
    memory_bandwidth: float
    """Bytes per second read and written by y = x + y / 2."""
    attention: Attention
    launch_seconds: float
    transfers: tuple[Transfer, ...]
    """None with one device."""

    @property
    def title(self) -> str:
        """`8 x NVIDIA H200`."""
        return f"{self.devices} x {self.device_kind}"


def measure(devices: Sequence[jax.Device] | None = None, sizes: Sizes | None = None) -> Measurement:
    """Measures the devices of this process, all at once.

    Args:
      devices: of one kind; None: all of this process.
      sizes: what is measured; None: what suits the platform.
    """
    devices = jax.local_devices() if devices is None else devices
    first = devices[0]
    sizes = sizes or (PROCESSOR if first.platform == "cpu" else ACCELERATOR)
    mesh = Mesh(np.array(devices), (_AXIS,))
    precisions = _precisions(first)
    return Measurement(
        device_kind=first.device_kind,
        platform=first.platform,
        compute_capability=_compute_capability(first),
        devices=len(devices),
        memory_bytes=_memory_bytes(first, len(devices)),
        products=tuple(
            _product(mesh, precision, sizes, inner, columns)
            for precision in precisions
            for inner, columns in sizes.weights
        ),
        memory_bandwidth=_memory_bandwidth(mesh, sizes),
        attention=_attention(mesh, precisions[0], sizes),
        launch_seconds=_launch_seconds(mesh, sizes),
        transfers=tuple(
            _transfer(mesh, sizes, kind, size)
            for kind in get_args(Kind)
            for size in sizes.collective_bytes
            if len(devices) > 1
        ),
    )


def _precisions(device: jax.Device) -> tuple[Precision, ...]:
    """What the device multiplies in, that of training first."""
    chip = lookup(device.device_kind)
    if chip is None:
        return "bfloat16", "float32"
    half: Precision = "bfloat16" if "bfloat16" in chip.peak_flops else "float16"
    # XLA multiplies float32 in TensorFloat-32 where a chip has it.
    whole: Precision = "tensorfloat32" if "tensorfloat32" in chip.peak_flops else "float32"
    return (half, whole) if whole in chip.peak_flops else (half,)


def _memory_bytes(device: jax.Device, devices: int) -> float:
    """What the device may use; the machine's own memory is shared by them all."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices)


def _dtype(precision: Precision) -> Any:
    return jnp.dtype({"tensorfloat32": "float32"}.get(precision, precision))


def _product(mesh: Mesh, precision: Precision, sizes: Sizes, inner: int, columns: int) -> Product:
    """Two products in turn, with a weight and with one of its transposed shape, so that a loop goes on."""

    def both(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return x @ up @ down

    dtype = _dtype(precision)
    x = _random(mesh, (sizes.rows, inner), dtype)
    up = _random(mesh, (inner, columns), dtype, scale=inner**-0.5)
    down = _random(mesh, (columns, inner), dtype, scale=columns**-0.5)
    seconds = _seconds(mesh, sizes, both, x, up, down) / 2
    return Product(precision=precision, rows=sizes.rows, inner=inner, columns=columns, seconds=seconds)


def _memory_bandwidth(mesh: Mesh, sizes: Sizes) -> float:
    x, y = (_random(mesh, (sizes.stream_bytes // 4,), jnp.float32) for _ in range(2))
    return 3 * sizes.stream_bytes / _seconds(mesh, sizes, lambda y, x: x + y / 2, y, x)


def _attention(mesh: Mesh, precision: Precision, sizes: Sizes) -> Attention:
    length, heads, width = sizes.attention
    fused = (_compute_capability(mesh.devices.flat[0]) or 0) >= 8.0  # JAX calls cuDNN's from there on.
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn" if fused else "xla")
    operands = [_random(mesh, (1, length, heads, width), _dtype(precision)) for _ in range(3)]
    return Attention(
        precision=precision,
        length=length,
        heads=heads,
        width=width,
        fused=fused,
        seconds=_seconds(mesh, sizes, attend, *operands),
    )


def _compute_capability(device: jax.Device) -> float | None:
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are like "gfx942"
    return float(capability) if capability.replace(".", "", 1).isdigit() else None


def _launch_seconds(mesh: Mesh, sizes: Sizes) -> float:
    def chain(x: jax.Array, weight: jax.Array) -> jax.Array:
        for _ in range(_OPERATIONS):
            x = x @ weight
        return x

    x, weight = (_random(mesh, (16, 16), jnp.float32, scale=0.25) for _ in range(2))
    return _seconds(mesh, sizes, chain, x, weight) / _OPERATIONS


def _transfer(mesh: Mesh, sizes: Sizes, kind: Kind, size: int) -> Transfer:
    members = mesh.devices.size
    part = size // 4 // members

    def gather(whole: jax.Array) -> jax.Array:
        # Another place's part, or the compiler sees that nothing changes.
        start = (jax.lax.axis_index(_AXIS) + 1) % members * part
        return jax.lax.all_gather(jax.lax.dynamic_slice(whole, (start,), (part,)), _AXIS, tiled=True)

    collective = gather if kind == "all-gather" else partial(jax.lax.psum, axis_name=_AXIS)
    # Whole numbers: however often they are summed, they stay numbers.
    whole = _random(mesh, (part * members,), jnp.uint32)
    seconds = _seconds(mesh, sizes, collective, whole)
    return Transfer(kind=kind, bytes=part * members * 4, members=members, seconds=seconds)


def _random(mesh: Mesh, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """An array of this shape on each device, one after the other along the first axis."""

    def draw(key: jax.Array) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.unsignedinteger):
            return jax.random.bits(key, whole, dtype)
        return (jax.random.normal(key, whole, jnp.float32) * scale).astype(dtype)

    whole = (shape[0] * mesh.devices.size, *shape[1:])
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return jax.jit(draw, out_shardings=sharding)(jax.random.key(math.prod(whole)))


def repeated(mesh: Mesh, step: Callable[..., jax.Array], unroll: int) -> Callable[..., jax.Array]:
    """The program `(times, carry, *others) -> carry` that does `carry = step(carry, *others)` over.

    It does so times x unroll times on each device: the host looks at a count that it is told, which
    takes as long as a small kernel, and not at one the compiler knows.
    """

    def loop(times: jax.Array, carry: jax.Array, *others: jax.Array) -> jax.Array:
        def once(_: jax.Array, carry: jax.Array) -> jax.Array:
            return step(carry, *others)

        def several(_: jax.Array, carry: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, unroll, once, carry) if unroll > 1 else once(_, carry)

        return jax.lax.fori_loop(0, times, several, carry)

    def program(times: jax.Array, *arrays: jax.Array) -> jax.Array:
        split = PartitionSpec(_AXIS)
        specs = (PartitionSpec(), *[split] * len(arrays))
        return jax.shard_map(loop, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(
            times, *arrays
        )

    return jax.jit(program)


def _seconds(mesh: Mesh, sizes: Sizes, step: Callable[..., jax.Array], *arrays: jax.Array) -> float:
    """Seconds of one step on each device, without those of starting a program."""
    program = repeated(mesh, step, sizes.unroll)

    def timed(times: int) -> float:
        start = time.perf_counter()
        program(times, *arrays).block_until_ready()
        return time.perf_counter() - start

    timed(1)  # Compiles it.
    times = 1
    while timed(times) < sizes.seconds and times < 2**20:
        times *= 2
    empty = statistics.median(timed(0) for _ in range(_REPEATS))
    full = statistics.median(timed(times) for _ in range(_REPEATS))
    return max(full - empty, 1e-9) / (times * sizes.unroll)
