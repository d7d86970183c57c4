"""What a run was is compared with what it would be: by name, with old and new, before anything is done."""

import re
from dataclasses import asdict
from typing import Any

import pytest

from stack.config import Config, ConfigError, StackError
from stack.config.fields import flatten
from stack.data.mixture import version
from stack.hardware.defaults import Kind, Setting, Value
from stack.train.record import (
    _IDENTITY,
    Record,
    compare,
    extension,
    rate,
    schedule_note,
    settings_note,
    version_note,
)

DATA = {"tokenizer": "aa" * 16, "corpus": "bb" * 16, "packing": "cc" * 16, "rows": "1", "order": "1"}
CONFIG = Config().replace("train.steps=1000", "optimizer.schedule.warmup_steps=10", "model.position=rotary")


def recorded(config: Config = CONFIG, **changes: Any) -> Record:
    return Record(config=config.model_dump(mode="json"), data=DATA, rows=8, **changes)


def told(*overrides: str, data: dict[str, str] = DATA, **options: Any) -> list[dict[str, Any]]:
    return compare(recorded(), CONFIG.replace(*overrides), data, place="runs/x", **options)


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=1", "seed 0 -> 1"),
        ("init_from=runs/x", "init_from null -> runs/x"),
        ("model.rope.theta=500000", "model.rope.theta 10000.0 -> 500000.0"),
        ("model.norm_epsilon=1e-6", "model.norm_epsilon 1e-05 -> 1e-06"),
        ("model.mlp=swiglu", "model.mlp gelu_tanh -> swiglu"),
        ("model.sliding_window=64", "model.sliding_window null -> 64"),
        ("model.attention_softcap=30", "model.attention_softcap null -> 30.0"),
        ("model.vocab_size=258", "model.vocab_size 257 -> 258"),
        ("model.dtype=float32", "model.dtype bfloat16 -> float32"),
        ("model.residual_dropout=0.1", "model.residual_dropout 0.0 -> 0.1"),
        ("objective.z_loss=1e-4", "objective.z_loss 0.0 -> 0.0001"),
        ("optimizer.kind=lion", "optimizer.kind adamw -> lion"),
        ("optimizer.beta2=0.9", "optimizer.beta2 0.95 -> 0.9"),
        ("optimizer.weight_decay=0", "optimizer.weight_decay 0.1 -> 0.0"),
        ("optimizer.clip_norm=null", "optimizer.clip_norm 1.0 -> null"),
        ("train.batch_size=16", "train.batch_size 8 -> 16"),
        ("stability.spike_deviations=6", "stability.spike_deviations 0.0 -> 6.0"),
        ("train.grad_reduce_dtype=bfloat16", "train.grad_reduce_dtype float32 -> bfloat16"),
        ("kernels.matmul=fp8", "kernels.matmul xla -> fp8"),
        ("data.shuffle=false", "data.shuffle true -> false"),
        ("data.packed=false", "data.packed true -> false"),
        ("data.heldout_fraction=0.5", "data.heldout_fraction 0.01 -> 0.5"),
    ],
)
def test_another_function_or_order_of_data_is_refused_by_name_unless_it_is_accepted(override, change) -> None:
    name = change.split()[0]
    with pytest.raises(StackError) as error:
        told(override)
    assert str(error.value) == (
        f"runs/x: the run began otherwise: {change}; restore it, give a new run another name with name=...,"
        f" or go on all the same with --accept {name}"
    )
    _, old, _, new = change.split()
    for accepted in (name, name.split(".")[0]):
        assert told(override, accept=[accepted]) == [{"field": name, "old": old, "new": new}]


