"""The config tree itself: small, documented, frozen, strict."""

import pydantic
import pytest

from stack.config import (
    Config,
    ConfigError,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from stack.config.explain import annotation_at, field_names, sections_of

FIELDS = list(field_names(Config))


def test_the_tree_can_be_looked_through():
    assert 90 < len(FIELDS) <= 330


def fields_at(path):
    """The field at a path, of each section that may stand there."""
    sections = sections_of(annotation_at(Config, path[:-1])) if path[:-1] else [Config]
    return [section.model_fields[path[-1]] for section in sections if path[-1] in section.model_fields]


def test_every_field_is_documented():
    for path in FIELDS:
        for field in fields_at(path):
            section = isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)
            text = field.annotation.__doc__ if section else field.description
            assert (text or "").rstrip().endswith("."), f"{path} has no docstring"


def test_every_field_has_a_default():
    for path in FIELDS:
        assert fields_at(path), path
        assert not any(field.is_required() for field in fields_at(path)), path


def test_a_config_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().model.num_layers = 4  # pyrefly: ignore[read-only]


def test_a_config_takes_keywords_only():
    with pytest.raises(TypeError):
        Config("name")  # pyrefly: ignore[bad-argument-count]


def test_a_list_stands_for_a_tuple():
    sources = [SourceConfig(kind="synthetic"), {"kind": "python"}]
    config = DataConfig(sources=sources)  # pyrefly: ignore[bad-argument-type]
    assert [source.kind for source in config.sources] == ["synthetic", "python"]


@pytest.mark.parametrize(
    ("section", "fields", "told"),
    [
        (SourceConfig, {"kind": "text"}, "a source of kind text needs a path"),
        (DataConfig, {"sources": [{"weight": 0.0}]}, "every source has weight 0"),
        (DataConfig, {"temperature": 2.0}, "temperature=2 evens out several sources, and there is one"),
        (OptimizerConfig, {"groups": [{"weight_decay": 0.0}]}, "parameters is empty; name some"),
        (OptimizerConfig, {"groups": [{"parameters": ["embed.*"]}]}, "a group has a learning_rate_factor or"),
        (MeshConfig, {"data": -1, "fsdp": -1}, "only one mesh axis may be -1, not data and fsdp"),
        (MeshConfig, {"tensor": 0}, "tensor=0: a mesh axis has at least 1 device"),
        (MeshConfig, {"context": 2}, "context=2: this axis is not built yet; set context=1"),
        (MeshConfig, {"expert": 2}, "expert=2: this axis is not built yet; set expert=1"),
        (DecoderConfig, {"embed_dim": 100}, "embed_dim=100 is not a multiple of num_heads=12; set head_dim"),
        (DecoderConfig, {"num_kv_heads": 5}, "num_heads=12 is not a multiple of num_kv_heads=5"),
        (
            DecoderConfig,
            {"position": "rotary", "head_dim": 3},
            "rotary positions need an even head width, not 3",
        ),
        (
            DecoderConfig,
            {"sliding_window": 8, "attention_pattern": ["global"]},
            "attention_pattern has no local layer; set sliding_window=null instead",
        ),
        (
            DecoderConfig,
            {"rope": {"scaling": "llama3", "low_frequency_factor": 4.0}},
            "rope: low_frequency_factor=4.0 must be below high_frequency_factor=4.0",
        ),
        (TrainConfig, {"accumulation": 3}, "batch_size=8 is not a multiple of accumulation=3"),
        (TrainConfig, {"profile_steps": [5, 5]}, "profile_steps=[5, 5]: the first must be below the second"),
        (
            Config,
            {"data": {"sequence_length": 2048}},
            "data.sequence_length=2048 exceeds model.max_length=1024",
        ),
        (
            Config,
            {"train": {"steps": 100}, "optimizer": {"schedule": {"warmup_steps": 100}}},
            "warmup_steps=100 leaves nothing of train.steps=100",
        ),
        (
            Config,
            {"train": {"profile_steps": [1, 2000]}},
            "train.profile_steps=[1, 2000] goes beyond train.steps=1000",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(section, fields, told):
    with pytest.raises(ConfigError) as caught:
        section(**fields)
    assert str(caught.value).startswith(f"{section.__name__}: ")
    assert told in str(caught.value)
