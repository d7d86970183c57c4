"""The steps of a run, as the host sees them."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax

from stack.parallel import mesh as meshes
from stack.step.program import Program
from stack.step.state import State, abstract, concrete
from stack.step.step import Batch, train_step

Metrics = dict[str, jax.Array]


class Steps:
    """What a trainer asks of its program: here, one that runs on all devices and asks nobody else."""

    def __init__(self, program: Program, options: Mapping[str, Any]) -> None:
        """Compiles when it is first asked, with these options of the compiler."""
        self._program, self._options = program, dict(options)

    @cached_property
    def step(self) -> Any:
        """(state, batch) -> (state, metrics), jitted; the state's buffers are donated."""
        step = partial(train_step, self._program)
        return jax.jit(step, donate_argnums=0, compiler_options=self._options)

    def lower(self) -> jax.stages.Lowered:
        """The step, traced and typed for the devices of the program's mesh, which need not be here."""
        with meshes.use(concrete(self._program)):
            return self.step.lower(abstract(self._program), self._program.abstract_batch())

    def advance(self, step: int, state: State, batch: Batch) -> tuple[State, Metrics]:
        """The step that follows so many, and whatever else is done with the state after it."""
        del step  # It is of no concern where nothing else is done.
        return self.step(state, batch)

    def read(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Metrics as numbers; waits for them."""
        return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}

    def hear(self, is_asked: Callable[[], bool]) -> None:
        """Is told what says that the run is to be saved and to end: then nobody else is waited for."""

    def begin(self, state: State, step: int, content: Mapping[str, str]) -> tuple[State, int]:
        """Where to go on: a state and its steps, those that are given if nothing knows better.

        Args:
          state: as it was restored, or is made.
          step: of it.
          content: digests of what the run reads, by name.
        """
        del content  # Nobody compares it.
        return state, step

    def settle(self) -> None:
        """Waits for what a checkpoint of the state relies on."""

    def notes(self) -> list[str]:
        """What a person should know, told once."""
        return []
