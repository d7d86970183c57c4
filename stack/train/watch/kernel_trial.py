"""Tries a kernel that was never measured on a device like this one, before the first step."""

import math
from typing import Any

import jax

from stack.config import MeshConfig
from stack.config.errors import StackError
from stack.kernels.attention import KERNELS
from stack.kernels.attention.trial import LIMIT, trial_error
from stack.kernels.matmul import trial as matmul_trial
from stack.parallel import mesh as meshes
from stack.step.kernels import attention_request
from stack.step.program import Program
from stack.train.watch.listeners import Listener


class KernelTrial(Listener):
    """Compares it with the definition on a device of this process, and says how far off it is."""

    def __init__(self, program: Program) -> None:
        """Runs nothing yet."""
        self._program = program

    def on_start(self, info: dict[str, Any]) -> dict[str, Any] | None:
        """Adds the errors to `attention` and `products`, if there was reason to look.

        Raises:
            StackError: one is wrong on this device.
        """
        program, device = self._program, jax.local_devices()[0]
        choice, fp8, told = program.attention, program.matmul.fp8, {}
        with meshes.use(meshes.build(MeshConfig(), [device])):
            if KERNELS[choice.kernel].own_code and not choice.measured:
                model = program.config.model
                request = attention_request(program.config, platform=device.platform)
                error = trial_error(
                    choice.implementation,
                    request,
                    window=model.window,
                    shared_by=model.num_heads // model.kv_heads,
                )
                remedy = "kernels.attention=xla_chunked"
                told["attention"] = _judge(error, LIMIT, f"kernels.attention={choice.kernel}", remedy)
            if fp8 is not None and fp8.kernel not in ("xla", "reference"):
                error = matmul_trial.trial_error(fp8, program.config.model.dtype)
                name, remedy = f"kernels.fp8.blocks={fp8.blocks}", "kernels.fp8.blocks=tensor"
                told["products"] = _judge(error, matmul_trial.LIMIT, name, remedy)
        return {name: f"{info[name]}; {line}" for name, line in told.items()} or None


def _judge(error: float, limit: float, name: str, remedy: str) -> str:
    if not error <= limit:
        told = "no number" if math.isnan(error) else f"off by {error:.1%}"
        raise StackError(
            f"{name} is wrong on {jax.local_devices()[0].device_kind}: {told} where {limit:.0%} is the limit;"
            f" set {remedy}, and please report it"
        )
    return f"tried here: {error:.1%} off the definition"
