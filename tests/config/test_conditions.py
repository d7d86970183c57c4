"""Fields that are read only beside some value of another are refused elsewhere, in one line.

The cases are those of the sections' own tables, so a new condition is tested where it is stated.
"""

import builtins
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from stack.config import (
    AverageConfig,
    Config,
    ConfigError,
    DecoderConfig,
    EvalConfig,
    MeshConfig,
    SourceConfig,
)
from stack.config.condition import Condition
from stack.config.explain import annotation_at, sections_of
from stack.config.section import Section

NOT_BUILT = ("context", "expert")
"""Mesh axes that are refused for another reason where they are read."""


def sections_below(root: Any) -> list[Any]:
    """A section and all that may stand in it."""
    inside = [annotation_at(root, (name,)) for name in root.model_fields]
    inside = [get_args(one)[0] if get_origin(one) is tuple else one for one in inside]
    below = [deeper for one in inside for section in sections_of(one) for deeper in sections_below(section)]
    return list(dict.fromkeys([root, *below]))


CASES = [
    pytest.param(section, condition, field, id=f"{section.__name__}.{field}-{condition.other}")
    for section in sections_below(Config)
    for condition in section.conditions
    for field in condition.fields
]


def build(section: Any, values: dict[str, Any]) -> Section:
    """A section with these fields, named by their paths; sources and meetings have what they need."""
    fields: dict[str, Any] = {}
    for path, value in values.items():
        *owners, leaf = path.split(".")
        inner = fields
        for owner in owners:
            inner = inner.setdefault(owner, {})
        inner[leaf] = value
    if section is SourceConfig and fields.get("kind", "python") not in ("python", "synthetic"):
        fields.setdefault("path", "somewhere")
    if section is AverageConfig and fields.get("folder"):
        fields |= {"every": 8, "instances": 2}
    return section(**fields)


def value_at(section: Any, path: str) -> Any:
    for name in path.split("."):
        section = getattr(section, name)
    return section


def type_at(section: Any, path: str) -> Any:
    """The type of a field without null and limits."""
    annotation = annotation_at(section, tuple(path.split(".")))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def other_value(section: Any, path: str) -> Any:
    """A value of a field that is not its default, as a file would give it."""
    kind, default = type_at(section, path), value_at(section(), path)
    if sections_of(kind):
        first = next(iter(kind.model_fields))
        return {first: other_value(kind, first)}
    if get_origin(kind) is tuple:
        choices = get_args(get_args(kind)[0])
        if choices:
            return [*default, next((choice for choice in choices if choice not in default), choices[0])]
        return ["other"]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != default)
    match kind:
        case builtins.bool:
            return not default
        case builtins.int:
            return abs(default or 0) + 1
        case builtins.float:
            return (default or 1.0) / 2
        case builtins.str:
            return "other"
    raise AssertionError(f"no other value for a {kind}")


def deciding(section: Any, condition: Condition) -> tuple[list[Any], list[Any]]:
    """Values of the field that decides: those with which the others are read, and those without."""
    kind = type_at(section, condition.other)
    if kind is str:
        return ["somewhere"], [None]
    if not condition.values:
        return [(condition.unless or 0) + (1 if kind is int else 0.5)], [condition.unless]
    choices = [False, True] if kind is bool else list(get_args(kind))
    assert set(condition.values) < set(choices), "a condition names some of the values that there are"
    return list(condition.values), [choice for choice in choices if choice not in condition.values]


