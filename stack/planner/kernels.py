"""`stack kernels explain`: what runs each operation of a config on a chip, why, and why not the others."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from stack import environment
from stack.config import Config, ConfigError
from stack.hardware import chip as chips
from stack.kernels import matmul
from stack.kernels.attention import KERNELS, choose, fitting
from stack.kernels.linear_cross_entropy import chunk_tokens
from stack.objectives import build
from stack.planner.compiled.findings import gib
from stack.planner.search import auto
from stack.step import program as programs
from stack.step.kernels import attention_request, choose_matmul, platform_of
from stack.step.tiles import look, problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    """An implementation that there is."""

    kernel: str
    obstacles: Sequence[str] = ()
    """What keeps it from running here; empty: it can."""
    measured: Sequence[str] = ()
    """Figures of such a device at such shapes."""
    stores_scores: bool | None = None
    """Of attention."""
    tiles: str = ""
    """What is told of its tiles, if it has any and the device is here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of a training step."""

    name: str
    kernel: str
    reason: str
    tiles: str = ""
    """As `Other.tiles`."""
    others: Sequence[Other] = ()
    """All implementations, the one that runs too, where there are several."""


_IN_8_BITS: dict[matmul.Blocks, str] = {"tensor": "fp8", "block": "fp8 block", "mx": "fp8 mx"}
"""Ways to scale that run on devices of their own; `channel` runs where `tensor` does."""


def explain(config: Config, hardware: str | None = None) -> Iterator[Operation]:
    """The operations of a config, one after another.

    Args:
      config: what is trained.
      hardware: a chip by name, or a YAML file of one; None: target.hardware, else the device here.

    Raises:
      ConfigError: there is no such chip, or a kernel was asked for that cannot run on it.
    """
    platform, capability = device(config, hardware)
    request = attention_request(config, platform=platform, compute_capability=capability)
    choice = choose(request, config.kernels.attention)
    tiles = _tiles(config, hardware)
    others = [
        Other(
            kernel=name,
            obstacles=kernel.obstacles(request),
            measured=[
                f"{entry.speed:.3g} times as fast as xla on {entry.device} ({entry.timed}; {entry.commit})"
                for entry in fitting(request, name)
            ],
            stores_scores=kernel.stores_scores,
            tiles=tiles.get(name, ""),
        )
        for name, kernel in KERNELS.items()
    ]
    yield Operation(
        name="attention",
        kernel=choice.kernel,
        reason=choice.reason,
        tiles=tiles.get(choice.kernel, ""),
        others=others,
    )
    model = config.model
    tokens = chunk_tokens(
        config.objective.logits_bytes,
        embed_dim=model.embed_dim,
        vocab_size=model.padded_vocab_size,
        tensor=max(1, config.mesh.tensor),
    )
    size = gib(4 * tokens * model.padded_vocab_size / max(1, config.mesh.tensor))
    scored = "places that are asked for" if "masked" in build(config).sizes else "tokens"
    yield Operation(
        name="cross-entropy",
        kernel="xla_chunked",
        reason=f"the only one; logits of up to {tokens:,} {scored} exist at once on a device, {size}",
    )
    products = choose_matmul(config, platform=platform, compute_capability=capability)
    how = {"gpu": "XLA takes cuBLAS or a Triton kernel for each product", "cpu": "XLA's own and oneDNN's"}
    reason = f"{how.get(platform, 'what XLA has there')}, of {model.dtype} operands"
    others = [
        Other(kernel="xla"),
        *(
            Other(kernel=name, obstacles=matmul.obstacles(platform, capability, blocks))
            for blocks, name in _IN_8_BITS.items()
        ),
    ]
    if products.fp8 is None:
        yield Operation(name="matmul", kernel="xla", reason=reason, others=others)
    else:
        asked = str(products).partition("(")[2].removesuffix(")")
        name = _IN_8_BITS.get(products.fp8.blocks, "fp8")
        yield Operation(name="matmul", kernel=name, reason=f"asked for; {asked}", others=others)


def device(config: Config, hardware: str | None) -> tuple[str, float | None]:
    """Platform and compute capability of what a config runs on; see `explain`."""
    if hardware is None and config.target is not None:
        hardware = config.target.hardware
    if hardware is not None:
        chip = chips.load(hardware)
        return chip.platform, chip.compute_capability
    return platform_of(jax.devices()[0])


def _tiles(config: Config, hardware: str | None) -> dict[str, str]:
    """What is told of the tiles of each attention that has any; empty of a chip or mesh that is not here."""
    here = list(environment.devices())
    name = hardware or (config.target.hardware if config.target else None)
    if name is not None:
        chip, kind = chips.load(name), here[0].device_kind
        if kind not in chip.device_kinds and not (here[0].platform == "cpu" and chip.generation == "cpu"):
            return {}
    try:
        program = programs.build(auto.resolve(config.settled(), here), here)
    except ConfigError:
        return {}
    platform, capability = platform_of(here[0])
    asked = problem(program.config, program.layout, platform=platform, compute_capability=capability)
    warn = logging.getLogger("stack").warning
    return {
        name: look(asked, here[0], name, warn)[1]
        for name, kernel in KERNELS.items()
        if kernel.tiling is not None
    }


def lines(operations: Sequence[Operation]) -> Iterator[str]:
    """For the screen."""
    for operation in operations:
        tiles = f"; {operation.tiles}" if operation.tiles else ""
        yield f"{operation.name}: {operation.kernel} ({operation.reason}){tiles}"
        for other in operation.others:
            told = "cannot: " + "; ".join(other.obstacles) if other.obstacles else "can"
            if not other.obstacles:
                told += f"; {'; '.join(other.measured) or 'not measured at such shapes on such a device'}"
                if other.stores_scores is not None:
                    told += "; stores all scores" if other.stores_scores else "; stores no scores"
                told += f"; {other.tiles}" if other.tiles else ""
            yield f"  {other.kernel:<12} {told}"


def as_json(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [dataclasses.asdict(operation) for operation in operations]
