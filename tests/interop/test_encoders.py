"""BERT and RoBERTa compute what transformers computes, and their weights come in and go out."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from stack.config import EncoderConfig
from stack.config.errors import StackError
from stack.interop.hugging_face import Weights, config_from_hf, params_from_hf, params_to_hf
from stack.interop.hugging_face_files import config_to_hf
from stack.kernels.linear_cross_entropy import Head, linear_cross_entropy, logits
from stack.models.encoder import Encoder
from stack.models.stack import Execution

TOLERANCE = 1e-5
# As users compile it; see test_hugging_face_numerics.
optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


def model_of(golden) -> EncoderConfig:
    config = config_from_hf(golden.config, golden.weights)
    assert isinstance(config, EncoderConfig)
    return config.model_copy(update={"dtype": "float32"})


def encoder_of(params, config):
    graph = nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, params)


def batch_of(results):
    """The second row is padded on the right, as a segment of its own."""
    tokens = jnp.asarray(results["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < results["lengths"][:, None]).astype(jnp.int32)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "types": jnp.asarray(results["types"]),
    }


def assert_close(ours, theirs, name, scale=None):
    worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs if scale is None else scale).max()
    assert worst <= TOLERANCE, f"{name} is off by {worst:.1e} of its largest value"


def test_logits_loss_pooled_output_and_gradients(encoder):
    """Of every parameter, through the loss and what is pooled; a key's bias has none but rounding."""
    config, results = model_of(encoder), encoder.results
    batch = batch_of(results)
    labels = jnp.asarray(np.where(results["labels"] < 0, -1, results["labels"]))

    @optimised
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        model = encoder_of(params, config)
        output = model(batch, Execution())
        scale = 1 / (labels >= 0).sum()
        head = Head(config.vocab_size)
        loss = linear_cross_entropy(output.hidden, output.table, labels, scale, head, output.bias).loss
        scores = logits(output.hidden, output.table, vocab_size=config.vocab_size, bias=output.bias)
        pooled = None
        if config.pooler:
            hidden = model.encode(batch, Execution())
            pooled = model.pool(hidden, Execution().layout)[:, 0]
        return loss + (0.0 if pooled is None else pooled.sum()), (loss, scores, pooled)

    (_, (loss, scores, pooled)), gradients = run(params_from_hf(encoder.weights, config))
    real = np.asarray(batch["segments"], bool)
    assert_close(np.asarray(scores)[..., : config.vocab_size][real], results["logits"][real], "logits")
    assert_close(loss, results["loss"], "loss")
    assert (pooled is None) == ("pooled" not in results)
    if pooled is not None:
        assert_close(pooled, results["pooled"], "what is pooled")
    ours = params_to_hf(gradients, config)
    assert ours.keys() == encoder.gradients.keys()
    for name, theirs in encoder.gradients.items():
        other = encoder.gradients[name.replace("self.key.bias", "self.query.bias")]
        assert_close(ours[name], theirs, name, other)


def test_the_goldens_ask_for_what_is_new_in_an_encoder(bert, roberta):
    assert set(np.unique(bert.results["types"])) == {0, 1}
    assert bert.results["lengths"].tolist() == [16, 13]
    assert "pooled" in bert.results
    assert model_of(bert).pooler
    assert model_of(roberta).first_position == 2
    assert model_of(roberta).max_length == 22
    assert model_of(roberta).num_types == 1


def test_weights_survive_the_way_in_and_out_bit_by_bit(encoder):
    config = model_of(encoder)
    restored = params_to_hf(params_from_hf(encoder.weights, config), config)
    assert restored.keys() == encoder.weights.keys()
    for name, weight in encoder.weights.items():
        np.testing.assert_array_equal(restored[name], weight, strict=True, err_msg=name)


def test_a_checkpoint_of_sixteen_bits_becomes_float32(encoder):
    config = model_of(encoder)
    stored = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in encoder.weights.items()}
    restored = params_to_hf(params_from_hf(stored, config), config)
    for name, weight in stored.items():
        np.testing.assert_array_equal(restored[name], weight.astype(np.float32), strict=True, err_msg=name)


