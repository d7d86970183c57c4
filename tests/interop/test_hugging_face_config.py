"""Every key of a config.json is read, or known to be harmless, or refused by name."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import DecoderConfig, RopeConfig
from stack.config.errors import StackError
from stack.interop.hugging_face import config_from_hf

# config.json as their authors publish them.
PUBLISHED = json.loads((Path(__file__).parents[1] / "goldens/hugging_face_configs.json").read_text())
GPT2, LLAMA_3_1, MISTRAL, QWEN_2_5, QWEN_3, GEMMA_2, GEMMA_3 = (
    PUBLISHED[name]
    for name in (
        "openai-community/gpt2",
        "meta-llama/Llama-3.1-8B",
        "mistralai/Mistral-7B-v0.1",
        "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen3-0.6B",
        "google/gemma-2-2b-it",
        "google/gemma-3-1b-it",
    )
)
SIZES = {
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-xl": 1_557_611_200,
    "distilbert/distilgpt2": 81_912_576,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
}


def parameters(model):
    """Of the model as it is published, without rows that pad the vocabulary."""
    norm = model.embed_dim * (2 if model.norm == "layernorm" else 1)
    queries, keys = model.num_heads * model.head_width, model.kv_heads * model.head_width
    attention = 2 * model.embed_dim * (queries + keys) + 2 * model.head_width * model.qk_norm
    attention += (queries + 2 * keys) * model.qkv_bias + model.embed_dim * model.out_bias
    ups = 2 if model.gated else 1
    mlp = (ups + 1) * model.embed_dim * model.mlp_width
    mlp += (ups * model.mlp_width + model.embed_dim) * model.mlp_bias
    tables = model.vocab_size * (1 if model.tied_embeddings else 2)
    tables += model.max_length * (model.position == "learned")
    norms = 4 if model.norm_placement == "both" else 2
    return model.num_layers * (attention + mlp + norms * norm) + norm + tables * model.embed_dim


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_authors_count(name):
    assert parameters(config_from_hf(PUBLISHED[name])) == SIZES[name]


def test_gpt2():
    assert config_from_hf(GPT2) == DecoderConfig(
        vocab_size=50257,
        max_length=1024,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
        position_init_std=0.02,
    )


LLAMA_3_1_HERE = DecoderConfig(
    vocab_size=128256,
    max_length=131072,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    norm="rmsnorm",
    norm_epsilon=1e-5,
    mlp="swiglu",
    position="rotary",
    rope=RopeConfig(theta=500_000, scaling="llama3", factor=8),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied_embeddings=False,
    scale_residual_init=False,
)


def test_llama_as_transformers_4_and_5_write_it():
    assert config_from_hf(LLAMA_3_1) == LLAMA_3_1_HERE
    newer = {key: value for key, value in LLAMA_3_1.items() if not key.startswith("rope")}
    newer["rope_parameters"] = LLAMA_3_1["rope_scaling"] | {"rope_theta": 500000.0}
    assert config_from_hf(newer) == LLAMA_3_1_HERE


def test_absent_keys_have_the_defaults_of_transformers():
    gpt2 = config_from_hf({"model_type": "gpt2"})
    assert gpt2 == config_from_hf(GPT2)
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 64}
    sizes["intermediate_size"] = 128
    llama, mistral, qwen2, qwen3 = (
        config_from_hf(sizes | {"model_type": family}) for family in ("llama", "mistral", "qwen2", "qwen3")
    )
    assert (llama.max_length, llama.kv_heads, llama.head_width) == (2048, 64, 4)
    assert (mistral.max_length, mistral.kv_heads, mistral.sliding_window) == (131072, 8, 4096)
    assert (qwen2.max_length, qwen2.kv_heads, qwen2.head_width) == (32768, 32, 4)
    assert (qwen3.max_length, qwen3.kv_heads, qwen3.head_width) == (32768, 32, 128)
    for model in (llama, mistral, qwen2, qwen3):
        assert (model.norm_epsilon, model.rope, model.init_std) == (1e-6, RopeConfig(theta=10_000), 0.02)
        assert not model.tied_embeddings
        assert not model.attention_dropout
    parts = [(m.qkv_bias, m.out_bias, m.mlp_bias, m.qk_norm) for m in (llama, mistral, qwen2, qwen3)]
    nothing, biases, norms = (
        (False, False, False, False),
        (True, False, False, False),
        (False, False, False, True),
    )
    assert parts == [nothing, nothing, biases, norms]


def outcome(config):
    """The model, or the line of the refusal."""
    try:
        return config_from_hf(config)
    except StackError as error:
        return str(error)


# What a published config says beside the model, and of a window that would begin after the last layer.
HARMLESS = {
    *("_name_or_path", "_num_labels", "bos_token_id", "eos_token_id", "id2label", "label2id"),
    *("output_past", "predict_special_tokens", "pretraining_tp", "summary_activation"),
    *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("task_specific_params", "torch_dtype", "transformers_version", "use_cache"),
    *("max_window_layers", "sliding_window", "use_sliding_window"),
    *("cache_implementation", "pad_token_id"),
}


def another(value):
    """A value of the same type, as near as may be."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 if value else 0.5
        case str():
            return value + "_other"
        case dict():
            return {key: another(entry) for key, entry in value.items()}
        case list():
            return list(map(another, value))
    return 7


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_config_changes_the_model_or_is_refused_when_it_changes(name):
    config = PUBLISHED[name]
    model = config_from_hf(config)
    unseen = {key for key, value in config.items() if outcome(config | {key: another(value)}) == model}
    read = set() if "use_sliding_window" in config else {"sliding_window"}
    assert unseen == (HARMLESS & config.keys()) - read


