"""Which layers of a config.json have the window, and by which rotation; Gemma's own keys, both ways."""

import json
from pathlib import Path

import pytest

from stack.config import BlockConfig, DecoderConfig, RopeConfig
from stack.config.errors import StackError
from stack.interop.hugging_face import config_from_hf
from stack.interop.hugging_face_files import config_to_hf
from stack.planner.formula.shapes import num_parameters

PUBLISHED = json.loads((Path(__file__).parents[1] / "goldens/hugging_face_configs.json").read_text())
QWEN_2_5, QWEN_3, GEMMA_2, GEMMA_3 = (
    PUBLISHED[name]
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b-it", "google/gemma-3-1b-it")
)
WINDOW = {"use_sliding_window": True, "sliding_window": 64}
SLIDING, FULL = ["sliding_attention"] * 24, ["full_attention"] * 24


def kinds(model: BlockConfig) -> str:
    """A letter for each layer."""
    return "".join("l" if local else "g" for local in model.local_layers)


@pytest.mark.parametrize(
    ("options", "window", "layers"),
    [
        ({}, None, "g" * 24),
        ({"layer_types": FULL}, None, "g" * 24),
        (WINDOW | {"max_window_layers": 0}, 64, "l" * 24),
        (WINDOW | {"max_window_layers": 20}, 64, "g" * 20 + "l" * 4),
        (WINDOW | {"max_window_layers": 24}, None, "g" * 24),
        (WINDOW | {"max_window_layers": 99}, None, "g" * 24),
        (WINDOW | {"layer_types": SLIDING}, 64, "l" * 24),
        (WINDOW | {"layer_types": SLIDING[:8] + FULL[:16]}, 64, "l" * 8 + "g" * 16),
        (WINDOW | {"layer_types": (FULL[:1] + SLIDING[:2]) * 8, "max_window_layers": 0}, 64, "gll" * 8),
        (WINDOW | {"layer_types": FULL, "max_window_layers": 0}, None, "g" * 24),
        (WINDOW | {"sliding_window": None, "max_window_layers": 0}, None, "g" * 24),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [QWEN_2_5, QWEN_3 | {"num_hidden_layers": 24}], ids=["qwen2", "qwen3"])
def test_a_window_holds_for_the_layers_that_are_told(config, options, window, layers):
    model = config_from_hf(config | options)
    assert (model.window, kinds(model)) == (window, layers)
    again = config_from_hf(config_to_hf(model))
    assert (again.window, kinds(again), again.attention_pattern) == (window, layers, model.attention_pattern)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (QWEN_2_5, {"layer_types": SLIDING}, "layer_types=.* needs a window, but sliding_window is null or"),
        (
            QWEN_2_5,
            WINDOW | {"sliding_window": None, "layer_types": SLIDING},
            "layer_types=.* needs a window",
        ),
        (QWEN_2_5, WINDOW | {"layer_types": SLIDING[1:]}, "layer_types=.* has 23 entries, but num_hidden_l"),
        (QWEN_2_5, {"layer_types": ["chunked_attention"] * 24}, "layer_types=.* is not supported; Stack has"),
        (QWEN_2_5, {"layer_types": "full_attention"}, 'layer_types="full_attention" is not supported'),
        (QWEN_2_5, {"layer_types": [["full_attention"]] * 24}, "layer_types=.* is not supported"),
        (QWEN_2_5, WINDOW | {"sliding_window": 0}, "sliding_window=0 must be a whole number of at least 1"),
        (QWEN_2_5, {"use_sliding_window": None}, "use_sliding_window=null must be true or false"),
        (QWEN_2_5, {"use_mrope": True}, "use_mrope=true is not supported; Stack has false"),
        (GEMMA_2, {"sliding_window": None}, "sliding_window=null needs a window"),
        (GEMMA_3, {"layer_types": (SLIDING[:2] + FULL[:11]) * 2}, "sliding_window_pattern=6 and layer_types"),
        (GEMMA_3, {"sliding_window_pattern": 0}, "sliding_window_pattern=0 must be a whole number of at le"),
        (GEMMA_3, {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta=5.0 is not a key"),
        (
            GEMMA_3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters=.* stretches sliding_attention by itself, which Stack does not have",
        ),
        (
            GEMMA_3,
            {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}},
            "rope_parameters.sliding_attention.rope_theta=5.0 and rope_local_base_freq beside it name one",
        ),
    ],
)
def test_another_window_is_refused(config, options, message):
    with pytest.raises(StackError, match=message):
        config_from_hf(config | options)


GEMMA_2_HERE = DecoderConfig(
    vocab_size=256000,
    max_length=8192,
    num_layers=26,
    embed_dim=2304,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_dim=9216,
    norm="rmsnorm_zero_centered",
    norm_placement="both",
    norm_epsilon=1e-6,
    mlp="geglu",
    position="rotary",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    sliding_window=4096,
    attention_pattern=("local", "global"),
    attention_softcap=50.0,
    logit_softcap=30.0,
    scale_embedding=True,
    scale_residual_init=False,
)
GEMMA_3_HERE = GEMMA_2_HERE.model_copy(
    update={
        "vocab_size": 262144,
        "max_length": 32768,
        "embed_dim": 1152,
        "num_heads": 4,
        "num_kv_heads": 1,
        "mlp_dim": 6912,
        "qk_norm": True,
        "rope": RopeConfig(theta=1_000_000),
        "local_rope_theta": 10_000.0,
        "sliding_window": 512,
        "attention_pattern": (*["local"] * 5, "global"),
        "attention_softcap": None,
        "logit_softcap": None,
    }
)


