"""Loss and gradients of one step of a small model on the device, against the CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from stack.bench import data
from stack.bench.case import Case, Machine
from stack.bench.serve import Ready, UnableError
from stack.bench.timing import queued
from stack.config import Config, ConfigError
from stack.doctor.numerics import BFLOAT16_RATIO, Numbers, distance, errors
from stack.kernels.attention import KERNELS
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import loss_gradient

FLOAT32_LIMIT = 1e-5
"""The largest error of any parameter."""

_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {
        "num_kv_heads": 2,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "position": "rotary",
        "qk_norm": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tied_embeddings": False,
        "sliding_window": 100,
    },
}


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """GPT-2's shapes and Llama's (grouped keys, rotary, gated, a window), whole rows and packed ones."""
    if machine.is_cpu and not tiny:
        return []  # It would be held against itself.
    kinds = [("gpt", False), ("llama", True)] + ([] if tiny else [("llama", False), ("gpt", True)])
    return [
        Case(
            suite="parity",
            title=f"{family}, {'packed' if packed else 'whole'}",
            spec={"family": family, "packed": packed, "tiny": tiny},
            priority=31 + place,
        )
        for place, (family, packed) in enumerate(kinds)
    ]


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """Float32 in full against the CPU's; bfloat16 with every attention."""
    del peers
    kernels = {f"bfloat16 {name}": ("bfloat16", name) for name in KERNELS}
    return {
        name: partial(_prepare, spec, dtype, kernel)
        for name, (dtype, kernel) in {"float32 xla": ("float32", "xla"), **kernels}.items()
    }


def _prepare(spec: dict[str, Any], dtype: str, kernel: str) -> Ready:
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    exact_config = _config(spec, "float32", "xla")
    # On the host, for every device: random bits agree, their logarithms need not.
    params = jax.device_get(states.init_params(programs.build(exact_config, [cpu])))
    exact, _ = _gradient(exact_config, params, cpu)
    try:
        numbers, run = _gradient(_config(spec, dtype, kernel), params, device)
    except ConfigError as error:
        raise UnableError(str(error)) from error
    apart = errors(numbers, exact)
    if dtype == "float32":
        # Without a soft cap the softmax takes the key bias out: its gradient is rounding alone.
        apart.pop("layers.attention.key.bias", None)
        worst = max(apart, key=lambda name: apart[name])
        ok = all(error <= FLOAT32_LIMIT for error in apart.values())
        return Ready(run, {"ok": ok, "error": apart[worst], "error_of": worst, "limit": FLOAT32_LIMIT})
    rounded = distance(_gradient(_config(spec, dtype, "xla"), params, cpu)[0], exact)
    error = distance(numbers, exact)
    note = f"{error / rounded:.3f} x the CPU's error in bfloat16, limit {BFLOAT16_RATIO}"
    facts = {"ok": error / rounded <= BFLOAT16_RATIO, "error": error, "limit": BFLOAT16_RATIO * rounded}
    return Ready(run, facts | {"loss_error": apart["loss"], "note": note})


def _config(spec: dict[str, Any], dtype: str, kernel: str) -> Config:
    """A small model with an odd vocabulary."""
    embed, length, rows = (64, 128, 4) if spec["tiny"] else (256, 256, 8)
    shapes = {"vocab_size": 5003, "num_layers": 4, "embed_dim": embed, "num_heads": 4}
    return Config.model_validate(
        {
            "model": shapes | _FAMILIES[spec["family"]] | {"dtype": dtype},
            "kernels": {"attention": kernel},
            "data": {"sequence_length": length, "packed": spec["packed"]},
            "train": {"batch_size": rows, "remat": "full"},
            "objective": {"logits_bytes": 256 * 4 * 5120},
        }
    )


def _gradient(config: Config, params: Any, device: jax.Device) -> tuple[Numbers, Callable[[int], None]]:
    """Loss and gradients of one batch on one device, and what does it again."""
    program = programs.build(config, [device])
    rows, length = config.train.batch_size, config.data.sequence_length
    numbers = data.batch(rows, length, config.model.vocab_size, packed=config.data.packed)
    precision = "highest" if config.model.dtype == "float32" else "default"
    with jax.set_mesh(states.concrete(program)), jax.default_matmul_precision(precision):
        batch = jax.device_put(numbers, program.layout.sharding("batch"))
        placed = jax.device_put(params, program.layout.sharding())
        step = jax.device_put(np.int32(0), program.layout.sharding())
        compiled = jax.jit(partial(loss_gradient, program)).lower(placed, step, batch).compile()
        gradient, sums = compiled(placed, step, batch)
    leaves = jax.tree_util.tree_flatten_with_path(gradient)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}
    result = Numbers(loss=float(sums["loss"]), params={}, gradient=named)
    return result, queued(compiled, placed, step, batch)
