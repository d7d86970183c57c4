"""Weights and configs of Hugging Face transformers come in and go out."""

import numpy as np
import pytest

from stack.config import ModelConfig, RopeConfig
from stack.config.errors import StackError
from stack.interop.hugging_face import config_from_hf, params_from_hf, params_to_hf


def test_weights_survive_the_way_in_and_out_bit_by_bit(golden):
    config = config_from_hf(golden.config)
    weights = golden.weights
    restored = params_to_hf(params_from_hf(weights, config), config)
    assert restored.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(restored[name], weight, strict=True, err_msg=name)


def test_padded_vocabulary_rows_are_zero(golden):
    config = config_from_hf(golden.config)
    params = params_from_hf(golden.weights, config)
    tables = [params[key]["table"] for key in ("embed", "head") if key in params]
    assert len(tables) == (1 if config.tied_embeddings else 2)
    for table in tables:
        assert table.shape == (128, config.embed_dim)
        assert not table[config.vocab_size :].any()
        assert table[: config.vocab_size].any(axis=1).all()


def test_kernels_map_inputs_to_outputs_head_by_head(llama):
    weight = llama.weights["model.layers.1.self_attn.k_proj.weight"]
    kernel = params_from_hf(llama.weights, config_from_hf(llama.config))["layers"]["attention"]["key"][
        "kernel"
    ]
    inputs = np.random.default_rng(0).normal(size=32)
    heads = np.einsum("e,ehd->hd", inputs, kernel[1])
    np.testing.assert_allclose(heads.ravel(), weight @ inputs, rtol=1e-5, atol=1e-5)


def test_fused_gpt2_projections_come_apart_as_query_key_value(gpt2):
    fused = gpt2.weights["transformer.h.0.attn.c_attn.weight"]
    attention = params_from_hf(gpt2.weights, config_from_hf(gpt2.config))["layers"]["attention"]
    kernels = [attention[name]["kernel"][0].reshape(32, 32) for name in ("query", "key", "value")]
    np.testing.assert_array_equal(np.concatenate(kernels, axis=1), fused)


def test_the_first_gpt2_checkpoints_load_without_prefix_with_masks_and_a_repeated_head(gpt2):
    config, weights = config_from_hf(gpt2.config), gpt2.weights
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 32, 32))), "lm_head.weight": old["wte.weight"]}
    np.testing.assert_equal(params_from_hf(old, config), params_from_hf(weights, config))

    old["lm_head.weight"] = old["wte.weight"] + 1
    with pytest.raises(StackError, match=r"lm_head.weight differs .* set model.tied_embeddings=false"):
        params_from_hf(old, config)


def test_half_precision_checkpoints_become_float32(golden):
    config = config_from_hf(golden.config)
    halves = {name: weight.astype(np.float16) for name, weight in golden.weights.items()}
    table = params_from_hf(halves, config)["embed"]["table"]
    assert table.dtype == np.float32


def test_a_missing_weight_is_named(golden):
    weights = dict(golden.weights)
    gone = list(weights)[3]
    del weights[gone]
    with pytest.raises(StackError, match=f"the checkpoint lacks {gone};"):
        params_from_hf(weights, config_from_hf(golden.config))


def test_unknown_weights_are_named(golden):
    extra = {"score.weight": np.zeros(2), "zebra.weight": np.zeros(2)}
    with pytest.raises(StackError, match=r"the checkpoint has the unknown .*score.weight and 1 more"):
        params_from_hf(golden.weights | extra, config_from_hf(golden.config))


def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(golden):
    weights = dict(golden.weights)
    name = next(name for name in weights if "mlp" in name)
    rows, columns = weights[name].shape
    weights[name] = weights[name][:-1]
    message = rf"{name} has shape \[{rows - 1}, {columns}\], the config asks for \[{rows}, {columns}\]"
    with pytest.raises(StackError, match=message):
        params_from_hf(weights, config_from_hf(golden.config))


def test_a_wrong_parameter_tree_is_refused_on_the_way_out(golden):
    config = config_from_hf(golden.config)
    params = params_from_hf(golden.weights, config)
    scale = params["final_norm"].pop("scale")
    with pytest.raises(StackError, match="the parameter tree lacks final_norm/scale"):
        params_to_hf(params, config)
    params["final_norm"]["scale"] = scale[:-1]
    with pytest.raises(StackError, match="final_norm/scale has shape"):
        params_to_hf(params, config)


def test_gpt2_config():
    config = config_from_hf({"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16})
    assert config == ModelConfig(
        vocab_size=50257,
        max_length=1024,
        num_layers=24,
        embed_dim=1024,
        num_heads=16,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
        position_init_std=0.02,
    )


LLAMA_3_1_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_3_1_8B_HERE = ModelConfig(
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


def test_llama_config_as_transformers_4_and_5_write_it():
    assert config_from_hf(LLAMA_3_1_8B) == LLAMA_3_1_8B_HERE
    newer = {key: value for key, value in LLAMA_3_1_8B.items() if not key.startswith("rope")}
    newer["rope_parameters"] = LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert config_from_hf(newer) == LLAMA_3_1_8B_HERE


def test_linear_rope_config():
    config = config_from_hf(LLAMA_3_1_8B | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config.rope == RopeConfig(theta=500_000, scaling="linear", factor=4)


def test_qwen_configs_have_their_own_biases_norms_and_head_width():
    shape = {key: LLAMA_3_1_8B[key] for key in LLAMA_3_1_8B if "size" in key or key.startswith("num")}
    qwen2 = config_from_hf(shape | {"model_type": "qwen2"})
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm, qwen2.head_width) == (True, False, False, 128)
    qwen3 = config_from_hf(shape | {"model_type": "qwen3", "hidden_size": 1024})
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm, qwen3.head_width) == (False, False, True, 128)


def test_a_sliding_window_must_hold_for_all_layers_or_none():
    qwen = {**LLAMA_3_1_8B, "model_type": "qwen2", "rope_scaling": None, "sliding_window": 4096}
    assert config_from_hf(qwen).sliding_window is None
    sliding = qwen | {"use_sliding_window": True}
    assert config_from_hf(sliding | {"max_window_layers": 0}).sliding_window == 4096
    assert config_from_hf(sliding | {"max_window_layers": 32}).sliding_window is None
    with pytest.raises(StackError, match="mixes sliding and full attention"):
        config_from_hf(sliding | {"max_window_layers": 28})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type=bert is not supported; Stack reads gpt2, llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported; Stack has hidden_act=silu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type=yarn is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"num_key_value_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function=relu is not supported"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True",
        ),
    ],
)
def test_what_stack_does_not_have_is_refused_by_name(changes, message):
    with pytest.raises(StackError, match=message):
        config_from_hf(LLAMA_3_1_8B | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": False}, "model.qkv_bias=False: transformers' GPT-2 has qkv_bias=True"),
        ({"mlp": "swiglu"}, "model.gated=True"),
        ({"logit_softcap": 30.0}, "model.logit_softcap=30.0"),
        ({"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "sliding_window": 8}, "Llama .*=None"),
        (
            {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "out_bias": False},
            "Qwen 2 .*mlp_bias=False",
        ),
    ],
)
def test_a_model_that_transformers_cannot_compute_is_not_exported(changes, message):
    with pytest.raises(StackError, match=message):
        params_to_hf({}, ModelConfig(**changes))
