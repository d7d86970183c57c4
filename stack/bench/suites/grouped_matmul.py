"""Products of tokens with the weights of their experts: every implementation that can, right first."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stack.bench import data
from stack.bench.case import Case, Machine
from stack.bench.peers import tokamax
from stack.bench.serve import Ready, refuse
from stack.bench.suites.attention import LIMITS, relative_error
from stack.bench.timing import queued, temporary_bytes
from stack.hardware.chip import lookup
from stack.kernels.grouped_matmul import KERNELS, Request, grouped_matmul
from stack.planner.formula.time import product_seconds

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Tokens [tokens, inputs], weights [groups, inputs, outputs] and sizes [groups] -> [tokens, outputs]."""

PASSES = {"forward": 1, "with gradients": 3}
"""Products of each."""

_MIXTURES = (
    # arXiv 2401.04088, table 1: 2 of 8 experts for each of 16,384 tokens.
    ("mixtral_8x7b", 32_768, 8, 4096, 14_336),
    # Qwen3-30B-A3B's config.json: 8 of 128 experts for each of 16,384.
    ("qwen3_30b_a3b", 131_072, 128, 2048, 768),
    # arXiv 2412.19437, section 4.2: 8 of 256 experts, of which one of 32 devices has 8, for 4,096 of each.
    ("deepseek_v3", 32_768, 8, 7168, 2048),
)
"""Name, pairs of a token and an expert on a device, experts there, and the widths of the way in."""
_ON_CPU = (("few experts", 2048, 8, 512, 1792), ("many experts", 2048, 64, 256, 128))


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """The ways in of mixtures of experts; on a CPU narrower ones, in both dtypes."""
    if tiny:
        return [_case("tiny", 40, 3, 8, 16, "float32", 0)]
    if machine.is_cpu:
        dtypes = ("float32", "bfloat16")
        return [_case(*sizes, dtype, place) for place, sizes in enumerate(_ON_CPU) for dtype in dtypes]
    return [_case(*sizes, "bfloat16", place) for place, sizes in enumerate(_MIXTURES)]


def _case(name: str, tokens: int, groups: int, inputs: int, outputs: int, dtype: str, place: int) -> Case:
    return Case(
        suite="grouped_matmul",
        title=f"{name}, {tokens:,} x {inputs} to {outputs}, {groups} experts, {dtype}",
        spec={
            "tokens": tokens,
            "groups": groups,
            "inputs": inputs,
            "outputs": outputs,
            "dtype": dtype,
        },
        priority=45 + place,
        seconds=120,
        peers=("tokamax",),
    )


def sizes(tokens: int, groups: int) -> np.ndarray:
    """Tokens of each expert, int32 [groups], as unequal as routers leave them: a few of twice the mean."""
    random = np.random.default_rng(3)
    return random.multinomial(tokens, random.dirichlet(np.full(groups, 8.0))).astype(np.int32)


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """Stack's implementations, and Tokamax's where it takes part."""
    names = ("platform", "compute_capability", "dtype", "tokens", "groups", "inputs", "outputs")
    request = Request(**{name: spec[name] for name in names})
    functions: dict[str, Product] = {}
    contestants: dict[str, Callable[[], Ready]] = {}
    for name, kernel in KERNELS.items():
        if obstacles := kernel.obstacles(request):
            contestants[name] = partial(refuse, "; ".join(obstacles))
        else:
            functions[name] = partial(_multiply, name)
    if "tokamax" in peers:
        functions["tokamax"] = tokamax.ragged_dot
    problem = _Problem(spec)
    for name, function in functions.items():
        for which in PASSES:
            contestants[f"{name}, {which}"] = partial(_prepare, function, problem, which)
    return contestants


