"""The attention of a config with several tiles of one implementation: right first, and then timed."""

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from stack import environment
from stack.bench import data
from stack.bench.serve import Ready
from stack.bench.suites.attention import LIMITS, relative_error
from stack.bench.timing import queued
from stack.config import Config, StackError
from stack.kernels import tuned
from stack.kernels.attention import KERNELS, Dropout, Problem, Tiled, attend, row_mask
from stack.kernels.attention.trial import LIMIT, trial_error
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.planner.plan import for_devices
from stack.planner.search import auto
from stack.step import program as programs
from stack.step.kernels import platform_of
from stack.step.tiles import problem


def problem_of(config: dict[str, Any], devices: int | None) -> dict[str, Any]:
    """What a device of this process would attend to in a training step of a config.

    Args:
        config: as plain values.
        devices: of the run; None: those of this machine.

    Returns:
        `problem` as JSON holds it and the name of the `device` that its tiles are kept under, or the `error`
        that a run would end with.
    """
    here = list(environment.devices())
    platform, capability = platform_of(here[0])
    try:
        settled = Config.model_validate(config).settled()
        if devices is None:
            settled = auto.resolve(settled, here)
            layout = programs.build(settled, here).layout
        else:
            settled, _ = for_devices(settled, devices)
            layout = Layout.of(meshes.abstract(settled.mesh, devices), settled.mesh)
        asked = problem(settled, layout, platform=platform, compute_capability=capability)
    except StackError as error:
        return {"error": str(error)}
    return {"problem": asked.plain(), "device": tuned.device_name(here[0])}


def makers(spec: dict[str, Any], _: list[str]) -> dict[str, Callable[[], Ready]]:
    """A contestant for each tile of a part of an implementation."""
    trial = _Trial(spec)
    return {name: partial(trial.prepare, plain) for name, plain in spec["tiles"].items()}


class _Trial:
    """Operands of a problem, and what the default tiles make of them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.kernel, self.has_gradients = spec["kernel"], spec["passes"] == "with gradients"
        self.problem = Problem.of_plain(spec["problem"])
        tiling = KERNELS[self.kernel].tiling
        assert tiling is not None
        self.tiling = tiling

    def prepare(self, plain: dict[str, Any]) -> Ready:
        """Compares with the definition, at up to 1,024 tokens, and with the default tiles at full size."""
        asked, problem = self.problem.request, self.problem
        tiles = self.tiling.read(plain, problem)
        shared_by = problem.heads // problem.kv_heads
        told = Tiled(self.kernel, tiles)
        errors = {"the definition": trial_error(told, asked, window=problem.window, shared_by=shared_by)}
        compiled = self._compile(told)
        results = compiled(*self.operands)
        for result, right in zip(results, self.of_default, strict=False):
            error = relative_error(result, right.astype(jnp.float32))
            errors["the default tiles"] = max(error, errors.get("the default tiles", 0.0), key=_badness)
        worst = max(errors, key=lambda name: _badness(errors[name]))
        # The tensor cores of GPUs round float32.
        limit = LIMITS[asked.dtype] if asked.platform == "cpu" else LIMIT
        facts = {"ok": errors[worst] <= limit, "error": errors[worst], "error_of": worst, "limit": limit}
        return Ready(queued(compiled, *self.operands), facts)

    @cached_property
    def of_default(self) -> tuple[jax.Array, ...]:
        """Results with the default tiles; none where these do not run."""
        try:
            return self._compile(Tiled(self.kernel, self.tiling.default(self.problem)))(*self.operands)
        except Exception:  # Whatever a compiler says: it is told where they are tried themselves.
            return ()

    @cached_property
    def operands(self) -> tuple[Any, ...]:
        """Query, key, value, bias, cotangent, mask and random words."""
        asked, rows, length = self.problem.request, self.problem.rows, self.problem.request.length
        assert length is not None
        heads = (self.problem.heads, self.problem.kv_heads, self.problem.kv_heads, self.problem.heads)
        query, key, value, cotangent = (
            jnp.asarray(data.normal(seed, rows, length, number, asked.head_dim), asked.dtype)
            for seed, number in enumerate(heads)
        )
        packed = asked.packed_length is not None
        segments, positions = (
            jnp.asarray(make(rows, length, packed=packed)) for make in (data.segments, data.positions)
        )
        prefix = (positions < length // 4).astype(jnp.int32) if asked.kind == "prefix" else None
        mask = row_mask(
            segments, positions, packed=packed, kind=asked.kind, window=self.problem.window, prefix=prefix
        )
        bias = None
        if asked.bias:
            bias = jnp.asarray(data.normal(4, 1, self.problem.heads, length, length))
        words = None
        if asked.dropout:
            words = jax.random.bits(jax.random.key(1), (rows, self.problem.heads, length, 2), jnp.uint32)
        return query, key, value, bias, cotangent, mask, words

    def _compile(self, told: Tiled) -> Any:
        asked = self.problem.request

        def run(query: Any, key: Any, value: Any, bias: Any, cotangent: Any, mask: Any, words: Any) -> Any:
            dropout = None if words is None else Dropout(rate=asked.dropout, rows=words)

            def attention(query: Any, key: Any, value: Any, bias: Any) -> jax.Array:
                more: dict[str, Any] = {"bias": bias, "softcap": asked.softcap, "dropout": dropout}
                return attend(query, key, value, mask, ONE_DEVICE, kernel=told, **more)

            if not self.has_gradients:
                return (attention(query, key, value, bias),)
            result, pull = jax.vjp(attention, query, key, value, bias)
            return result, *pull(cotangent)[:3]

        return jax.jit(run).lower(*self.operands).compile()


def _badness(error: float) -> float:
    """No number is worse than any."""
    return math.inf if math.isnan(error) else error
