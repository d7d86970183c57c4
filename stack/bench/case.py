"""What is measured, and what comes of it."""

import dataclasses
import statistics
from typing import Any, Literal

Status = Literal["measured", "wrong", "unable", "too large", "absent", "not run", "failed"]
"""`wrong`: its numbers are not the reference's, so it was not timed; `unable`: it cannot do the case by its
nature; `too large`: the device has no room for it; `not run`: the time was over."""

NOISE = 0.1
"""Spread of the blocks from which on a time is called noisy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The device under test and what is around it, as a child process sees them."""

    platform: str
    """`cpu`, `gpu` (NVIDIA's), `rocm` or `tpu`."""
    device_kind: str
    compute_capability: float | None
    """Of an NVIDIA GPU."""
    memory_bytes: float
    """What the device may use."""
    processor: str
    cores: int
    versions: dict[str, str]
    client: str
    """What JAX says of the platform: driver and runtime."""

    @property
    def is_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.platform == "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, for all contestants that can do it."""

    suite: str
    title: str
    spec: dict[str, Any]
    """All that a child must know, as JSON."""
    priority: int
    """The lowest first: time may run out."""
    seconds: float = 240.0
    """What all contestants together may take."""
    blocks: int = 7
    """Times each is timed, in turns with the others."""
    together: bool = True
    """Whether the device has room for Stack and a peer at once, so that their blocks take turns; else one
    begins when the other has ended."""
    peers: tuple[str, ...] = ()
    """Who may take part besides."""


@dataclasses.dataclass(kw_only=True)
class Row:
    """What one contestant did in one case."""

    suite: str
    title: str
    by: str
    """The contestant."""
    team: str
    """`stack`, or the peer it belongs to."""
    status: Status
    reason: str = ""
    blocks: list[float] = dataclasses.field(default_factory=list)
    """Seconds of an iteration, of each block."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the contestant said of itself, and what follows from its time."""

    @property
    def seconds(self) -> float | None:
        """Of an iteration: the median of the blocks; None: it has not been timed."""
        return statistics.median(self.blocks) if self.status == "measured" else None

    @property
    def spread(self) -> float:
        """The slowest block less the fastest, over the median."""
        return (max(self.blocks) - min(self.blocks)) / statistics.median(self.blocks)

    @property
    def is_noisy(self) -> bool:
        """Whether the blocks differ too much for small differences to mean anything."""
        return self.status == "measured" and self.spread > NOISE

    def as_json(self) -> dict[str, Any]:
        """For the file, with what is derived."""
        derived = {}
        if self.status == "measured":
            derived = {"seconds": self.seconds, "spread": self.spread, "noisy": self.is_noisy}
        return dataclasses.asdict(self) | derived


def derive(row: Row, ceilings: dict[str, float]) -> None:
    """Adds to a row's facts what follows from its time: rates, and their share of the measured ceilings.

    Args:
        row: one that was measured.
        ceilings: bytes per second of `copy`, FLOP/s of products by precision.
    """
    if (seconds := row.seconds) is None:
        return
    facts = row.facts
    if tokens := facts.get("tokens"):
        facts["tokens_per_second"] = tokens / seconds
    for convention in ("causal", "full"):
        if flops := facts.get(f"flops_{convention}"):
            rate = facts[f"flops_per_second_{convention}"] = flops / seconds
            if peak := facts.get("peak_flops"):
                facts[f"mfu_{convention}"] = rate / peak
            if ceiling := ceilings.get(facts.get("precision", "")):
                facts[f"of_ceiling_{convention}"] = rate / ceiling
    if moved := facts.get("bytes"):
        facts["bytes_per_second"] = moved / seconds
        if ceiling := ceilings.get("copy"):
            facts["of_copy"] = facts["bytes_per_second"] / ceiling
    if planned := facts.get("planned_seconds"):
        facts["planned_over_measured"] = planned / seconds
