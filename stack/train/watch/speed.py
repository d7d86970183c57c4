"""How fast a run is, from the times its metrics arrive."""

import time
from collections.abc import Iterable, Iterator

import jax
from jax.sharding import Mesh

from stack.config import Config
from stack.hardware.chip import mfu


class Speedometer:
    """Step time, tokens, model FLOP/s and their share of the peak."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Stands still until the first step is read, as that one holds the compilation."""
        self._config = config
        self._devices = mesh.devices.size
        self._device: jax.Device = mesh.local_devices[0]
        self._last: float | None = None
        self._waited = 0.0

    def waiting[T](self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; notes how long each is waited for."""
        began = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def read(self, metrics: dict[str, float]) -> dict[str, float]:
        """What is known on the arrival of one step's metrics; nothing about the first.

        Args:
          metrics: of the step; `tokens` is the number of its labels.

        Returns:
          step_seconds; data_wait_seconds, how long the next batch was waited for meanwhile;
          tokens_per_second, padding not counted; model_flops_per_second of each device, causal; mfu_full
          and mfu_causal, fractions, where the device's peak is known; memory_bytes, the most this device
          held, where it tells.
        """
        now, last = time.perf_counter(), self._last
        waited, self._waited = self._waited, 0.0
        self._last = now
        memory = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        values: dict[str, float] = {} if memory is None else {"memory_bytes": float(memory)}
        if last is None:
            return values
        data, seconds = self._config.data, now - last
        places = self._config.train.batch_size * data.sequence_length
        used = mfu(
            self._config.model,
            length=data.sequence_length,
            tokens_per_second_per_device=places / seconds / self._devices,
            device_kind=self._device.device_kind,
        )
        values |= {
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "tokens_per_second": metrics["tokens"] / seconds,
            "model_flops_per_second": used.causal_flops_per_second,
        }
        if used.full is not None and used.causal is not None:
            values |= {"mfu_full": used.full, "mfu_causal": used.causal}
        return values

    def restart(self) -> None:
        """Forgets the last arrival: what came between was no step."""
        self._last = None
