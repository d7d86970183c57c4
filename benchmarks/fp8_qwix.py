"""Stack's products in 8 bits beside those of Qwix: how far off, and what each compiles to for an H200.

    uv run --with qwix==0.1.8 python benchmarks/fp8_qwix.py [--tokens N] [--width N] [--mlp N] [--target NAME]

A gated MLP (down(silu(gate(x)) * up(x))), bfloat16 with float32 weights, forward and backward. First on this
CPU, small, against the same in float32: norm of the difference over the norm, of the result and of the
gradients of the input and of each weight, of normal numbers and with a hundredth of the channels a hundred
times as large. Then at its size compiled for the target, which is not run: its matrix products, those in 8
bits, temporaries, and the bytes that all else reads and writes. Without Qwix only Stack's are told.
"""

import argparse
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from flax import nnx

from stack.config import MeshConfig
from stack.kernels.matmul import Fp8
from stack.kernels.matmul.fp8 import project
from stack.layers.parameter import parameter
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import ONE_DEVICE
from stack.planner.compiled.compile import devices

SMALL = 512, 256, 512
"""Tokens, width and MLP where numbers are compared."""
WEIGHTS = ("gate", "up", "down")
CUBLAS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
BYTES = {"f8e4m3fn": 1, "f8e5m2": 1, "pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}

Mlp = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]