def _multiply(name: str, tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return grouped_matmul(tokens, weights, sizes[None], implementation=name)


class _Problem:
    """Operands of a case and, once asked for, what is right."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        tokens, groups, inputs, outputs = (spec[name] for name in ("tokens", "groups", "inputs", "outputs"))
        dtype = jnp.dtype(spec["dtype"])
        shapes = ((tokens, inputs), (groups, inputs, outputs), (tokens, outputs))
        self.tokens, self.weights, self.slope = (
            jnp.asarray(data.normal(seed, *shape), dtype) for seed, shape in enumerate(shapes)
        )
        self.sizes = jnp.asarray(sizes(tokens, groups))
        signs = np.random.default_rng(4).choice(np.array([-1, 1], np.float32), max(inputs, outputs))
        self.in_signs, self.out_signs = jnp.asarray(signs[:inputs]), jnp.asarray(signs[:outputs])

    def project(self, result: jax.Array, of_tokens: jax.Array, of_weights: jax.Array) -> list[jax.Array]:
        """The result and the gradients, each times a vector of signs."""
        return [
            _times(result, self.out_signs),
            _times(of_tokens, self.in_signs),
            _times(of_weights, self.out_signs),
        ]

    @cached_property
    def right(self) -> list[jax.Array]:
        """What `project` must give, float32, without the products: (x W) s is x (W s).

        A vector of signs finds a wrong product as a test of Freivalds does (1979), at the cost of reading it.
        """
        group = np.repeat(np.arange(self.spec["groups"]), self.sizes)
        weights = self.weights.astype(jnp.float32)
        of_result = jnp.einsum("gio,o->gi", weights, self.out_signs, precision="highest")[group]
        of_tokens = jnp.einsum("gio,i->go", weights, self.in_signs, precision="highest")[group]
        tokens, slope = self.tokens.astype(jnp.float32), self.slope.astype(jnp.float32)
        pulls = tokens * _times(slope, self.out_signs)[:, None]
        return [
            (tokens * of_result).sum(1),
            (slope * of_tokens).sum(1),
            jax.ops.segment_sum(pulls, jnp.asarray(group), self.spec["groups"]),
        ]


def _times(array: jax.Array, vector: jax.Array) -> jax.Array:
    """Over the last axis."""
    return jnp.matmul(array.astype(jnp.float32), vector, precision="highest")


def _prepare(product: Product, problem: _Problem, which: str) -> Ready:
    spec = problem.spec

    def with_gradients(tokens: jax.Array, weights: jax.Array, sizes: jax.Array, slope: jax.Array) -> tuple:
        result, pull = jax.vjp(lambda tokens, weights: product(tokens, weights, sizes), tokens, weights)
        return result, *pull(slope)

    operands = [problem.tokens, problem.weights, problem.sizes]
    function = jax.jit(product)
    if which != "forward":
        function, operands = jax.jit(with_gradients), [*operands, problem.slope]
    compiled = function.lower(*operands).compile()
    found = compiled(*operands)
    if which == "forward":
        found = found, problem.tokens, problem.weights
    errors = {
        name: relative_error(one, right)
        for name, one, right in zip(
            ("result", "tokens", "weights")[: PASSES[which]],
            problem.project(*found),
            problem.right,
            strict=False,
        )
    }
    worst, limit = max(errors, key=lambda name: errors[name]), LIMITS[spec["dtype"]]
    flops = 2 * spec["tokens"] * spec["inputs"] * spec["outputs"]
    chip, planned = lookup(spec["device_kind"]), None
    if chip is not None and spec["dtype"] in chip.peak_flops:
        planned = PASSES[which] * product_seconds(
            spec["tokens"], spec["outputs"], spec["inputs"], spec["dtype"], chip
        )
    facts = {
        "ok": all(error <= limit for error in errors.values()),
        "error": errors[worst],
        "error_of": worst,
        "limit": limit,
        "precision": spec["dtype"],
        "flops_full": PASSES[which] * flops,
        "temporary_bytes": temporary_bytes(compiled),
        "planned_seconds": planned,
        "group": which,
    }
    return Ready(queued(compiled, *operands), facts)
