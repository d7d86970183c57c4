"""The rotation of a config.json, inside its options and beside them, as transformers 4 and 5 write it."""

import json
from pathlib import Path

import pytest

from stack.config import RopeConfig
from stack.config.errors import StackError
from stack.interop.hugging_face import config_from_hf

PUBLISHED = json.loads((Path(__file__).parents[1] / "goldens/hugging_face_configs.json").read_text())
LLAMA_3_1 = PUBLISHED["meta-llama/Llama-3.1-8B"]


def rope_of(**options):
    config = {key: value for key, value in LLAMA_3_1.items() if not key.startswith("rope")}
    return config_from_hf(config | options).rope


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = LLAMA_3_1["rope_scaling"]
UNSTATED = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}


def test_linear_rotation_is_read_under_both_names_of_its_kind():
    rope = RopeConfig(theta=10_000, scaling="linear", factor=4)
    assert rope_of(rope_scaling=LINEAR) == rope
    assert rope_of(rope_scaling={"type": "linear", "factor": 4}) == rope
    assert rope_of(rope_scaling={"type": "linear", **LINEAR}) == rope
    with pytest.raises(StackError, match=r'rope_scaling.rope_type="linear" and rope_scaling.type="llama3"'):
        rope_of(rope_scaling={"type": "llama3", **LINEAR})


@pytest.mark.parametrize("options", [{}, {"rope_scaling": None}, {"rope_parameters": {}}], ids=str)
def test_without_options_the_rotation_is_plain(options):
    assert rope_of(**options) == RopeConfig(theta=10_000)
    assert rope_of(rope_theta=7, **options) == RopeConfig(theta=7)


def test_two_groups_of_options_must_agree():
    assert rope_of(rope_scaling=LINEAR, rope_parameters=LINEAR) == rope_of(rope_scaling=LINEAR)
    assert rope_of(rope_scaling=None, rope_parameters=LINEAR) == rope_of(rope_scaling=LINEAR)
    message = r"rope_scaling=\{.*\} and rope_parameters describe two rotations; keep the right one"
    for parameters in (
        {"rope_type": "default"},
        LLAMA3,
        LINEAR | {"factor": 2.0},
        LINEAR | {"rope_theta": 7},
    ):
        with pytest.raises(StackError, match=message):
            rope_of(rope_scaling=LINEAR, rope_parameters=parameters)


@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
def test_the_base_inside_and_beside_the_options_must_agree(group):
    rope = RopeConfig(theta=5, scaling="linear", factor=4)
    assert rope_of(**{group: LINEAR | {"rope_theta": 5}}) == rope
    assert rope_of(**{group: LINEAR}, rope_theta=5) == rope
    assert rope_of(**{group: LINEAR | {"rope_theta": 5}}, rope_theta=5) == rope
    with pytest.raises(StackError, match=f"{group}.rope_theta=5 and rope_theta beside it name one thing"):
        rope_of(**{group: LINEAR | {"rope_theta": 5}}, rope_theta=6)


@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
def test_llama_3_reads_its_first_context_inside_and_beside_the_options(group):
    assert rope_of(**{group: UNSTATED}, original_max_position_embeddings=4096).original_length == 4096
    assert rope_of(**{group: LLAMA3}, original_max_position_embeddings=8192).original_length == 8192
    with pytest.raises(StackError, match=f"{group}.original_max_position_embeddings=8192 and .* one thing"):
        rope_of(**{group: LLAMA3}, original_max_position_embeddings=4096)
    with pytest.raises(StackError, match=f"{group}.original_max_position_embeddings is missing"):
        rope_of(**{group: UNSTATED})


def test_yarn_has_the_defaults_of_its_authors():
    rope = RopeConfig(theta=10_000, scaling="yarn", factor=4, original_length=131072)
    assert rope_of(rope_scaling=YARN) == rope, "the context is that of the model"
    assert rope_of(rope_scaling=YARN | {"beta_fast": None, "attention_factor": None}) == rope
    options = {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5}
    options |= {"original_max_position_embeddings": 4096}
    other = RopeConfig(
        theta=10_000,
        scaling="yarn",
        factor=4,
        original_length=4096,
        fast_turns=16,
        slow_turns=2,
        whole_channels=False,
        attention_factor=1.5,
    )
    assert rope_of(rope_scaling=YARN | options) == other


@pytest.mark.parametrize("options", [LINEAR, {"rope_type": "default"}, None], ids=str)
def test_other_rotations_do_not_read_the_first_context_beside_them(options):
    rope = rope_of(rope_scaling=options)
    assert rope_of(rope_scaling=options, original_max_position_embeddings=4096) == rope


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("linear", 'rope_scaling="linear" must be a mapping'),
        ([], r"rope_scaling=\[\] must be a mapping"),
        (
            {"rope_type": "longrope"},
            'rope_scaling.rope_type="longrope" is not supported; Stack has "default", "linear"',
        ),
        ({"rope_type": None}, "rope_scaling.rope_type=null is not supported"),
        ({"rope_type": "linear"}, "rope_scaling.factor is missing"),
        (LINEAR | {"factor": "4"}, 'rope_scaling.factor="4" must be a finite number'),
        (LINEAR | {"factor": 0}, "factor=0.0 must be greater than 0"),
        (LINEAR | {"beta_fast": 32}, "rope_scaling.beta_fast=32 is not a key"),
        (LINEAR | {"partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor=0.5 is not supported"),
        ({"factor": 4.0}, "rope_scaling.factor=4.0 is not a key"),
        ({"full_attention": LINEAR}, "rope_scaling.full_attention="),
        (LLAMA3 | {"low_freq_factor": 5.0}, "low_frequency_factor=5.0 must be below"),
        ({"rope_type": "yarn"}, "rope_scaling.factor is missing"),
        (YARN | {"beta_slow": 40}, "slow_turns=40.0 must be below fast_turns=32.0"),
        (YARN | {"mscale": 1.0}, "rope_scaling.mscale=1.0 is not a key"),
        (YARN | {"rope_theta": 1}, "theta=1.0 must be above 1"),
    ],
)
def test_a_rotation_that_stack_does_not_have_is_refused(options, message):
    with pytest.raises(StackError, match=message):
        rope_of(rope_scaling=options)
