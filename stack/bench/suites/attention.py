"""Attention of real models: every implementation that can, right first and then timed."""

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from stack.bench import data
from stack.bench.case import Case, Machine
from stack.bench.models import MODELS
from stack.bench.serve import Ready, refuse
from stack.bench.timing import queued, temporary_bytes
from stack.hardware.chip import lookup
from stack.kernels.attention import KERNELS, Request, attend, row_mask
from stack.parallel.rules import ONE_DEVICE

Attention = Callable[..., jax.Array]
"""(query, key, value, segments=, positions=) -> result, causal within documents."""

PASSES = {"forward": 1.0, "with gradients": 3.5}
"""FLOPs over those of the forward pass: the backward pass has five products (arXiv 2307.08691)."""

LIMITS = {"bfloat16": 0.02, "float32": 1e-4}
"""Norm of the error over that of the reference, of the result and of each gradient: several times what
rounding the operands, the weights and the result makes, and far less than one key too many or too few."""

_ROWS = (False, True)
_TOKENS = 32_768
_CHUNK = 256


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """Sequences of 2,048 to 16,384, whole and packed; on a CPU shorter ones in float32."""
    if tiny:
        return [_case("tiny", 64, rows=2, packed=packed, dtype="float32", priority=0) for packed in _ROWS]
    if machine.is_cpu:
        sizes = [("quickstart", 128, 12), ("gpt2_124m", 1024, 2), ("llama3_3b", 2048, 1)]
        return [
            _case(model, length, rows=rows, packed=packed, dtype="float32", priority=priority)
            for priority, (model, length, rows) in enumerate(sizes)
            for packed in _ROWS
        ]
    sizes = [
        ("gpt2_1_5b", 2048),
        ("llama3_8b", 8192),
        ("llama3_3b", 4096),
        ("gpt2_124m", 2048),
        ("llama3_8b", 16_384),
        ("gpt2_1_5b", 8192),
        ("gpt2_124m", 16_384),
        ("llama3_3b", 16_384),
    ]
    return [
        _case(model, length, rows=_TOKENS // length, packed=packed, dtype="bfloat16", priority=place * 10)
        for place, (model, length) in enumerate(sizes)
        for packed in _ROWS
    ]


def _case(model: str, length: int, *, rows: int, packed: bool, dtype: str, priority: int) -> Case:
    fields = MODELS[model]
    heads = fields["num_heads"]
    width = fields["embed_dim"] // heads
    per_pair = 4 * heads * width
    spec = {
        "heads": heads,
        "kv_heads": fields.get("num_kv_heads", heads),
        "head_dim": width,
        "rows": rows,
        "length": length,
        "packed": packed,
        "dtype": dtype,
        "flops_causal": per_pair * data.pairs(rows, length, packed=packed),
        "flops_full": per_pair * rows * length**2,
    }
    return Case(
        suite="attention",
        title=f"{model}, {rows} x {length:,} {'packed' if packed else 'whole'}, {dtype}",
        spec=spec,
        priority=priority,
        seconds=120,
        peers=("torch",),
    )


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """Stack's implementations."""
    del peers
    request = Request(
        platform=spec["platform"],
        compute_capability=spec["compute_capability"],
        dtype=spec["dtype"],
        head_dim=spec["head_dim"],
        packed_length=spec["length"] if spec["packed"] else None,
    )
    functions: dict[str, Attention] = {}
    contestants: dict[str, Callable[[], Ready]] = {}
    for name, kernel in KERNELS.items():
        if obstacles := kernel.obstacles(request):
            contestants[name] = partial(refuse, "; ".join(obstacles))
        else:
            functions[name] = partial(_attend, name, spec["packed"])
    problem = _Problem(spec)
    for name, function in functions.items():
        for which in PASSES:
            contestants[f"{name}, {which}"] = partial(_prepare, function, problem, which)
    return contestants


def _attend(
    name: str,
    packed: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """One of Stack's implementations."""
    mask = row_mask(segments, positions, packed=packed)
    return attend(query, key, value, mask, ONE_DEVICE, kernel=name)


class _Problem:
    """Operands of a case and, once asked for, what is right."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        rows, length, width = spec["rows"], spec["length"], spec["head_dim"]
        shapes = [(rows, length, spec[heads], width) for heads in ("heads", "kv_heads", "kv_heads", "heads")]
        dtype = jnp.dtype(spec["dtype"])
        self.query, self.key, self.value, self.cotangent = (
            jnp.asarray(data.normal(seed, *shape), dtype) for seed, shape in enumerate(shapes)
        )
        made = (make(rows, length, packed=spec["packed"]) for make in (data.segments, data.positions))
        self.segments, self.positions = map(jnp.asarray, made)

    @cached_property
    def right(self) -> tuple[jax.Array, ...]:
        """The result and the three gradients of the reference, in float32."""
        exact = (x.astype(jnp.float32) for x in (self.query, self.key, self.value))
        result, pull = jax.vjp(partial(reference, segments=self.segments), *exact)
        return result, *pull(self.cotangent.astype(jnp.float32))


def _prepare(attention: Attention, problem: _Problem, which: str) -> Ready:
    spec = problem.spec
    places = {"segments": problem.segments, "positions": problem.positions}

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, **places: jax.Array) -> tuple:
        return (attention(query, key, value, **places),)

    def with_gradients(
        query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array, **places: jax.Array
    ) -> tuple:
        result, pull = jax.vjp(partial(attention, **places), query, key, value)
        return result, *pull(cotangent)

    operands = [problem.query, problem.key, problem.value]
    if which == "forward":
        function = jax.jit(forward)
    else:
        function, operands = jax.jit(with_gradients), [*operands, problem.cotangent]
    compiled = function.lower(*operands, **places).compile()
    results = compiled(*operands, **places)
    errors = {
        name: relative_error(result, right)
        for name, result, right in zip(
            ("result", "query", "key", "value"), results, problem.right, strict=False
        )
    }
    worst, limit = max(errors, key=lambda name: _badness(errors[name])), LIMITS[spec["dtype"]]
    facts = {
        "ok": errors[worst] <= limit,
        "error": errors[worst],
        "error_of": worst,
        "limit": limit,
        "precision": spec["dtype"],
        "flops_causal": spec["flops_causal"] * PASSES[which],
        "flops_full": spec["flops_full"] * PASSES[which],
        "temporary_bytes": temporary_bytes(compiled),
        "planned_seconds": _planned(spec, which),
        "group": which,
    }
    return Ready(queued(partial(compiled, **places), *operands), facts)


def _badness(error: float) -> float:
    """No number is worse than any."""
    return math.inf if math.isnan(error) else error


def _planned(spec: dict[str, Any], which: str) -> float | None:
    """What the planner takes for attention that is fused; documents of a row are no less work to it."""
    chip = lookup(spec["device_kind"])
    if chip is None or spec["dtype"] not in chip.peak_flops:
        return None
    causal = spec["flops_full"] / 2 * PASSES[which]
    return causal / (chip.peak_flops[spec["dtype"]] * chip.efficiency.attention)


def relative_error(result: jax.Array, right: jax.Array) -> float:
    """Norm of the difference over that of what is right."""
    difference = result.astype(jnp.float32) - right
    return float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(right.ravel()))


def reference(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention within documents by its formula (arXiv 1706.03762, equation 1), in parts.

    Args:
        query: [batch, length, heads, head_dim] float32, multiplied as such.
        key: [batch, length, kv_heads, head_dim].
        value: as `key`.
        segments: [batch, length], number of each token's document.

    Returns:
        Shape and dtype of `query`; scores of more than 256 queries are never there at once.
    """
    batch, length, heads, width = query.shape
    shared = heads // key.shape[2]
    chunk = _CHUNK if length % _CHUNK == 0 else length
    places = jnp.arange(length)

    def one(operands: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, segments = operands  # [shared, length, width], [length, width] twice, [length]

        @jax.checkpoint
        def some(rows: jax.Array) -> jax.Array:
            scores = jnp.einsum("gqd,kd->gqk", query[:, rows], key, precision="highest") * width**-0.5
            seen = (places[rows, None] >= places) & (segments[rows, None] == segments)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.einsum("gqk,kd->gqd", weights, value, precision="highest")

        parts = jax.lax.map(some, places.reshape(-1, chunk))
        return jnp.moveaxis(parts, 0, 1).reshape(shared, length, width)

    grouped = query.reshape(batch, length, -1, shared, width).transpose(0, 2, 3, 1, 4)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(-1, length, width) for x in (key, value))
    documents = jnp.repeat(segments, key.shape[2], axis=0)
    mixed = jax.lax.map(one, (grouped.reshape(-1, shared, length, width), keys, values, documents))
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