@pytest.mark.parametrize(("section", "condition", "field"), CASES)
def test_a_field_that_is_not_read_keeps_its_default(section, condition, field):
    value = other_value(section, field)
    read, unread = deciding(section, condition)
    others = [other for other in section.conditions if field in other.fields and other is not condition]
    beside = {other.other: deciding(section, other)[0][0] for other in others}
    # What the field that decides needs for itself.
    grounds = [other for other in section.conditions if condition.other in other.fields]
    below = {other.other: deciding(section, other)[0][0] for other in grounds}

    for decisive in unread:
        build(section, {condition.other: decisive} | below)
        with pytest.raises(ConfigError) as error:
            build(section, {condition.other: decisive, field: value} | below | beside)
        line = str(error.value)
        assert "\n" not in line
        assert f"not read with {condition.other}=" in line
        assert field in line.partition("not read")[0]
        assert f"or set {condition.remedy}" in line

    for decisive in read:
        built = build(section, {condition.other: decisive} | below | beside)
        if field in NOT_BUILT or field == "path":  # A source that reads its path has one already.
            continue
        changed = build(section, {condition.other: decisive, field: value} | below | beside)
        assert value_at(changed, field) != value_at(built, field)


@pytest.mark.parametrize("field", NOT_BUILT)
def test_an_axis_that_is_not_built_is_refused_as_such(field):
    with pytest.raises(ConfigError, match="not built yet"):
        MeshConfig(**{field: 2})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"optimizer": {"kind": "lion", "epsilon": 1e-6}},
            "optimizer: epsilon=1e-06 is not read with kind=lion; remove it, or set kind=adamw or muon",
        ),
        (
            {"optimizer": {"schedule": {"decay_fraction": 0.5}}},
            "optimizer.schedule: decay_fraction=0.5 is not read with kind=cosine; remove it, or set kind=wsd",
        ),
        (
            {"model": {"scan_unroll": 4}, "train": {"remat": "full"}},
            (
                "model.scan_unroll=4 is not read with train.remat=full; remove it, "
                "or set train.remat=none or auto"
            ),
        ),
        (
            {"data": {"heldout_fraction": 0}, "eval": {"every": 100, "batch_size": 8, "baselines": True}},
            (
                "eval.every=100, eval.batch_size=8 and eval.baselines=true are not read with "
                "data.heldout_fraction=0.0; remove them, or set data.heldout_fraction > 0"
            ),
        ),
        (
            {"model": {"rope": {"theta": 5e5, "scaling": "linear", "factor": 2.0}}},
            (
                "model: rope.theta=500000.0, rope.scaling='linear' and rope.factor=2.0 are not read with "
                "position=learned; remove them, or set position=rotary"
            ),
        ),
        (
            {"model": {"attention_pattern": ["local", "global"]}},
            (
                'model: attention_pattern=["local", "global"] is not read with sliding_window=null; '
                "remove it, or set sliding_window"
            ),
        ),
        (
            {"data": {"sources": [{"path": "a"}]}},
            (
                "data.sources.0: path='a' is not read with kind=python; remove it, or set kind=text, code, "
                "jsonl, parquet, arrayrecord, hf or tokens"
            ),
        ),
        (
            {"mesh": {"auto": True, "zero": 1}},
            "mesh: zero=1 is not read with auto=true; remove it, or set auto=false",
        ),
        (
            {"mesh": {"sequence_parallel": True}},
            "mesh: sequence_parallel=true is not read with tensor=1; remove it, or set tensor > 1",
        ),
    ],
)
def test_the_line_names_every_such_field_and_what_would_have_it_read(fields, told):
    with pytest.raises(ConfigError) as error:
        Config(**fields)
    assert str(error.value) == f"Config: {told}"


def test_both_sides_may_be_built_before_they_meet():
    """Sections built in Python are refused where they are put together."""
    with pytest.raises(ConfigError, match=r"^Config: eval\.baselines=true is not read with"):
        Config(eval=EvalConfig(baselines=True), data={"heldout_fraction": 0.0})  # pyrefly: ignore


def test_sequence_parallelism_waits_for_a_tensor_axis_that_takes_what_is_left():
    assert MeshConfig(fsdp=1, tensor=-1, sequence_parallel=True).sequence_parallel


def test_a_table_is_inherited_with_the_fields():
    assert {field for condition in DecoderConfig.conditions for field in condition.fields} == {
        *("rope", "local_rope_theta", "attention_pattern"),
        "position_init_std",
    }
