"""Instances of a model that train apart and are averaged now and then."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.section import Section


class AverageConfig(Section):
    """Instances of the model, each on its own part of every batch, whose parameters are averaged.

    Each has its own optimizer state, and clips and guards its own gradient. Between two averages no
    instance hears of another.
    """

    conditions = (
        Condition(fields=("outer_learning_rate", "outer_momentum"), other="outer", values=("nesterov",)),
        Condition(
            fields=("instance", "wait_seconds", "fragments", "delay", "sent_as"), other="folder", unless=None
        ),
        Condition(fields=("kept",), other="delay", unless=0),
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

    folder: str | None = None
    """Where the instances meet, if each is a run of its own, with a name of its own, on machines that share
    nothing else: one that dies is left out of an average, and is in the next once it is started again. null:
    all are in this run, and its devices average."""
    instance: NonNegativeInt = 0
    """Which of them this run is, from 0."""
    wait_seconds: float = Field(default=600.0, gt=0.0)
    """How long an average waits for instances that are not there, from when it could be made without."""
    fragments: PositiveInt = 1
    """Parts of the model that are averaged in turn, `every` / fragments steps apart (streaming DiLoCo, arXiv
    2501.18512): each n-th layer."""
    delay: NonNegativeInt = 0
    """Steps from sending a fragment to taking its average, in which it is sent beside them."""
    kept: float = Field(default=0.5, ge=0.0, lt=1.0)
    """The share of its own parameters that an instance keeps where an average comes later than it was sent:
    steps since then are in them alone."""
    sent_as: Literal["float32", "bfloat16", "float8", "int4"] = "float32"
    """What the way from an instance to the last average is sent as; 8 and 4 bits with a scale for each 64."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.folder is None:
            return self
        if not self.apart:
            raise ValueError("folder is not read with every=1 and outer=none; set every > 1, or remove it")
        if self.instances is None:
            raise ValueError("folder: set instances to how many meet there")
        if self.instance >= self.instances:
            raise ValueError(
                f"instance={self.instance} must be below instances={self.instances}; they are counted from 0"
            )
        if self.every % self.fragments:
            fits = max(n for n in range(1, self.fragments + 1) if self.every % n == 0)
            raise ValueError(
                f"fragments={self.fragments} does not divide every={self.every}; set fragments={fits}"
            )
        if self.delay >= self.every // self.fragments:
            raise ValueError(
                f"delay={self.delay} must be below the {self.every // self.fragments} steps from one fragment"
                " to the next"
            )
        return self

    @property
    def apart(self) -> bool:
        """Whether there are instances at all."""
        return self.every > 1 or self.outer != "none"

    @property
    def runs(self) -> int:
        """How many runs share each batch."""
        return 1 if self.folder is None else self.instances or 1
