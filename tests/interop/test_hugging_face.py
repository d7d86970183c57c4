"""Weights of Hugging Face transformers come in and go out."""

import ml_dtypes
import numpy as np
import pytest

from stack.config import DecoderConfig, ParallelDecoderConfig
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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_checkpoints_of_other_floats_become_float32(golden, dtype):
    config = config_from_hf(golden.config)
    stored = {name: weight.astype(dtype) for name, weight in golden.weights.items()}
    restored = params_to_hf(params_from_hf(stored, config), config)
    for name, weight in stored.items():
        np.testing.assert_array_equal(restored[name], weight.astype(np.float32), strict=True, err_msg=name)


@pytest.mark.parametrize("dtype", [np.int8, np.bool, np.uint8, ml_dtypes.float8_e4m3fn, np.complex64])
def test_numbers_that_mean_nothing_without_a_scale_are_refused_by_name(golden, dtype):
    name = next(name for name in golden.weights if "mlp" in name)
    weights = golden.weights | {name: np.ones_like(golden.weights[name]).astype(dtype)}
    message = (
        f"{name} is of {np.dtype(dtype).name}, but weights are float16, bfloat16, float32, float64; convert"
    )
    with pytest.raises(StackError, match=message):
        params_from_hf(weights, config_from_hf(golden.config))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_in_float32_are_refused_by_name(golden, number):
    for name in golden.weights:
        broken = golden.weights[name].astype(np.float64)
        broken.flat[-1] = number
        with pytest.raises(StackError, match=f"{name} holds NaN or infinity in float32; take a checkpoint"):
            params_from_hf(golden.weights | {name: broken}, config_from_hf(golden.config))


def test_a_repeated_head_that_is_not_finite_is_refused_under_the_name_of_the_embedding(gpt2):
    table = gpt2.weights["transformer.wte.weight"].copy()
    table[3, 1] = np.nan
    weights = gpt2.weights | {"transformer.wte.weight": table, "lm_head.weight": table}
    with pytest.raises(StackError, match=r"transformer\.wte\.weight holds NaN"):
        params_from_hf(weights, config_from_hf(gpt2.config))


def test_two_names_of_one_tensor_are_refused(golden):
    config, name = config_from_hf(golden.config), list(golden.weights)[3]
    _, _, bare = name.partition(".")
    for other in (golden.weights[name], golden.weights[name] + 1):
        with pytest.raises(
            StackError, match=f"one tensor twice, as {name} and as {bare}; leave out the wrong"
        ):
            params_from_hf(golden.weights | {bare: other}, config)


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


def test_parameters_that_are_no_finite_floats_are_refused_on_the_way_out(golden):
    config = config_from_hf(golden.config)
    params = params_from_hf(golden.weights, config)
    scale = params["final_norm"]["scale"]
    params["final_norm"]["scale"] = np.ones_like(scale, dtype=np.int8)
    with pytest.raises(StackError, match="final_norm/scale is of int8"):
        params_to_hf(params, config)
    params["final_norm"]["scale"] = np.full_like(scale, np.inf)
    with pytest.raises(StackError, match="final_norm/scale holds NaN or infinity"):
        params_to_hf(params, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": False}, "model.qkv_bias=False: transformers' GPT-2 has qkv_bias=True"),
        ({"mlp": "swiglu"}, "model.gated=True"),
        ({"logit_softcap": 30.0}, "model.logit_softcap=30.0"),
        (
            {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "sliding_window": 8},
            "Mistral has qkv_bias=False",
        ),
        (
            {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "out_bias": False},
            "Qwen 2 .*mlp_bias=False",
        ),
    ],
)
def test_a_model_that_transformers_cannot_compute_is_not_exported(changes, message):
    with pytest.raises(StackError, match=message):
        params_to_hf({}, DecoderConfig(**changes))


def test_a_parallel_decoder_is_neither_read_nor_exported():
    config = ParallelDecoderConfig()
    message = r"model\.kind=parallel_decoder: transformers' GPT-2 has kind=decoder"
    for convert in (params_from_hf, params_to_hf):
        with pytest.raises(StackError, match=message):
            convert({}, config)