def test_gemma_is_read():
    assert config_from_hf(GEMMA_2) == GEMMA_2_HERE
    assert config_from_hf(GEMMA_3) == GEMMA_3_HERE
    assert kinds(GEMMA_3_HERE) == "lllllg" * 4 + "ll"


def test_gemma_3_as_transformers_5_writes_it():
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    newer = {key: value for key, value in GEMMA_3.items() if key not in old}
    newer["layer_types"] = [
        "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)
    ]
    newer["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert config_from_hf(newer) == GEMMA_3_HERE
    newer["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    scaled = RopeConfig(theta=1_000_000, scaling="linear", factor=8.0)
    assert config_from_hf(newer).rope == scaled
    assert config_from_hf(newer).local_rope_theta == 10_000
    assert config_from_hf(GEMMA_3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}).rope == scaled


def test_absent_keys_of_gemma_have_the_defaults_of_transformers():
    sizes = {"vocab_size": 64, "num_hidden_layers": 7, "hidden_size": 64, "num_attention_heads": 4}
    two, three = (
        config_from_hf(sizes | {"model_type": family, "intermediate_size": 128})
        for family in ("gemma2", "gemma3_text")
    )
    assert (two.max_length, two.window, kinds(two)) == (8192, 4096, "lglglgl")
    assert (three.max_length, three.window, kinds(three)) == (131072, 4096, "lllllgl")
    assert (two.attention_softcap, two.logit_softcap) == (50.0, 30.0)
    assert (three.attention_softcap, three.logit_softcap) == (None, None)
    assert (two.rope.theta, two.local_rope_theta) == (10_000, None)
    assert (three.rope.theta, three.local_rope_theta) == (1_000_000, 10_000)
    for model in (two, three):
        assert (model.kv_heads, model.head_width, model.attention_scale) == (4, 256, None)
        assert model.tied_embeddings


LOCAL = {"local_rope_theta": 100.0}
LINEAR = {"rope": {"scaling": "linear", "factor": 8.0}}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": True, "attention_softcap": None},
        {"qk_norm": True, "attention_softcap": None, "num_layers": 8, "qkv_bias": True, "out_bias": True},
        {"qk_norm": True, "attention_softcap": None, "attention_pattern": ["global", "local"]} | LOCAL,
        {"qk_norm": True, "attention_softcap": None} | LINEAR | LOCAL,
        {"qk_norm": True, "attention_softcap": None, "local_rope_theta": None} | LINEAR,
        {"sliding_window": None, "attention_pattern": ["local"], "logit_softcap": None},
        {"attention_pattern": ["local"], "attention_scale": 144**-0.5, "tied_embeddings": False},
    ],
    ids=str,
)
def test_gemma_survives_the_way_out_and_in(change):
    config = DecoderConfig.model_validate(GEMMA_2_HERE.model_dump() | change)
    keys = json.loads(json.dumps(config_to_hf(config)))
    assert keys["model_type"] == ("gemma3_text" if config.qk_norm else "gemma2")
    assert config_from_hf(keys) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_embedding": False}, "scale_embedding=False: transformers' Gemma 2 has scale_embedding=True"),
        ({"norm_placement": "pre"}, "norm_placement=pre: transformers' Gemma 2 has norm_placement=both"),
        (
            {"attention_scale": 0.07},
            r"attention_scale=0.07: transformers' Gemma 2 has attention_scale=0.07001",
        ),
        (
            LOCAL,
            "local_rope_theta=100.0: transformers' Gemma 2 has local_rope_theta=None",
        ),
        ({"qk_norm": True}, "attention_softcap=50.0: transformers' Gemma 3 has attention_softcap=None"),
        ({"norm": "rmsnorm"}, "model.*: transformers' Mistral has attention_pattern="),
    ],
    ids=str,
)
def test_what_gemma_has_no_key_for_is_not_exported(change, message):
    config = DecoderConfig.model_validate(GEMMA_2_HERE.model_dump() | change)
    with pytest.raises(StackError, match=message):
        config_to_hf(config)


@pytest.mark.parametrize(
    ("config", "sizes", "parameters"),
    [
        (GEMMA_2_HERE, {}, 2_614_341_888),
        (GEMMA_2_HERE, {"num_layers": 42, "width": 3584, "mlp": 14336, "heads": 16}, 9_241_705_984),
        (
            GEMMA_2_HERE,
            {"num_layers": 46, "width": 4608, "mlp": 36864, "heads": 32, "head_dim": 128},
            27_227_128_320,
        ),
        (GEMMA_3_HERE, {}, 999_885_952),
        (
            GEMMA_3_HERE,
            {"vocab_size": 262208, "num_layers": 34, "width": 2560, "mlp": 10240, "heads": 8},
            3_880_263_168,
        ),
    ],
    ids=["2 2b", "2 9b", "2 27b", "3 1b", "3 4b"],
)
def test_published_sizes_have_as_many_parameters_as_transformers_counts(config, sizes, parameters):
    """The 4B one without its eyes. Half as many key heads as heads, but for the smallest of Gemma 3."""
    names = {"width": "embed_dim", "mlp": "mlp_dim", "heads": "num_heads"}
    update = {names.get(name, name): size for name, size in sizes.items()}
    if "heads" in sizes:
        update["num_kv_heads"] = sizes["heads"] // 2
    assert num_parameters(config.model_copy(update=update)) == parameters
