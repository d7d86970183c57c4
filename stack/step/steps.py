"""Which steps a run has."""

from collections.abc import Mapping
from typing import Any

from stack.step.averaging import AveragedSteps
from stack.step.plain import Steps
from stack.step.program import Program
from stack.step.streaming import StreamedSteps


def steps_of(program: Program, options: Mapping[str, Any]) -> Steps:
    """The steps of a program, compiled with these options when they are first asked for."""
    if program.instances is None:
        return Steps(program, options)
    makes = AveragedSteps if program.config.average.folder is None else StreamedSteps
    return makes(program, options)
