"""What a run was planned to take beside what it takes, and the likeliest reason where they differ."""

import statistics
from collections.abc import Mapping

import jax

from stack.config import Config
from stack.kernels.attention import Choice
from stack.planner.predict import Planned

TOLERANCE = 0.15
"""A larger part of the plan than this is worth a warning."""

FIRST_STEPS, STEPS = 5, 20
"""Steps read before the machine runs evenly, and those whose median is compared."""


class Comparison:
    """Compares a plan with the metrics of a run, once there are enough of them."""

    def __init__(self, planned: Planned | None, attention: Choice, config: Config) -> None:
        """Without a plan it never says anything.

        Args:
          planned: what was planned.
          attention: the kernel that runs.
          config: of the run.
        """
        self._planned = planned
        self._attention = attention
        self._config = config
        self._read = 0
        self._seconds: list[float] = []
        self._waits: list[float] = []

    def read(self, metrics: Mapping[str, float]) -> str | None:
        """Takes the metrics of a step; a warning, at most once, if plan and run differ.

        Args:
          metrics: `step_seconds`, and where they are known `data_wait_seconds` and `memory_bytes`.
        """
        if self._planned is None or "step_seconds" not in metrics:
            return None
        self._read += 1
        if not FIRST_STEPS < self._read <= FIRST_STEPS + STEPS:
            return None
        self._seconds.append(metrics["step_seconds"])
        self._waits.append(metrics.get("data_wait_seconds", 0.0))
        if self._read < FIRST_STEPS + STEPS:
            return None
        parts = [self._time(self._planned), self._memory(self._planned, metrics.get("memory_bytes"))]
        return "; ".join(part for part in parts if part) or None

    def _time(self, planned: Planned) -> str | None:
        measured, expected = statistics.median(self._seconds), planned.time.total
        if abs(measured / expected - 1) <= TOLERANCE:
            return None
        reason = self._why_slow(planned, measured) if measured > expected else _WHY_FAST
        ratio = measured / expected
        return f"a step takes {measured:.3g} s, {ratio:.2f} of the {expected:.3g} s planned: {reason}"

    def _why_slow(self, planned: Planned, measured: float) -> str:
        """The likeliest reason, from what can be seen."""
        wait = statistics.median(self._waits)
        if wait > 0.8 * measured:  # A shorter wait is hidden behind the step before.
            return f"{wait:.3g} s of it wait for the next batch; look at the disk and at data.*"
        if planned.work.fused_attention and self._attention.stores_scores:
            return f"planned with a fused kernel, but {self._attention}"
        ordered = sorted(self._seconds)
        if ordered[len(ordered) // 10] < 0.8 * statistics.median(ordered):
            spread = f"{ordered[0]:.3g} to {ordered[-1]:.3g} s"
            return f"steps take from {spread}, so the machine is shared or throttles"
        if planned.work.devices > planned.chip.domain_size and jax.process_count() > 1:
            return (
                f"it spans {jax.process_count()} processes, whose network may be slower than the "
                f"{planned.chip.network_bandwidth / 1e9:.3g} GB/s a device that were planned with"
            )
        if planned.time.host > TOLERANCE * planned.time.total:
            return "its kernels are short, so starting them counts; a larger micro-batch helps"
        return (
            f"at these shapes it runs below the figures of {planned.chip.title} (clock, power, cooling); "
            "`stack doctor --calibrate` measures them"
        )

    def _memory(self, planned: Planned, measured: float | None) -> str | None:
        expected = planned.memory.program
        if measured is None or abs(measured / expected - 1) <= TOLERANCE:
            return None
        text = (
            f"a device holds up to {measured / 1e9:.3g} GB, {measured / expected:.2f} of the "
            f"{expected / 1e9:.3g} GB planned: "
        )
        if measured < expected:
            return text + "the compiler shares buffers that the formula counts apart"
        if planned.work.fused_attention and self._attention.stores_scores:
            return text + f"planned with a fused kernel, but {self._attention}"
        evaluated = self._config.eval.batch_size
        if (
            self._config.eval.every
            and evaluated
            and evaluated > planned.work.replicas * planned.work.micro_batch
        ):
            return text + f"an evaluation takes {evaluated} rows at once; lower eval.batch_size"
        return (
            text + "temporaries the formula does not know; `stack plan --compile` shows the compiled step's"
        )


_WHY_FAST = (
    "this chip does better than its generation's efficiencies; `stack doctor --calibrate` measures them"
)