def test_an_unknown_key_is_refused_with_its_value():
    message = (
        r"residual_scale=0\.5 is not a key that Stack reads here; remove it if the model's numbers do not"
    )
    with pytest.raises(StackError, match=message):
        config_from_hf(LLAMA_3_1 | {"residual_scale": 0.5})
    with pytest.raises(StackError, match=r'one=1 is not a key that Stack reads here \(nor are \["two"\]\)'):
        config_from_hf(GPT2 | {"one": 1, "two": 2})
    with pytest.raises(StackError, match=r"a\\nb=1 is not a key that Stack reads here"):
        config_from_hf(GPT2 | {"a\nb": 1})


@pytest.mark.parametrize(
    "config", [GPT2, LLAMA_3_1, MISTRAL, QWEN_2_5, QWEN_3, GEMMA_2, GEMMA_3], ids=lambda c: c["model_type"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "auto_map": None, "pruned_heads": {}, "attn_implementation": "sdpa"},
        {"is_encoder_decoder": False, "add_cross_attention": False, "quantization_config": None},
        {"dtype": "float32", "temperature": 0.6, "max_length": 20, "pad_token_id": 0, "num_labels": 3},
        {"architectures": None},
    ],
    ids=str,
)
def test_what_changes_no_number_is_accepted(config, options):
    assert config_from_hf(config | options) == config_from_hf(config)