def test_every_field_is_of_the_run_or_free() -> None:
    """A new field must be thought about: what is listed here may change from one start to the next."""
    names = {name.split(".0")[0] for name, _ in flatten(Config().model_dump(mode="json"))}
    free = {
        name
        for name in names
        if not name.startswith(("model.", "objective.", "optimizer.", "data.", "average.")) and name != "seed"
    }
    assert free - set(_IDENTITY) == {
        *("name", "output_dir", "target", "kernels.attention", "runtime.compiler_options"),
        *(f"mesh.{field}" for field in type(Config().mesh).model_fields if not field.endswith("_dtype")),
        *(f"eval.{name}" for name in type(Config().eval).model_fields),
        *(f"sample.{name}" for name in type(Config().sample).model_fields),
        *(f"tracking.{name}" for name in type(Config().tracking).model_fields),
        *(f"checkpoint.{name}" for name in type(Config().checkpoint).model_fields),
        *("train.steps", "train.accumulation", "train.remat", "train.offload_optimizer"),
        *("train.stop_after_minutes", "stability.most_in_row", "stability.then", "stability.save_batches"),
        *(
            "stability.recompute_every",
            "train.offload_activations",
            "train.log_every",
            "train.tensorboard",
            "train.profile_steps",
            "train.audit",
            "train.silent_seconds",
            "train.stall_minutes",
        ),
    }


@pytest.mark.parametrize(
    "override",
    [
        *("name=other", "train.steps=2000", "train.accumulation=2", "train.remat=full", "train.log_every=1"),
        *("mesh.data=2", "checkpoint.every=7", "eval.every=3", "sample.prompt=x", "data.cache_dir=elsewhere"),
        *("kernels.attention=xla", "optimizer.learning_rate=1", "optimizer.schedule.kind=constant"),
    ],
)
def test_how_a_run_is_run_is_free(override) -> None:
    assert told(override) == []


def test_a_weight_that_changes_is_told_with_its_points_and_the_order() -> None:
    order = DATA | {"order": version([1.0, ((0, 1.0), (9, 2.0))])}
    with pytest.raises(StackError) as error:
        told("data.sources.0.weight=[[0, 1], [9, 2]]", data=order)
    assert "data.sources.0.weight 1.0 -> [[0, 1.0], [9, 2.0]], data.order 1 -> 1.1;" in str(error.value)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("tokenizer", "data.tokenizer content aaaaaaaa -> content 22222222"),
        ("corpus", "data.sources content bbbbbbbb -> content 22222222"),
        ("rows", "data.rows 1 -> 2"),
        ("order", "data.order 1 -> 2"),
    ],
)
def test_other_text_rows_or_order_are_refused(part, change) -> None:
    other = DATA | {part: "2" if len(DATA[part]) == 1 else "2" * 32}
    with pytest.raises(StackError, match=re.escape(change)):
        told(data=other)
    assert len(told(data=other, accept=[change.split()[0]])) == 1
    with pytest.raises(StackError, match=re.escape(change)):
        told(data=other, reading=True)


def test_what_was_recorded_before_there_were_versions_is_of_the_first() -> None:
    old = Record(
        config=CONFIG.model_dump(mode="json"), data={k: v for k, v in DATA.items() if k != "rows"}, rows=8
    )
    assert compare(old, CONFIG, DATA, place="runs/x") == []


def test_an_evaluation_or_a_sample_depends_on_the_model_and_the_data_alone() -> None:
    free = ["optimizer.beta2=0.9", "train.batch_size=16", "eval.batch_size=2"]
    assert told(*free, reading=True) == []
    with pytest.raises(StackError, match=r"model\.dtype bfloat16 -> float32"):
        told("model.dtype=float32", reading=True)
    with pytest.raises(StackError, match=r"data\.heldout_fraction 0\.01 -> 0\.5"):
        told("data.heldout_fraction=0.5", reading=True)


def test_a_section_that_is_new_is_told() -> None:
    config = CONFIG.model_dump(mode="json")
    old = Record(config=config | {"model": config["model"] | {"rope": None}}, data=DATA, rows=8)
    with pytest.raises(StackError, match=r"model\.rope null -> 10000\.0 \(model\.rope\.theta\)"):
        compare(old, CONFIG, DATA, place="runs/x")


def test_a_field_that_is_new_in_this_version_changes_nothing() -> None:
    config = CONFIG.model_dump(mode="json")
    del config["model"]["logit_softcap"]
    assert compare(Record(config=config, data=DATA, rows=8), CONFIG, DATA, place="runs/x") == []