def plain(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """In the dtype of `x`."""
    return gated(lambda name, x: x @ weights[name].astype(x.dtype), x)


def gated(product: Callable[[str, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The MLP, of products with weights by name."""
    return product("down", jax.nn.silu(product("gate", x)) * product("up", x))


def ours(how: Fp8) -> Mlp:
    """Stack's."""

    def product(weights: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
        kernel = parameter(weights[name], axes=("embed", "mlp"), role="float8")
        return project(x, kernel, ONE_DEVICE, ("batch", "length", "mlp"), contracted=1, how=how)

    return lambda x, weights: gated(lambda name, x: product(weights, name, x), x)


def qwix_mlp(width: int, mlp: int, **options: Any) -> Mlp:
    """Qwix's, of a Flax module."""
    import qwix  # pyrefly: ignore[missing-import]

    class Module(nnx.Module):
        def __init__(self) -> None:
            sizes = {"gate": (width, mlp), "up": (width, mlp), "down": (mlp, width)}
            for name, (inputs, outputs) in sizes.items():
                layer = nnx.Linear(
                    inputs,
                    outputs,
                    use_bias=False,
                    dtype=jnp.bfloat16,
                    rngs=nnx.Rngs(0),
                    param_dtype=jnp.float32,
                )
                setattr(self, name, layer)

        def __call__(self, x: jax.Array) -> jax.Array:
            return gated(lambda name, x: getattr(self, name)(x), x)

    e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
    rule = qwix.QtRule(weight_qtype=e4m3, act_qtype=e4m3, bwd_qtype=e5m2, **options)
    module = qwix.quantize_model(Module(), qwix.QtProvider([rule]), jnp.zeros((1, 8, width), jnp.bfloat16))
    graph, state = nnx.split(module)

    def run(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        flat = dict(nnx.to_flat_state(state))
        for name in WEIGHTS:
            flat[name, "kernel"] = flat[name, "kernel"].replace(weights[name])
        return nnx.merge(graph, nnx.from_flat_state(flat))(x)

    return run


def contestants(width: int, mlp: int) -> dict[str, Mlp]:
    """By name."""
    found = {
        "bfloat16": plain,
        "stack tensor": ours(Fp8()),
        "stack channel": ours(Fp8(blocks="channel")),
        "stack block": ours(Fp8(blocks="block", kernel="reference")),
    }
    try:
        import qwix  # noqa: F401 # pyrefly: ignore[missing-import]
    except ImportError:
        print("qwix is not installed: Stack's alone")
        return found
    found["qwix tensor"] = qwix_mlp(width, mlp, disable_channelwise_axes=True)
    found["qwix channel"] = qwix_mlp(width, mlp)
    found["qwix tiles of 128"] = qwix_mlp(width, mlp, tile_size=128, bwd_weight_grad_tile_size=128)
    return found


def all_of(run: Mlp) -> Callable[..., Any]:
    """The result and all gradients."""

    def both_ways(x: jax.Array, weights: dict[str, jax.Array], slope: jax.Array) -> Any:
        y, back = jax.vjp(run, x, weights)
        dx, changes = back(slope.astype(y.dtype))
        return {"result": y, "input": dx, **changes}

    return both_ways


def numbers(tokens: int, width: int, mlp: int, outliers: float) -> tuple[Any, ...]:
    """Input, weights and the gradient of the result, float32."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    x, slope = (jax.random.normal(next(keys), (2, tokens // 2, width)) for _ in range(2))
    x *= jnp.where(jax.random.uniform(next(keys), (width,)) < 0.01, outliers, 1)
    shapes = {"gate": (width, mlp), "up": (width, mlp), "down": (mlp, width)}
    weights = {
        name: jax.random.normal(next(keys), shape) / math.sqrt(shape[0]) for name, shape in shapes.items()
    }
    return x, weights, 1e-4 * slope


def errors() -> None:
    """Prints how far each is from float32."""
    for title, outliers in (("normal numbers", 1.0), ("with outliers", 100.0)):
        x, weights, slope = numbers(*SMALL, outliers)
        exact = jax.jit(all_of(plain))(x, weights, slope)
        print(f"\n{title:<20}" + "".join(f"{name:>9}" for name in exact))
        for name, run in contestants(*SMALL[1:]).items():
            found = jax.jit(all_of(run))(x.astype(jnp.bfloat16), weights, slope)
            off = (
                jnp.linalg.norm(found[key].astype(jnp.float32) - want) / jnp.linalg.norm(want)
                for key, want in exact.items()
            )
            print(f"{name:<20}" + "".join(f"{float(each):9.4f}" for each in off))


def compiled(tokens: int, width: int, mlp: int, target: str) -> None:
    """Prints what each compiles to."""
    mesh = meshes.build(MeshConfig(), devices(target, 1))
    place = jax.NamedSharding(mesh, jax.P())
    shapes = jax.eval_shape(lambda: numbers(tokens, width, mlp, 1.0))
    x, weights, slope = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    x = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place)
    print(f"\n{tokens:,} tokens, {width} -> {mlp}, for {target}")
    print(f"{'':<20}{'products':>40} {'temporaries':>12} {'other bytes':>12}")
    kernels = {"stack block": ours(Fp8(blocks="block", kernel="mosaic_gpu"))}
    with without_cache():
        for name, run in (contestants(width, mlp) | kernels).items():
            with meshes.use(mesh):
                lowered = jax.jit(all_of(run)).lower(x, weights, slope)
                program = lowered.compile(compiler_options=CUBLAS)
            memory, hlo = program.memory_analysis(), program.as_text() or ""
            products, moved = schedule(hlo)
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(products.items()))
            size = memory.temp_size_in_bytes / 2**20 if memory else math.nan
            print(f"{name:<20}{told:>40} {size:8.0f} MiB {moved / 2**30:8.2f} GiB", flush=True)


def schedule(hlo: str) -> tuple[Counter[str], int]:
    """Matrix products by kind, and the bytes that all other kernels read and write."""
    entry = hlo[hlo.index("\nENTRY ") :]
    sizes: dict[str, int] = {}
    products: Counter[str] = Counter()
    moved = 0
    for name, shape, operation, rest in instructions(entry):
        sizes[name] = array_bytes(shape)
        if operation in ("parameter", "bitcast", "get-tuple-element", "tuple", "constant"):
            continue
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        if target and ("matmul" in target[1] or "mosaic" in target[1]):
            products[target[1].removeprefix("__cublas$lt$")] += 1
            continue
        operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
        moved += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return products, moved


def instructions(entry: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, shape, operation and the rest of each."""
    line = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", re.MULTILINE)
    for match in line.finditer(entry):
        yield match[1], match[2], match[3], match[4]


def array_bytes(shape: str) -> int:
    """Of an array or a tuple of them."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14_336)
    parser.add_argument("--target", default="h200")
    options = parser.parse_args()
    errors()
    compiled(options.tokens, options.width, options.mlp, options.target)


if __name__ == "__main__":
    main()
