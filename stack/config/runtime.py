"""How the compiler and the libraries below are set: changes speed and memory, not what is computed."""

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from stack.config.explain import shown
from stack.config.section import Section

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class RuntimeConfig(Section):
    """What a run asks of XLA beyond what Stack sets by itself; see docs/defaults.md."""

    compiler_options: Mapping[str, Any] = {}
    """Options of XLA's compiler by name, such as `xla_gpu_enable_triton_gemm: false`, over those that Stack
    sets and over XLA_FLAGS; one that the installed XLA does not know is refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in self.compiler_options.items():
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"compiler_options: {shown(name)} is no name of an option; write it without dashes, such"
                    " as xla_gpu_enable_triton_gemm"
                )
            if not isinstance(value, bool | int | float | str):
                raise ValueError(
                    f"compiler_options.{name}={shown(value)} must be true or false, a number or text"
                )
        return self