def test_rows_that_pad_the_vocabulary_are_zero_in_the_table_and_in_the_bias(bert):
    config = model_of(bert)
    params = params_from_hf(bert.weights, config)
    for values in (params["embed"]["table"], params["head"]["bias"]):
        assert len(values) == 128
        assert not values[61:].any()
        assert np.abs(values[:61]).reshape(61, -1).max(1).all()


def test_as_the_first_checkpoints_are_written(bert):
    """With gamma and beta, positions that are counted, a head of next sentences, and two tensors twice."""
    config, weights = model_of(bert), bert.weights
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): weight
        for name, weight in weights.items()
    }
    assert any(name.endswith("cls.predictions.transform.LayerNorm.gamma") for name in old)
    old |= {
        "bert.embeddings.position_ids": np.arange(24)[None],
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": weights["cls.predictions.bias"],
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
    }
    assert config_from_hf(bert.config, old) == config_from_hf(bert.config, weights)
    np.testing.assert_equal(params_from_hf(old, config), params_from_hf(weights, config))
    told = Weights(old, config).unread
    assert told == dict.fromkeys(
        ("cls.seq_relationship.weight", "cls.seq_relationship.bias"), "the head of next sentences"
    )

    for copy, main in (
        ("weight", "bert.embeddings.word_embeddings.weight"),
        ("bias", "cls.predictions.bias"),
    ):
        wrong = old | {f"cls.predictions.decoder.{copy}": weights[main] + 1}
        with pytest.raises(
            StackError, match=f"cls.predictions.decoder.{copy} differs from its {main}; they are one"
        ):
            params_from_hf(wrong, config)


def test_of_a_tensor_with_two_names_either_is_enough(roberta):
    config, weights = model_of(roberta), dict(roberta.weights)
    names = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"}
    names |= {"lm_head.decoder.bias": "lm_head.bias"}
    other = weights | {copy: weights[main] for copy, main in names.items()}
    np.testing.assert_equal(params_from_hf(other, config), params_from_hf(weights, config))
    for main in names.values():
        del other[main]
    np.testing.assert_equal(params_from_hf(other, config), params_from_hf(weights, config))


def test_a_model_without_a_head_comes_in_and_goes_out_as_one(bert):
    """As `BertModel.save_pretrained` writes it: names begin behind the model's own."""
    own = {name: weight for name, weight in bert.weights.items() if not name.startswith("cls.")}
    bare = {name.removeprefix("bert."): weight for name, weight in own.items()}
    config = config_from_hf(bert.config | {"architectures": ["BertModel"]}, bare)
    assert isinstance(config, EncoderConfig)
    assert (config.head_transform, config.head_bias, config.pooler) == (False, False, True)
    restored = params_to_hf(params_from_hf(bare, config), config)
    assert restored.keys() == own.keys()
    assert config_to_hf(config)["architectures"] == ["BertModel"]
    params = jax.tree.map(jnp.asarray, params_from_hf(bare, config))
    output = encoder_of(params, config)(batch_of(bert.results), Execution())
    assert output.bias is None


@pytest.mark.parametrize("part", ["pooler.dense.bias", "LayerNorm.weight", "output.dense.weight", "bias"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(bert, part):
    config = model_of(bert)
    name = next(name for name in bert.weights if name.endswith(part))
    gone = {other: weight for other, weight in bert.weights.items() if other != name}
    with pytest.raises(StackError, match=f"the checkpoint lacks {name};"):
        params_from_hf(gone, config)
    shape = list(bert.weights[name].shape)
    with pytest.raises(StackError, match=rf"{name} has shape \[{shape[0] - 1}\D.*asks for \[{shape[0]}"):
        params_from_hf(bert.weights | {name: bert.weights[name][:-1]}, config)


def test_a_tensor_too_many_is_named(encoder):
    config = model_of(encoder)
    for extra in ("classifier.weight", "cls.other.weight"):
        with pytest.raises(StackError, match=rf"the checkpoint has the unknown \S*{extra}; it is not"):
            params_from_hf(encoder.weights | {extra: np.zeros(2, np.float32)}, config)


def test_one_name_under_its_old_and_new_end_is_refused(bert):
    name = "bert.embeddings.LayerNorm.weight"
    old = name.replace("weight", "gamma")
    with pytest.raises(StackError, match=f"one tensor twice, as {name} and as {old}"):
        params_from_hf(bert.weights | {old: bert.weights[name]}, model_of(bert))
