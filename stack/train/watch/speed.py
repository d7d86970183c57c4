"""How fast a run is, from the times its metrics arrive."""

import time
from typing import Any

import jax
from jax.sharding import Mesh

from stack.config import Config
from stack.models.flops import mfu
from stack.objectives import build
from stack.planner.formula.shapes import parameters
from stack.train.watch.listeners import Listener


class Speedometer(Listener):
    """Adds step time, tokens, model FLOP/s and their share of the peak to the metrics."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Stands still until the first step is heard of, as that one holds the compilation."""
        self._config = config
        self._sizes = build(config).sizes
        self._untrained = None
        if config.adapter is not None or config.optimizer.frozen:
            parts = parameters(config.model, config.adapter, tuple(config.optimizer.frozen))
            self._untrained = parts.untrained
        self._devices = mesh.devices.size
        self._device: jax.Device = mesh.local_devices[0]
        self._last: float | None = None

    def on_start(self, info: dict[str, Any]) -> dict[str, Any]:
        """`peak`: what utilisation is measured against, in words."""
        self._last = None
        return {"peak": self._mfu(0.0).peak}

    def on_metrics(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """What is known on the arrival of one step's metrics; no speed of the first.

        Args:
          step: taken.
          metrics: of the step; `tokens` is the number of its labels.

        Returns:
          step_seconds; tokens_per_second, padding not counted; model_flops_per_second of each device,
          causal; mfu_full and mfu_causal, fractions, where the device's peak is known; memory_bytes, the
          most this device held, where it tells.
        """
        now, last = time.perf_counter(), self._last
        self._last = now
        memory = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        values: dict[str, float] = {} if memory is None else {"memory_bytes": float(memory)}
        if last is None:
            return values
        seconds = now - last
        rows = self._config.train.batch_size // self._config.average.runs
        places = rows * self._config.data.sequence_length
        used = self._mfu(places / seconds / self._devices)
        values |= {
            "step_seconds": seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "model_flops_per_second": used.causal_flops_per_second,
        }
        if used.full is not None and used.causal is not None:
            values |= {"mfu_full": used.full, "mfu_causal": used.causal}
        return values

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Forgets the last arrival: what came between was no step."""
        self._last = None

    def on_save(self, step: int) -> None:
        """Forgets the last arrival: what came between was more than a step."""
        self._last = None

    def _mfu(self, tokens_per_second_per_device: float) -> Any:
        return mfu(
            self._config.model,
            length=self._sizes,
            tokens_per_second_per_device=tokens_per_second_per_device,
            device_kind=self._device.device_kind,
            untrained=self._untrained,
        )
