"""The config tree and its readers."""

from stack.config.data import DataConfig, SourceConfig
from stack.config.errors import ConfigError, StackError
from stack.config.mesh import AXES, MeshConfig
from stack.config.model import (
    BlockConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    ParallelDecoderConfig,
    RopeConfig,
)
from stack.config.objective import CausalConfig, ObjectiveConfig
from stack.config.optimizer import GroupConfig, OptimizerConfig, ScheduleConfig
from stack.config.reading import dump, load, parse, replace, schema
from stack.config.stability import StabilityConfig
from stack.config.target import TargetConfig
from stack.config.tracking import TrackingConfig
from stack.config.train import CheckpointConfig, EvalConfig, SampleConfig, TrainConfig
from stack.config.tree import Config

__all__ = [
    "AXES",
    "BlockConfig",
    "CausalConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EvalConfig",
    "GroupConfig",
    "LanguageConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelDecoderConfig",
    "RopeConfig",
    "SampleConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StabilityConfig",
    "StackError",
    "TargetConfig",
    "TrackingConfig",
    "TrainConfig",
    "dump",
    "load",
    "parse",
    "replace",
    "schema",
]
