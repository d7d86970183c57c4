"""Tries a kernel that was never measured on a device like this one, before the first step."""

import math
from typing import Any

import jax

from stack.config import MeshConfig
from stack.config.errors import StackError
from stack.kernels.attention import KERNELS
from stack.kernels.attention.trial import LIMIT, trial_error
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
        """Adds the error to `attention`, if there was reason to look.

        Raises:
            StackError: it is wrong on this device.
        """
        program, choice = self._program, self._program.attention
        if choice.measured or not KERNELS[choice.kernel].own_code:
            return None
        device = jax.local_devices()[0]
        model = program.config.model
        request = attention_request(program.config, platform=device.platform)
        with meshes.use(meshes.build(MeshConfig(), [device])):
            error = trial_error(
                choice.implementation,
                request,
                window=model.window,
                shared_by=model.num_heads // model.kv_heads,
            )
        if not error <= LIMIT:
            told = "no number" if math.isnan(error) else f"off by {error:.1%}"
            raise StackError(
                f"kernels.attention={choice.kernel} is wrong on {device.device_kind}: {told} where"
                f" {LIMIT:.0%} is the limit; set kernels.attention=xla_chunked, and please report it"
            )
        return {"attention": f"{info['attention']}; tried here: {error:.1%} off the definition"}
