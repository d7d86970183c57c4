"""The config tree and its readers."""

from stack.config.adapter import AdapterConfig, AdapterTargetConfig
from stack.config.average import AverageConfig
from stack.config.data import DataConfig, SourceConfig, Weight, weight_at
from stack.config.errors import ConfigError, StackError
from stack.config.kernels import Fp8Config, KernelsConfig
from stack.config.mesh import AXES, MeshConfig
from stack.config.model import (
    BlockConfig,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageConfig,
    ModelConfig,
    ParallelDecoderConfig,
    RopeConfig,
)
from stack.config.objective import (
    CausalConfig,
    ChatConfig,
    ChatPreferenceConfig,
    CompletionConfig,
    FillConfig,
    MaskedConfig,
    MaskedWordsConfig,
    ObjectiveConfig,
    PreferenceConfig,
    PreferredConfig,
    PrefixConfig,
    RecordsConfig,
    RemovalConfig,
    SentencesConfig,
    SpansConfig,
    UniLmConfig,
    WordsConfig,
)
from stack.config.optimizer import GroupConfig, OptimizerConfig, ScheduleConfig
from stack.config.reading import dump, load, parse, replace, schema
from stack.config.runtime import RuntimeConfig
from stack.config.stability import StabilityConfig
from stack.config.target import TargetConfig
from stack.config.tracking import TrackingConfig
from stack.config.train import CheckpointConfig, EvalConfig, SampleConfig, TrainConfig
from stack.config.tree import Config

__all__ = [
    "AXES",
    "AdapterConfig",
    "AdapterTargetConfig",
    "AverageConfig",
    "BlockConfig",
    "CausalConfig",
    "ChatConfig",
    "ChatPreferenceConfig",
    "CheckpointConfig",
    "CompletionConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "EncoderDecoderConfig",
    "EvalConfig",
    "FillConfig",
    "Fp8Config",
    "GroupConfig",
    "KernelsConfig",
    "LanguageConfig",
    "MaskedConfig",
    "MaskedWordsConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelDecoderConfig",
    "PreferenceConfig",
    "PreferredConfig",
    "PrefixConfig",
    "RecordsConfig",
    "RemovalConfig",
    "RopeConfig",
    "RuntimeConfig",
    "SampleConfig",
    "ScheduleConfig",
    "SentencesConfig",
    "SourceConfig",
    "SpansConfig",
    "StabilityConfig",
    "StackError",
    "TargetConfig",
    "TrackingConfig",
    "TrainConfig",
    "UniLmConfig",
    "Weight",
    "WordsConfig",
    "dump",
    "load",
    "parse",
    "replace",
    "schema",
    "weight_at",
]
