"""T5 of transformers, v1.0 and v1.1: weights both ways bit by bit, and the same numbers and words."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from stack.config import Config, EncoderDecoderConfig
from stack.config.errors import StackError
from stack.data.tokenizer import load_tokenizer
from stack.inference.generate import generate
from stack.inference.text import encode_prompts
from stack.interop.hugging_face import config_from_hf, params_from_hf, params_to_hf
from stack.interop.hugging_face_files import config_to_hf, write_files
from stack.kernels.linear_cross_entropy import Head, linear_cross_entropy, logits
from stack.models.encoder_decoder import EncoderDecoder
from stack.models.stack import Execution
from stack.objectives import build as build_objective
from stack.planner.formula.shapes import num_parameters
from stack.step.program import build

TOLERANCE = 1e-5
PUBLISHED = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"prefix": "summarize: "}},
    "vocab_size": 32128,
}
"""google-t5/t5-small."""
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_ff": 1024, "num_layers": 8}
V1_1 |= {"num_decoder_layers": 8, "num_heads": 6}
"""google/t5-v1_1-small, and flan-t5-small, where they differ."""

optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


def model_of(golden) -> EncoderDecoderConfig:
    config = config_from_hf(golden.config)
    assert isinstance(config, EncoderDecoderConfig)
    return config.model_copy(update={"dtype": "float32"})


def assert_close(ours, theirs, name):
    worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert worst <= TOLERANCE, f"{name} is off by {worst:.1e} of its largest value"


def test_logits_loss_and_gradients(t5_golden):
    """Padding is a segment of its own on either side; what is written begins after the start token."""
    config = model_of(t5_golden)
    graph = nnx.graphdef(nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0))))
    read, written = t5_golden.results["tokens"], t5_golden.results["target_tokens"]
    places = [np.broadcast_to(np.arange(row.shape[1]), row.shape) for row in (read, written)]
    real = [
        place < t5_golden.results[name][:, None]
        for place, name in zip(places, ("lengths", "target_lengths"), strict=True)
    ]
    start = np.full((2, 1), config.start_token, np.int32)
    batch = {
        "tokens": read,
        "positions": places[0],
        "segments": real[0].astype(np.int32),
        "target_tokens": np.concatenate([start, written[:, :-1]], axis=1),
        "target_positions": places[1],
        "target_segments": real[1].astype(np.int32),
    }
    labels = np.where(real[1], written, -1)

    @optimised
    @partial(jax.value_and_grad, has_aux=True)
    def loss_and_gradients(params, batch, labels):
        output = nnx.merge(graph, params)(batch, Execution())
        scale = 1 / (labels >= 0).sum()
        loss = linear_cross_entropy(output.hidden, output.table, labels, scale, Head(config.vocab_size)).loss
        return loss, logits(output.hidden, output.table, vocab_size=config.vocab_size)

    arrays = {name: jnp.asarray(values) for name, values in batch.items()}
    params = params_from_hf(t5_golden.weights, config)
    (loss, scores), gradients = loss_and_gradients(params, arrays, jnp.asarray(labels))
    scores = np.asarray(scores)[..., : config.vocab_size]
    assert_close(scores[real[1]], t5_golden.results["logits"][real[1]], "logits")
    assert_close(loss, t5_golden.results["loss"], "loss")
    ours = params_to_hf(gradients, config)
    assert ours.keys() == t5_golden.gradients.keys()
    for name, theirs in t5_golden.gradients.items():
        assert_close(ours[name], theirs, name)


def test_greedy_text_is_that_of_transformers(t5_golden):
    model = model_of(t5_golden)
    tree = {"model": model, "objective": {"kind": "span_corruption"}, "data": {"sequence_length": 16}}
    program = build(Config.model_validate(tree), jax.devices()[:1])
    places = jax.tree.map(lambda leaf: leaf.sharding, program.parameters)
    params = jax.device_put(params_from_hf(t5_golden.weights, model), places)
    pairs = zip(t5_golden.results["prompts"], t5_golden.results["prompt_lengths"], strict=True)
    prompts = [row[:length].tolist() for row, length in pairs]
    theirs = t5_golden.results["generated"].tolist()
    assert generate(program, params, prompts, length=len(theirs[0])) == theirs


def test_weights_survive_the_way_in_and_out_bit_by_bit(t5_golden):
    config, weights = config_from_hf(t5_golden.config), t5_golden.weights
    restored = params_to_hf(params_from_hf(weights, config), config)
    assert restored.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(restored[name], weight, strict=True, err_msg=name)


def test_a_config_survives_the_way_in_and_out(t5_golden):
    config = config_from_hf(t5_golden.config)
    assert isinstance(config, EncoderDecoderConfig)
    assert (config.num_layers, config.decoder_layers, config.start_token) == (3, 2, 3)
    assert config_from_hf(config_to_hf(config)) == config


def test_copies_of_the_embedding_are_read_where_they_agree(t5_golden):
    """The first checkpoints repeat it, and hold a bias of the cross-attention that no version reads."""
    config, weights = config_from_hf(t5_golden.config), t5_golden.weights
    table = weights["shared.weight"]
    copies = {f"{side}.embed_tokens.weight": table for side in ("encoder", "decoder")}
    copies |= {"lm_head.weight": table} if config.tied_embeddings else {}
    copies |= {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.zeros((8, 4))}
    np.testing.assert_equal(params_from_hf(weights | copies, config), params_from_hf(weights, config))
    with pytest.raises(
        StackError, match=r"encoder\.embed_tokens\.weight differs from its shared\.weight; take"
    ):
        params_from_hf(weights | {"encoder.embed_tokens.weight": table + 1}, config)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_told(t5_v1_1):
    """As transformers 5 saves every T5 v1.1: tied, but not scaled."""
    keys = t5_v1_1.config | {"tie_word_embeddings": True}
    with pytest.raises(
        StackError, match=r"lm_head\.weight differs .* set tie_word_embeddings=false in config"
    ):
        params_from_hf(t5_v1_1.weights, config_from_hf(keys))
    with pytest.raises(StackError, match=r"head is its own, as .*; set tie_word_embeddings=false"):
        config_from_hf(keys | {"scale_decoder_outputs": False})


@pytest.mark.parametrize(
    ("changes", "parameters", "expected"),
    [
        ({}, 60_506_624, {"mlp": "relu", "tied_embeddings": True, "scale_output": True}),
        (V1_1, 76_961_152, {"mlp": "geglu", "tied_embeddings": False}),
        # google/mt5-small.
        ({**V1_1, "model_type": "mt5", "vocab_size": 250112}, 300_176_768, {"tied_embeddings": False}),
    ],
)
def test_published_models_have_as_many_parameters_as_their_authors_count(changes, parameters, expected):
    config = config_from_hf(PUBLISHED | changes)
    assert num_parameters(config) == parameters
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.head_width, config.attention_scale, config.residual_dropout) == (64, 1.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, 'model_type="umt5" is not supported'),
        ({"model_type": "mt5", "tie_word_embeddings": True}, "tie_word_embeddings=true is not supported"),
        ({"feed_forward_proj": "gated-relu"}, 'feed_forward_proj="gated-relu" is not supported'),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, 'dense_act_fn="relu" is not supported'),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=false is not supported"),
        ({"num_experts": 8}, "num_experts=8 is not a key that Stack reads here"),
        ({"architectures": ["T5EncoderModel"]}, "architectures="),
    ],
)
def test_other_models_are_refused_by_the_name_of_their_key(changes, message):
    with pytest.raises(StackError) as error:
        config_from_hf(PUBLISHED | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"position": "rotary"},
        {"attention_scale": None},
        {"scale_output": False},
        {"norm": "layernorm"},
        {"mlp_bias": True},
        {"num_kv_heads": 1},
        {"sliding_window": 8},
    ],
    ids=str,
)
def test_a_model_that_transformers_cannot_compute_is_not_exported(change):
    config = config_from_hf(PUBLISHED).model_copy(update=change)
    with pytest.raises(StackError, match=r"transformers' T5 has .*; this model has no counterpart there"):
        params_to_hf({}, config)


def test_what_lies_beside_the_weights_reads_a_prompt_as_training_did(tmp_path):
    """A text has an end and no beginning, the words that stand for what is removed are words."""
    model = config_from_hf(PUBLISHED).model_copy(update={"vocab_size": 361, "start_token": 4})
    tree = {"model": model, "objective": {"kind": "span_corruption"}, "data": {"sequence_length": 256}}
    own = Config.model_validate(tree)
    write_files(tmp_path, own, load_tokenizer("bytes"), "float32")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "a<extra_id_0>b"
    assert [tokenizer.encode(text).ids] == encode_prompts(
        load_tokenizer("bytes"), [text], build_objective(own)
    )
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["decoder_start_token_id"], generation["pad_token_id"]) == (4, 4)
    assert generation["eos_token_id"] == 256
