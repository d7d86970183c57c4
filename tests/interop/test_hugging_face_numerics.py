"""Logits, loss and gradients are those of Hugging Face transformers.

Compared tensor by tensor as transformers keeps them: GPT-2's key bias alone has a gradient of exactly
zero (softmax does not see it), so only rounding would be left to compare.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.interop.hugging_face import config_from_hf, params_from_hf, params_to_hf
from stack.kernels.linear_cross_entropy import Head, linear_cross_entropy, logits
from stack.models.decoder import Decoder
from stack.models.stack import Execution

TOLERANCE = 1e-5

# Compiled as users compile it: without LLVM's optimisation, as other tests run, JAX 0.12 rounds the
# gradient of Llama's queries to 2e-5.
optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


@pytest.fixture
def config(golden):
    return config_from_hf(golden.config).model_copy(update={"dtype": "float32"})


@pytest.fixture
def params(golden, config):
    return params_from_hf(golden.weights, config)


def decoder(params, config):
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, params)


def run(model, tokens, lengths):
    """The second row is padded on the right, as a segment of its own."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    batch = {"tokens": jnp.asarray(tokens), "positions": positions, "segments": segments}
    return model(batch, Execution())


def next_tokens(tokens, lengths):
    labels = np.roll(tokens, -1, axis=1)
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None] - 1, labels, -1)


def assert_close(ours, theirs, name):
    worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert worst <= TOLERANCE, f"{name} is off by {worst:.1e} of its largest value"


def test_logits(golden, config, params):
    tokens, lengths = golden.results["tokens"], golden.results["lengths"]

    @optimised
    def scores(params):
        output = run(decoder(params, config), tokens, lengths)
        return logits(output.hidden, output.table, vocab_size=config.vocab_size, softcap=config.logit_softcap)

    ours = np.asarray(scores(params))[..., : config.vocab_size]
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    assert_close(ours[real], golden.results["logits"][real], "logits")


@pytest.mark.parametrize(
    "golden",
    [
        "gpt2",
        "llama",
        "qwen3_window",
        "gemma3",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("qwen2", "qwen3", "gemma2")),
    ],
    indirect=True,
)
def test_loss_and_gradients(golden, config, params):
    tokens, lengths = golden.results["tokens"], golden.results["lengths"]
    labels = jnp.asarray(next_tokens(tokens, lengths))

    @optimised
    @jax.value_and_grad
    def loss_and_gradients(params):
        output = run(decoder(params, config), tokens, lengths)
        scale = 1 / (labels >= 0).sum()
        head = Head(config.vocab_size, config.logit_softcap)
        return linear_cross_entropy(output.hidden, output.table, labels, scale, head).loss

    loss, gradients = loss_and_gradients(params)
    assert_close(loss, golden.results["loss"], "loss")
    ours = params_to_hf(gradients, config)
    assert ours.keys() == golden.gradients.keys()
    for name, theirs in golden.gradients.items():
        assert_close(ours[name], theirs, name)
