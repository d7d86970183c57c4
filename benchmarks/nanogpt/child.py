"""What every contestant shares: the setting, the batches and the conversation with the parent.

Runs under the interpreters of all contestants, so: Python 3.11 and numpy only.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    """nanoGPT's example for a CPU, with GPT-2's biases, in float32."""

    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 128
    block: int = 64
    batch: int = 12
    vocab: int = 65
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    """On matrices and tables only."""
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.block


def batches(setting: Setting) -> list[np.ndarray]:
    """Random tokens, int32 [batch, block + 1]; the same for every contestant."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(setting.vocab, size=(setting.batch, setting.block + 1), dtype=np.int32)
        for _ in range(32)
    ]


def serve(steps: Callable[[int], float], *, parameters: int, versions: str) -> None:
    """Answers the parent until it hangs up.

    Args:
        steps: runs that many steps, waits for the last and returns its loss.
        parameters: how many numbers are trained.
        versions: of the framework.
    """
    _say(loss=steps(1), parameters=parameters, versions=versions)
    for line in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = steps(int(line))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        _say(seconds=seconds, cpu_seconds=cpu_seconds, loss=loss, peak_bytes=_peak_bytes())


def _say(**message: float | str) -> None:
    print(json.dumps(message), flush=True)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
