"""Instances of a model that train apart and are averaged now and then."""

from typing import Literal

from pydantic import Field, PositiveInt

from stack.config.condition import Condition
from stack.config.section import Section


class AverageConfig(Section):
    """Instances of the model, each on its own part of every batch, whose parameters are averaged.

    Each has its own optimizer state, and clips and guards its own gradient. Between two averages no
    instance hears of another.
    """

    conditions = (
        Condition(fields=("outer_learning_rate", "outer_momentum"), other="outer", values=("nesterov",)),
    )

    every: PositiveInt = 1
    """Steps from one average to the next (local SGD, arXiv 1805.09767); 1, with outer none, is data
    parallelism: gradients are summed over mesh.data at every step, and there are no instances."""
    outer: Literal["none", "nesterov"] = "none"
    """What becomes of an average: `none`, all instances go on from it; `nesterov`, from where a step of SGD
    with Nesterov momentum towards it comes to (DiLoCo, arXiv 2311.08105)."""
    instances: int | None = Field(default=None, ge=2)
    """Into how many parts train.batch_size is split; null: mesh.data. The numbers of a run depend on it, and
    not on how the instances lie on mesh.data, which is a multiple of them or divides them."""
    outer_learning_rate: float = Field(default=0.7, gt=0.0)
    """Of the outer step; 1 goes all the way to the average."""
    outer_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Of the outer step."""

    @property
    def apart(self) -> bool:
        """Whether there are instances at all."""
        return self.every > 1 or self.outer != "none"
