"""The whole config: one frozen tree, the same names in YAML, on the command line and in Python."""

from typing import Self

from pydantic import NonNegativeInt, model_validator

from stack.config.data import DataConfig
from stack.config.mesh import MeshConfig
from stack.config.model import ModelConfig
from stack.config.optimizer import OptimizerConfig
from stack.config.section import Section
from stack.config.train import CheckpointConfig, EvalConfig, SampleConfig, TrainConfig


class Config(Section):
    """Everything a run needs to know."""

    name: str = "run"
    """Name of the run; its folder is output_dir/name."""
    output_dir: str = "runs"
    """Where run folders are made."""
    seed: NonNegativeInt = 0
    """The one seed of initialisation, data order and dropout."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.sequence_length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds model.max_length={self.model.max_length}"
            )
        schedule = self.optimizer.schedule
        if schedule.kind != "constant" and schedule.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.schedule.warmup_steps={schedule.warmup_steps} leaves nothing of train.steps={self.train.steps}"
            )
        return self