@pytest.mark.parametrize(
    "config", [GPT2, LLAMA_3_1, MISTRAL, QWEN_2_5, QWEN_3, GEMMA_2, GEMMA_3], ids=lambda c: c["model_type"]
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("is_causal", None),
        ("is_causal", 1),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("architectures", "LlamaForCausalLM"),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"1": [0]}),
        ("attn_implementation", "someone/kernel"),
    ],
)
def test_what_changes_numbers_is_refused_by_name(config, key, value):
    with pytest.raises(StackError, match=f"^Hugging Face config: {key}=.* is not supported; Stack has "):
        config_from_hf(config | {key: value})


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            GPT2,
            {"model_type": "deberta"},
            'model_type="deberta" is not supported; Stack has "gpt2", "llama", "mistral"',
        ),
        (GPT2, {"model_type": None}, "model_type=null is not supported"),
        (GPT2, {"model_type": ["gpt2"]}, r'model_type=\["gpt2"\] is not supported'),
        (GPT2, {"activation_function": "silu"}, 'activation_function="silu" is not supported'),
        (GPT2, {"activation_function": ["gelu"]}, r'activation_function=\["gelu"\] is not supported'),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=false is not supported"),
        (GPT2, {"n_ctx": 512}, "n_ctx=512 is not supported; Stack has 1024"),
        (GPT2, {"n_embd": "768"}, 'n_embd="768" must be a whole number of at least 1'),
        (GPT2, {"n_embd": 768.0}, "n_embd=768.0 must be a whole number"),
        (GPT2, {"n_head": True}, "n_head=true must be a whole number"),
        (GPT2, {"n_layer": 0}, "n_layer=0 must be a whole number of at least 1"),
        (GPT2, {"n_inner": 0}, "n_inner=0 must be a whole number of at least 1 or null"),
        (GPT2, {"attn_pdrop": None}, "attn_pdrop=null must be a finite number"),
        (GPT2, {"attn_pdrop": True}, "attn_pdrop=true must be a finite number"),
        (GPT2, {"attn_pdrop": float("nan")}, "attn_pdrop=NaN must be a finite number"),
        (GPT2, {"attn_pdrop": 10**400}, r"attn_pdrop=1000.*\.\.\. must be a finite number"),
        (GPT2, {"attn_pdrop": 1.5}, "attention_dropout=1.5 must be less than 1"),
        (GPT2, {"tie_word_embeddings": "yes"}, 'tie_word_embeddings="yes" must be true or false'),
        (GPT2, {"n_head": 7}, "embed_dim=768 is not a multiple of num_heads=7"),
        (GPT2, {"intermediate_size": 3072}, "intermediate_size=3072 is not a key"),
        (LLAMA_3_1, {"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported; Stack has "silu", "swish"'),
        (LLAMA_3_1, {"num_key_value_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
        (LLAMA_3_1, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        (LLAMA_3_1, {"sliding_window": 4096}, "sliding_window=4096 is not supported; Stack has null"),
        (QWEN_2_5, {"max_window_layers": None}, "max_window_layers=null must be a whole number"),
        (QWEN_2_5, {"attention_bias": True}, "attention_bias=true is not a key"),
        (QWEN_3, {"head_dim": None}, "head_dim=null must be a whole number of at least 1"),
        (GEMMA_2, {"hidden_activation": "gelu"}, 'hidden_activation="gelu" is not supported'),
        (GEMMA_2, {"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported'),
        (GEMMA_2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be a whole number of at"),
        (GEMMA_2, {"use_bidirectional_attention": True}, "use_bidirectional_attention=true is not supp"),
        (GEMMA_3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported; Stack"),
        (GEMMA_3, {"model_type": "gemma3"}, 'model_type="gemma3" is not supported'),
    ],
)
def test_a_wrong_value_is_refused_by_name(config, changes, message):
    with pytest.raises(StackError, match=f"^Hugging Face config: .*{message}"):
        config_from_hf(config | changes)


@pytest.mark.parametrize("config", [[GPT2], "gpt2", None], ids=str)
def test_a_config_that_is_no_mapping_is_refused(config):
    with pytest.raises(StackError, match="must be a mapping"):
        config_from_hf(config)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_missing_size_is_named(key):
    config = {name: value for name, value in LLAMA_3_1.items() if name != key}
    with pytest.raises(StackError, match=f"{key} is missing; take the model's own config.json"):
        config_from_hf(config)


ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def test_gpt2_is_read_under_the_names_that_all_models_share():
    small = {"n_embd": 96, "n_positions": 64, "n_head": 3, "n_layer": 2}
    model = config_from_hf({"model_type": "gpt2", **small})
    renamed = {alias: small[name] for alias, name in ALIASES.items()}
    assert config_from_hf({"model_type": "gpt2", **renamed}) == model
    assert config_from_hf({"model_type": "gpt2", **small, **renamed}) == model
    with pytest.raises(StackError, match="hidden_size=true must be a whole number"):
        config_from_hf({"model_type": "gpt2", "hidden_size": True})


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_that_contradicts_the_name_is_refused(alias):
    name = ALIASES[alias]
    message = f"{name}={GPT2[name]} and {alias}=6 name one thing; keep the right one"
    with pytest.raises(StackError, match=message):
        config_from_hf(GPT2 | {alias: 6})


class Asked(dict):
    """A mapping that remembers what it was asked for."""

    def __init__(self, *values):
        super().__init__(*values)
        self.keys_asked = set()

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)


def keys_of(config):
    """Every key that is read or stands in the config."""
    asked = Asked(config)
    config_from_hf(asked)
    return sorted(asked.keys_asked | set(config))


def rope_keys():
    groups = [Asked(LLAMA_3_1["rope_scaling"]), Asked({"rope_type": "yarn", "factor": 4.0})]
    for asked in groups:
        config_from_hf(LLAMA_3_1 | {"rope_scaling": asked})
    return sorted(set.union(*(asked.keys_asked for asked in groups)))


ONE_EACH = (GPT2, LLAMA_3_1, MISTRAL, QWEN_2_5, QWEN_3, GEMMA_2, GEMMA_3)
FAMILIES = {config["model_type"]: config for config in ONE_EACH}
KEYS = {family: keys_of(config) for family, config in FAMILIES.items()}
WORDS = ["default", "linear", "llama3", "yarn", "silu", "gelu", "sliding_attention", "full_attention", "a\nb"]
LIKELY = st.integers(0, 64) | st.floats(0, 2) | st.sampled_from(WORDS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LIKELY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.dictionaries(st.sampled_from(rope_keys()), LIKELY | JSON, max_size=6)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_value_at_any_key_is_read_or_refused_in_one_line(family, data):
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS[family]), LIKELY | JSON | ROPE, max_size=2))
    match outcome(FAMILIES[family] | changes):
        case str(refusal):
            assert refusal.startswith("Hugging Face config: ")
            assert "\n" not in refusal
        case model:
            assert isinstance(model, DecoderConfig)


def test_the_property_above_tries_every_key():
    assert {"is_causal", "n_embd", "hidden_size", "n_ctx", "activation_function"} <= set(KEYS["gpt2"])
    assert {"layer_types", "max_window_layers", "rope_scaling", "rope_parameters"} <= set(KEYS["qwen2"])
    assert {"original_max_position_embeddings", "factor", "type", "rope_theta"} <= set(rope_keys())
    assert {"beta_fast", "truncate", "attention_factor"} <= set(rope_keys())
