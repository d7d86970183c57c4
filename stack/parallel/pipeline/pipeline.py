"""A model's layers on the stages of a pipeline, and the table of its step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stack.parallel.pipeline.places import KINDS, Rows, Slots, divide, place, slots_of
from stack.parallel.pipeline.schedules import SCHEDULES, Kind, Shape, in_halves
from stack.parallel.pipeline.table import Costs, Table, lay_out


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Which layers each stage has, and what it does in every tick."""

    schedule: str
    table: Table
    stacks: tuple[int, ...]
    """Layers of each stack of the model, in the order they are run."""
    chunks: int
    """Parts of each stack that a stage has."""

    @staticmethod
    def of(
        schedule: str, stacks: Sequence[int], *, stages: int, micro_batches: int, chunks: int, costs: Costs
    ) -> "Pipeline":
        """A model of stacks of so many layers, by the name of a schedule.

        Each stage has its part of every stack: of an encoder and a decoder, the stages run all of the one and
        then all of the other.
        """
        shape = Shape(stages, micro_batches, chunks * len(stacks))
        orders = SCHEDULES[schedule](shape)
        # A backward pass of several ticks does some of its layers in each. Of fewer layers it cannot, and the
        # other stages would wait in one of them; but its halves can be apart.
        if max(-(-number // (chunks * stages)) for number in stacks) < costs.backward:
            orders = in_halves(orders)
        table = lay_out(orders, shape, costs)
        return Pipeline(schedule=schedule, table=table, stacks=tuple(stacks), chunks=chunks)

    def __str__(self) -> str:
        """`1f1b, 4 stages of 2, 3, 3 and 2 layers, 8 micro-batches, bubble 27%`."""
        *some, last = self.layers.sum(axis=0).tolist()
        layers = f"{last}" if set(some) <= {last} else f"{', '.join(map(str, some))} and {last}"
        layers += " layer" if layers == "1" else " layers"
        parts = f" in {self.table.shape.chunks} parts" if self.table.shape.chunks > 1 else ""
        micros, few = self.table.shape.micro_batches, ""
        if micros < self.stages:
            few = f"; with {self.stages} of them or more (train.accumulation) it is smaller"
        return (
            f"{self.schedule}, {self.stages} stages of {layers}{parts},"
            f" {micros} micro-batch{'es' * (micros > 1)}, bubble {self.table.bubble:.0%}{few}"
        )

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.table.shape.stages

    @property
    def last_chunk(self) -> int:
        """The number of the chunk that ends with the model's last part."""
        return self.table.shape.chunks - 1

    @cached_property
    def stack_of(self) -> tuple[int, ...]:
        """The stack that each chunk is of."""
        return tuple(chunk // self.chunks for chunk in range(self.table.shape.chunks))

    @cached_property
    def layers(self) -> np.ndarray:
        """[chunks, stages] int: the layers of each part."""
        parts = [divide(number, self.chunks * self.stages) for number in self.stacks]
        return np.array(parts).reshape(-1, self.stages)

    @cached_property
    def first(self) -> np.ndarray:
        """[chunks, stages] int: the number of each part's first layer within its stack."""
        parts = self.layers.reshape(len(self.stacks), -1)
        return (np.cumsum(parts, axis=1) - parts).reshape(-1, self.stages)

    @cached_property
    def most(self) -> tuple[int, ...]:
        """The most layers that a part of each stack has."""
        return tuple(int(part.max()) for part in self.layers.reshape(len(self.stacks), -1))

    def chunks_of(self, stack: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Of a stack's parts, [chunks, stages] each: the first layer and how many; and the most of one."""
        own = slice(stack * self.chunks, (stack + 1) * self.chunks)
        return self.first[own], self.layers[own], self.most[stack]

    @cached_property
    def rows(self) -> Rows[np.ndarray]:
        """What each stage does in each tick."""
        return place(self.table, self.layers)

    @cached_property
    def slots(self) -> Slots:
        """Places for what waits."""
        return slots_of(self.table)

    def counts(self, stack: int, kind: Kind) -> frozenset[int]:
        """How many layers of a stack are done in a tick."""
        return frozenset((self.rows.high - self.rows.low)[self._turns(stack, kind)].tolist())

    def turns(self, stack: int, kind: Kind) -> tuple[int, int]:
        """The ticks in which a stage does something of a kind with a stack, and the layers it does in them.

        Each of the stage that has most.
        """
        mine = self._turns(stack, kind)
        layers = np.where(mine, self.rows.high - self.rows.low, 0)
        return int(mine.sum(axis=0).max()), int(layers.sum(axis=0).max())

    def _turns(self, stack: int, kind: Kind) -> np.ndarray:
        return (self.rows.kind == KINDS.index(kind)) & (np.array(self.stack_of)[self.rows.chunk] == stack)