def test_a_run_that_was_recorded_before_weights_could_be_named_began_without_them() -> None:
    config = CONFIG.model_dump(mode="json")
    del config["init_from"]
    old = Record(config=config, data=DATA, rows=8)
    assert compare(old, CONFIG, DATA, place="runs/x") == []
    with pytest.raises(StackError, match=r"init_from null -> runs/y"):
        compare(old, CONFIG.replace("init_from=runs/y"), DATA, place="runs/x")


def test_accepting_what_is_no_field_is_refused_and_what_is_the_same_is_not() -> None:
    with pytest.raises(
        ConfigError, match=r"--accept model\.dtyp: there is no such field; did you mean model\.dt"
    ):
        told(accept=["model.dtyp"])
    assert told(accept=["model.dtype", "data.order"]) == [], "a run that is requeued says it again"


def test_the_jump_of_a_learning_rate_is_told_with_the_way_out() -> None:
    longer = CONFIG.replace("train.steps=2000")
    note = schedule_note(recorded(), longer, 1000)
    assert note is not None
    assert note.startswith(
        "the learning rate goes from 3e-05 to 0.000166 at step 1,000: its schedule ends with"
    )
    override = re.search(r"To keep it there: (\S+);", note)
    assert override is not None
    held = longer.replace(override[1])
    assert rate(held, 1500) == pytest.approx(3e-5)
    assert schedule_note(recorded(), held, 1000) is None
    again = longer.replace("optimizer.schedule.start_step=1000")
    assert rate(again, 1000) == pytest.approx(3e-5)  # A tenth of the peak, by 10 steps of warmup.
    assert rate(again, 1009) == pytest.approx(3e-4)
    assert rate(again, 1999) == pytest.approx(3e-5, rel=1e-3)
    other = schedule_note(recorded(), CONFIG.replace("optimizer.learning_rate=1"), 500)
    assert other is not None
    assert other.endswith("as optimizer.learning_rate or schedule changed")
    assert schedule_note(recorded(), CONFIG, 500) is None


@pytest.mark.parametrize(
    ("overrides", "way"),
    [
        (["optimizer.schedule.kind=constant"], []),
        ([], ["optimizer.schedule.decay_steps=990"]),
        (["optimizer.schedule.final_fraction=0"], ["optimizer.schedule.start_step=1000"]),
    ],
)
def test_the_advice_to_train_for_longer_does_not_raise_the_rate_in_silence(overrides, way) -> None:
    config = CONFIG.replace(*overrides)
    assert extension(config) == ["train.steps=2000", *way]
    longer = config.replace(*extension(config))
    if "start_step" not in str(way):
        assert rate(longer, 1000) == pytest.approx(rate(config, 1000), rel=1e-6)


def test_other_options_of_the_compiler_are_told_if_they_were_recorded() -> None:
    def setting(name: str, value: Value, kind: Kind = "option") -> Setting:
        return Setting(name=name, kind=kind, value=value, by="stack")

    then = [
        setting("optimization_level", "O1"),
        setting("xla_a", 1),
        setting("NCCL_DEBUG", "INFO", "variable"),
    ]
    record = recorded(settings=[asdict(one) for one in then])
    assert settings_note(record, [*then[:2], setting("xla_dump_to", "x")]) is None
    note = settings_note(record, [setting("xla_a", 2), setting("xla_b", True)])
    changes = "optimization_level O1 -> not set, xla_a 1 -> 2, xla_b not set -> True"
    assert note == f"compiled with {changes}: the same run, but not bit for bit"
    assert settings_note(recorded(), then) is None


def test_other_versions_are_told() -> None:
    assert version_note(recorded()) is None
    note = version_note(recorded(versions={"jax": "0.1", "optax": None}))
    assert note is not None
    assert note.startswith("jax 0.1 -> ")


def test_other_bits_of_attention_dropout_are_told_where_there_is_any() -> None:
    assert version_note(recorded(versions={})) is None
    drops = CONFIG.replace("model.attention_dropout=0.1")
    assert version_note(recorded(drops)) is None
    note = version_note(recorded(drops, versions={}))
    assert note is not None
    assert note.startswith("attention dropout 1 -> 2 since")
