"""Two stacks: published sizes and deviations, and texts that see neither each other nor what comes later."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import Config, ConfigError, EncoderDecoderConfig, parse
from stack.models import encoder_decoder
from stack.models.encoder_decoder import EncoderDecoder
from stack.models.stack import Execution
from stack.planner.formula.shapes import num_parameters
from stack.step import program as programs

T5 = {
    "norm": "rmsnorm",
    "mlp": "relu",
    "position": "relative",
    "attention_scale": 1.0,
    "init": "fan_in",
    "init_std": 1.0,
    "scale_residual_init": False,
    **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False),
}
V1_1 = T5 | {"mlp": "geglu", "tied_embeddings": False}
TINY = EncoderDecoderConfig(
    **V1_1,
    vocab_size=61,
    num_layers=2,
    num_decoder_layers=3,
    embed_dim=16,
    num_heads=4,
    head_dim=6,
    mlp_dim=24,
    relative_buckets=8,
    relative_max_distance=10,
    dtype="float32",
)


@pytest.mark.parametrize(
    ("kind", "layers", "embed", "heads", "head", "mlp", "published"),
    [
        (T5, 6, 512, 8, 64, 2048, 60_506_624),  # small
        (T5, 12, 768, 12, 64, 3072, 222_903_552),  # base
        (T5, 24, 1024, 16, 64, 4096, 737_668_096),  # large
        (T5, 24, 1024, 32, 128, 16384, 2_851_598_336),  # 3B
        (T5, 24, 1024, 128, 128, 65536, 11_307_321_344),  # 11B
        (V1_1, 8, 512, 6, 64, 1024, 76_961_152),  # small
        (V1_1, 12, 768, 12, 64, 2048, 247_577_856),  # base
        (V1_1, 24, 1024, 16, 64, 2816, 783_150_080),  # large
        (V1_1, 24, 2048, 32, 64, 5120, 2_849_757_184),  # XL
        (V1_1, 24, 4096, 64, 64, 10240, 11_135_332_352),  # XXL
    ],
)
def test_parameters_are_as_many_as_published(kind, layers, embed, heads, head, mlp, published):
    shape = {"num_layers": layers, "embed_dim": embed, "num_heads": heads, "head_dim": head, "mlp_dim": mlp}
    assert num_parameters(EncoderDecoderConfig(**kind, **shape, vocab_size=32128)) == published


def test_initial_deviations_are_those_of_mesh_tensorflow():
    """Scores are not scaled, so queries are as much smaller."""
    config = EncoderDecoderConfig(
        **V1_1, vocab_size=512, num_layers=2, embed_dim=256, num_heads=8, head_dim=64, mlp_dim=1024
    )
    model = jax.jit(lambda: nnx.state(EncoderDecoder(config, rngs=nnx.Rngs(0))))()
    block = model["decoder"]["layers"]
    for attention in (block["attention"], block["cross"], model["encoder"]["layers"]["attention"]):
        for name, inputs in (("query", 256 * 64), ("key", 256), ("value", 256), ("out", 512)):
            assert jnp.std(attention[name]["kernel"][...]) == pytest.approx(inputs**-0.5, rel=0.02), name
    for name, inputs in (("gate", 256), ("up", 256), ("down", 1024)):
        assert jnp.std(block["mlp"][name]["kernel"][...]) == pytest.approx(inputs**-0.5, rel=0.02), name
    assert jnp.std(model["embed"]["table"][...]) == pytest.approx(1, rel=0.02)
    assert jnp.std(model["head"]["table"][...]) == pytest.approx(1 / 16, rel=0.02)
    assert jnp.std(model["decoder"]["relative"]["table"][...]) == pytest.approx(1 / 16, rel=0.1)


@cache
def tiny():
    return EncoderDecoder(TINY, rngs=nnx.Rngs(0))


hidden = jax.jit(lambda model, batch: model(batch, Execution()).hidden)


def row(texts, length, prefix=""):
    """Texts side by side: tokens, segments and positions, [1, length]."""
    parts = {
        "tokens": [token for text in texts for token in text],
        "segments": [number for number, text in enumerate(texts, 1) for _ in text],
        "positions": [place for text in texts for place in range(len(text))],
    }
    return {
        f"{prefix}{name}": np.array([values + [0] * (length - len(values))], np.int32)
        for name, values in parts.items()
    }


def batch(read, written):
    return row(read, 20) | row(written, 14, "target_")


READ = [[5, 9, 33, 2, 8, 7, 1], [12, 40, 3, 3, 18]]
WRITTEN = [[0, 7, 7, 21], [0, 50, 4, 9, 30, 6]]


def test_texts_of_one_row_are_as_each_alone():
    """Attention, its bias and what was read are those of the text itself, wherever it stands."""
    together = hidden(tiny(), batch(READ, WRITTEN))[0]
    for number, start in ((0, 0), (1, 4)):
        alone = hidden(tiny(), batch([READ[number]], [WRITTEN[number]]))[0]
        size = len(WRITTEN[number])
        np.testing.assert_allclose(together[start : start + size], alone[:size], rtol=2e-5, atol=2e-5)


def test_every_word_that_is_read_is_seen_and_none_that_is_written_later():
    first = hidden(tiny(), batch(READ, WRITTEN))[0]
    read = [[*READ[0][:-1], 60], READ[1]]
    changed = np.abs(hidden(tiny(), batch(read, WRITTEN))[0] - first).max(-1)
    assert (changed[:4] > 1e-3).all()
    assert not changed[4:10].any()
    written = [WRITTEN[0], [*WRITTEN[1][:3], 60, *WRITTEN[1][4:]]]
    changed = np.abs(hidden(tiny(), batch(READ, written))[0] - first).max(-1)
    assert not changed[:7].any()
    assert (changed[7:10] > 1e-3).all()


def test_a_tied_head_compares_states_divided_by_the_root_of_the_width():
    """T5 v1.0; v1.1 has a head of its own, and neither."""
    tied, plain = (
        TINY.model_copy(update={"tied_embeddings": True, "scale_output": scale}) for scale in (True, False)
    )
    scaled, whole = (
        hidden(EncoderDecoder(config, rngs=nnx.Rngs(0)), batch(READ, WRITTEN)) for config in (tied, plain)
    )
    np.testing.assert_allclose(scaled * math.sqrt(TINY.embed_dim), whole, rtol=1e-5)


def test_no_two_layers_share_a_dropout_key(monkeypatch):
    numbers = []

    def run_layers(_call, layers, x, _run, *, first=0, **_options):
        numbers.extend(range(first, first + jax.tree.leaves(layers)[0].shape[0]))
        return x, None

    def layer_keys(keys, number):
        numbers.append(number)
        return keys

    monkeypatch.setattr(encoder_decoder, "run_layers", run_layers)
    monkeypatch.setattr(encoder_decoder, "layer_keys", layer_keys)
    keys = jax.random.split(jax.random.key(0), 1)
    jax.eval_shape(lambda rows: tiny()(rows, Execution(keys=keys)), batch(READ, WRITTEN))
    # Two layers that read, three that write, and the two embeddings.
    assert sorted(numbers) == list(range(7))


def config_of(model="", objective="kind: span_corruption", **sections):
    text = f"model: {{kind: encoder_decoder, max_length: 64{model}}}\nobjective: {{{objective}}}\n"
    text += "data: {sequence_length: 32}\n"
    return parse(text + "\n".join(f"{name}: {section}" for name, section in sections.items()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ", start_token: 300"}, "start_token=300 is no word of vocab_size=257"),
        (
            {"model": ", position: relative, relative_max_distance: 16"},
            "relative_max_distance=16 must be above half of relative_buckets=32",
        ),
        ({"model": ", relative_buckets: 8"}, "relative_buckets=8 is not read with position=learned"),
        ({"model": ", tied_embeddings: false, scale_output: false"}, "scale_output=false is not read with"),
        (
            {"objective": "kind: span_corruption, target_length: 65"},
            "objective.target_length=65 exceeds model.max_length=64",
        ),
        ({"objective": "kind: causal"}, "objective.kind=causal trains no model.kind=encoder_decoder"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options, message):
    with pytest.raises(ConfigError) as error:
        config_of(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {position: relative}", "model.position='relative' must be 'learned' or 'rotary'"),
        (
            "objective: {kind: span_corruption, target_length: 8}",
            "objective.target_length=8 is not read with model.kind=decoder",
        ),
    ],
)
def test_what_is_of_two_stacks_is_refused_elsewhere(text, message):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert message in str(error.value)


def test_sequence_parallelism_that_does_not_divide_what_is_written_is_refused_with_a_length_that_does():
    config: Config = config_of(
        objective="kind: span_corruption, target_length: 30", mesh="{tensor: 4, sequence_parallel: true}"
    )
    with pytest.raises(ConfigError, match=r"the 30 tokens of a row .* set objective\.target_length=32"):
        programs.build(config.replace("mesh.fsdp=2"), jax.devices()[:8])
