"""Matrix products of real models, and a copy: the device at its best, which all else is held against."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stack.bench import data
from stack.bench.case import Case, Machine
from stack.bench.models import MODELS
from stack.bench.serve import Ready
from stack.bench.timing import queued
from stack.hardware.chip import lookup
from stack.kernels.matmul import Blocks, obstacles
from stack.kernels.matmul.blocks import FORMS, MULTIPLY, quantize_blocks
from stack.kernels.matmul.choice import KERNELS as KERNELS_OF_BLOCKS
from stack.kernels.matmul.float8 import Scaled
from stack.planner.formula.time import product_seconds

Product = tuple[str, tuple[int, int, int], str]
"""A label, [rows, inner, columns] and the precision."""

_TOKENS = 16_384
_COPY_BYTES = {"cpu": 2**26}
_CHECKED = 256
"""Rows that are compared with the product in float32."""
_LARGE = ((8192, 8192, 8192), (16_384, 4096, 14_336))
"""[rows, inner, columns] that large devices multiply fastest."""
_LARGE_ON_CPU = ((1024, 1024, 1024), (768, 128, 512))
_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float8": jnp.float8_e4m3fn}


def ceilings(machine: Machine, *, tiny: bool) -> Case:
    """What every run measures first."""
    large = ((64, 64, 64),) if tiny else _LARGE_ON_CPU if machine.is_cpu else _LARGE
    size = 2**16 if tiny else _COPY_BYTES.get(machine.platform, 2**30)
    products = [("", shape, precision) for precision in precisions(machine) for shape in large]
    return _case("ceilings", "products and a copy", products, priority=0, copy_bytes=size)


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """The products of a layer and of the head, in what the device trains in."""
    if tiny:
        return [_case("matmul", "tiny", [("", (64, 32, 64), precisions(machine)[0])], priority=40)]
    names = ("quickstart", "gpt2_124m") if machine.is_cpu else ("gpt2_1_5b", "llama3_8b", "llama3_3b")
    tokens = 768 if machine.is_cpu else _TOKENS
    return [
        _case(
            "matmul",
            f"{name}, {tokens:,} tokens",
            [
                (part, shape, precision)
                for precision in precisions(machine)
                for part, shape in _shapes(MODELS[name], tokens).items()
            ],
            priority=40 + place,
        )
        for place, name in enumerate(names)
    ]


def _shapes(model: dict[str, Any], tokens: int) -> dict[str, tuple[int, int, int]]:
    width, heads = model["embed_dim"], model["num_heads"]
    kv_width = width // heads * model.get("num_kv_heads", heads)
    mlp = model.get("mlp_dim", 4 * width)
    words = -(-model["vocab_size"] // 128) * 128
    return {
        "query, key and value": (tokens, width, width + 2 * kv_width),
        "up": (tokens, width, mlp),
        "down": (tokens, mlp, width),
        "head": (tokens // 4, width, words),
    }


def precisions(machine: Machine) -> tuple[str, ...]:
    """What the device multiplies in and models are trained in."""
    if machine.is_cpu:
        return "float32", "bfloat16"
    chip = lookup(machine.device_kind)
    has_float8 = "float8" in chip.peak_flops if chip else (machine.compute_capability or 0) >= 8.9
    return ("bfloat16", "float8") if has_float8 else ("bfloat16",)


def _case(suite: str, title: str, products: list[Product], *, priority: int, copy_bytes: int = 0) -> Case:
    named = {
        f"{label} {precision} {rows} x {inner} x {columns}".strip(): {
            "shape": [rows, inner, columns],
            "precision": precision,
        }
        for label, (rows, inner, columns), precision in products
    }
    return Case(
        suite=suite,
        title=title,
        spec={"products": named, "copy_bytes": copy_bytes, "blocks": suite == "matmul"},
        priority=priority,
        seconds=120,
        blocks=5,
        peers=("torch",) if suite == "matmul" else (),
    )


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """XLA's choice of kernel; on GPUs also without Triton's, as cuBLAS has the float8 ones, and in blocks."""
    del peers
    on_gpu = spec["platform"] == "gpu"
    contestants: dict[str, Callable[[], Ready]] = {}
    for name, product in spec["products"].items():
        product |= {"device_kind": spec["device_kind"], "group": name}
        contestants[name] = partial(_product, product, {})
        if on_gpu:
            options = {"xla_gpu_enable_triton_gemm": False}
            contestants[f"{name}, no Triton"] = partial(_product, product, options)
        if on_gpu and spec["blocks"] and product["precision"] == "float8":
            for blocks in KERNELS_OF_BLOCKS:
                if not obstacles("gpu", spec["compute_capability"], blocks):
                    contestants[f"{name}, {blocks}"] = partial(_blocks, product, blocks)
    if size := spec["copy_bytes"]:
        contestants[f"copy of {size / 2**20:g} MiB"] = partial(_copy, size)
    return contestants


def _copy(size: int) -> Ready:
    x = jnp.asarray(data.normal(0, size // 4))
    return Ready(queued(jax.jit(jnp.negative), x), {"bytes": 2 * size})


def _product(spec: dict[str, Any], options: dict[str, Any]) -> Ready:
    rows, inner, columns = spec["shape"]
    precision = spec["precision"]
    dtype = _DTYPES[precision]
    left, right = (
        jnp.asarray(data.normal(seed, *shape), dtype)
        for seed, shape in enumerate(((rows, inner), (inner, columns)))
    )
    result = jnp.float32 if precision == "float32" else jnp.bfloat16

    # The hardware multiplies float8 by a right operand that lies column by column.
    by = "ri,ci->rc" if precision == "float8" else "ri,ic->rc"
    right = right.T.copy() if precision == "float8" else right

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(by, left, right, preferred_element_type=result)

    compiled = jax.jit(multiply, compiler_options=options).lower(left, right).compile()
    few = left[:_CHECKED].astype(jnp.float32)
    exact = jnp.einsum(by, few, right.astype(jnp.float32), precision="highest")
    return Ready(queued(compiled, left, right), _facts(spec, compiled(left, right), exact))


def _blocks(spec: dict[str, Any], blocks: Blocks) -> Ready:
    """The product of a forward pass, of numbers that are rounded already, with a scale for each block."""
    rows, inner, columns = spec["shape"]
    form, kernel = FORMS[blocks], KERNELS_OF_BLOCKS[blocks]
    shapes = ((rows, inner), form.shape(1)), ((columns, inner), form.shape(1, weight=True))
    left, right = (
        jax.jit(quantize_blocks, static_argnums=(1, 2))(
            jnp.asarray(data.normal(seed, *shape), jnp.bfloat16), block, form.scales
        )
        for seed, (shape, block) in enumerate(shapes)
    )

    def multiply(left: Scaled, right: Scaled) -> jax.Array:
        return MULTIPLY[kernel](left, right, form, jnp.bfloat16)

    compiled = jax.jit(multiply).lower(left, right).compile()
    few = Scaled(left.values[:_CHECKED], left.scale[:_CHECKED])
    with jax.default_matmul_precision("highest"):
        exact = MULTIPLY["reference"](few, right, form, jnp.float32)
    return Ready(queued(compiled, left, right), _facts(spec, compiled(left, right), exact))


def _facts(spec: dict[str, Any], result: jax.Array, exact: jax.Array) -> dict[str, Any]:
    """Of a product, some rows of which are known in float32."""
    rows, inner, columns = spec["shape"]
    precision = spec["precision"]
    difference = result[:_CHECKED].astype(jnp.float32) - exact
    error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact))
    chip = lookup(spec["device_kind"])
    planned = None
    if chip is not None and precision in chip.peak_flops:
        planned = product_seconds(rows, columns, inner, precision, chip)
    limit = 1e-3 if precision == "float32" else 1e-2  # TensorFloat-32 has ten bits.
    return {
        "ok": error <= limit,
        "error": error,
        "limit": limit,
        "precision": precision,
        "flops_full": 2 * rows * inner * columns,
        "planned_seconds": planned,
        "group": spec["group"],
    }
