"""The decoder as a whole: documents apart, depth for free, sizes as published."""

import functools
import math
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import Config, DecoderConfig, RopeConfig, load
from stack.layers.dropout import example_keys
from stack.models.decoder import Decoder
from stack.models.stack import SAVED, Execution
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import train_step

SHARED = {
    "vocab_size": 61,
    "vocab_multiple": 16,
    "max_length": 24,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "init_std": 0.3,
    "dtype": "float32",
}
FAMILIES = {
    "gpt": DecoderConfig(**SHARED, position_init_std=0.3),
    "llama": DecoderConfig(
        **SHARED,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        num_kv_heads=2,
        qk_norm=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_embeddings=False,
        sliding_window=4,
    ),
    "gemma": DecoderConfig(
        **SHARED,
        norm="rmsnorm_zero_centered",
        norm_placement="both",
        mlp="geglu",
        position="rotary",
        local_rope_theta=100.0,
        num_kv_heads=2,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        sliding_window=2,
        attention_pattern=["local", "global"],
        attention_softcap=3.0,
        scale_embedding=True,
    ),
}
RECIPES = Path(__file__).parents[2] / "configs"
LENGTHS = (5, 9, 3, 4)
"""Of the documents in a row; three places of padding follow."""
SEGMENTS = np.repeat([1, 2, 3, 4, 0], (*LENGTHS, 3)).astype(np.int32)[None]
POSITIONS = np.concatenate([np.arange(n) for n in (*LENGTHS, 3)]).astype(np.int32)[None]
TOKENS = np.random.default_rng(0).integers(0, 61, SEGMENTS.shape).astype(np.int32)
BATCH = jax.tree.map(jnp.asarray, {"tokens": TOKENS, "positions": POSITIONS, "segments": SEGMENTS})


@pytest.fixture(params=FAMILIES)
def config(request):
    return FAMILIES[request.param]


@functools.cache
def hidden_states(config):
    """(tokens, positions, segments) -> [batch, length, embed]."""
    model = Decoder(config, rngs=nnx.Rngs(0))

    @jax.jit
    def run(tokens, positions, segments):
        batch = {"tokens": tokens, "positions": positions, "segments": segments}
        return model(batch, Execution()).hidden

    return lambda *arrays: np.asarray(run(*arrays))


@pytest.mark.parametrize("document", [1, 2, 3, 4, 0])
def test_a_document_is_not_seen_by_the_others(config, document):
    here = document == SEGMENTS
    before = hidden_states(config)(TOKENS, POSITIONS, SEGMENTS)
    changed = hidden_states(config)(np.where(here, (TOKENS + 17) % 61, TOKENS), POSITIONS, SEGMENTS)
    np.testing.assert_array_equal(changed[~here], before[~here])
    assert (changed[here] != before[here]).any(-1).all()


def test_a_document_in_a_packed_row_is_the_document_alone(config):
    packed = hidden_states(config)(TOKENS, POSITIONS, SEGMENTS)
    whole = np.arange(24, dtype=np.int32)[None]
    for document in range(1, 5):
        here = document == SEGMENTS
        tokens = np.resize(TOKENS[here], TOKENS.shape)
        alone = hidden_states(config)(tokens, whole, np.ones_like(whole))[:, : np.count_nonzero(here)]
        np.testing.assert_allclose(packed[here], alone[0], atol=2e-5)


def test_a_token_does_not_see_the_ones_after_it(config):
    whole = np.arange(24, dtype=np.int32)[None]
    ones = np.ones_like(whole)
    before = hidden_states(config)(TOKENS, whole, ones)
    after = hidden_states(config)(np.where(whole < 10, TOKENS, 3), whole, ones)
    np.testing.assert_array_equal(after[:, :10], before[:, :10])
    assert (after[:, 10:] != before[:, 10:]).any()


def test_each_layer_sees_as_far_as_the_pattern_says():
    """Three layers see 1 + 1, then all, then 1 + 1 tokens; without the one in the middle, 1 + 3 in all."""
    whole = np.arange(24, dtype=np.int32)[None]
    ones = np.ones_like(whole)

    def reach(**changes):
        """The last place at which a change of the first word is seen."""
        run = hidden_states(FAMILIES["gemma"].model_copy(update=changes))
        before, after = run(TOKENS, whole, ones), run(np.where(whole, TOKENS, 7), whole, ones)
        return int(np.flatnonzero((after != before).any(-1)).max())

    assert TOKENS[0, 0] != 7
    assert reach() == 23
    assert reach(attention_pattern=("local",)) == 3
    assert reach(attention_pattern=("local", "local", "local", "global")) == 3


def test_the_rotation_of_a_layer_is_that_of_its_kind():
    """Where all layers are of one kind, the other kind's rotation is not read."""
    whole = np.arange(24, dtype=np.int32)[None]

    def run(**changes):
        config = FAMILIES["gemma"].model_copy(update=changes)
        return hidden_states(config)(TOKENS, whole, np.ones_like(whole))

    one, other, local = RopeConfig(theta=100.0), RopeConfig(theta=10_000.0), {"attention_pattern": ("local",)}
    plain = {"rope": one, "local_rope_theta": None}
    np.testing.assert_array_equal(run(**local, rope=other), run(**local, **plain))
    full = local | {"sliding_window": None}
    np.testing.assert_array_equal(run(**full, rope=one), run(**full, **plain))
    mixed = run(rope=other)
    assert (mixed != run(**plain)).any()
    assert (mixed != run(rope=other, local_rope_theta=None)).any()


@pytest.mark.parametrize(
    "policy", [name if name == "full" else pytest.param(name, marks=pytest.mark.full) for name in SAVED]
)
def test_remat_changes_no_gradient_and_draws_the_same_dropout(policy):
    rates = {"embedding_dropout": 0.2, "attention_dropout": 0.2, "residual_dropout": 0.2}
    # The gradient of a key's bias is zero, as softmax does not see it: only rounding to compare.
    config = FAMILIES["gpt"].model_copy(update=rates | {"qkv_bias": False})
    model = Decoder(config, rngs=nnx.Rngs(0))
    keys = example_keys(0, jnp.int32(3), jnp.arange(1))

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(model, remat):
        output = model(BATCH, Execution(keys=keys, remat=remat))
        return jnp.square(output.hidden[..., 0]).sum()

    expected, actual = (jax.tree.leaves(gradient(model, remat)) for remat in ("none", policy))
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * float(jnp.abs(one).max()))


def test_every_layer_drops_other_channels():
    """Two layers that each add dropout(1): a channel got 0, 1 or 2 of the ones, unless bits repeat."""
    config = FAMILIES["gpt"].model_copy(update={"num_layers": 2, "residual_dropout": 0.5})
    model = jax.tree.map(jnp.zeros_like, Decoder(config, rngs=nnx.Rngs(0)))
    model.layers.mlp.down.bias[...] = jnp.ones((2, 32))
    model.final_norm.scale[...] = jnp.ones(32)
    keys = example_keys(0, jnp.int32(0), jnp.arange(1))
    hidden = np.asarray(model(BATCH, Execution(keys=keys)).hidden)
    for token in hidden[0]:
        assert len(np.unique(token.round(4))) == 3


def test_depth_costs_no_compile_time():
    """The step traces to as many equations, of the same program text, at 2 layers as at 12."""
    sizes = [step_size(num_layers) for num_layers in (2, 12)]
    assert sizes[0] == sizes[1]


def test_layers_that_are_computed_again_are_never_unrolled():
    """In one piece of code the compiler would compute them at once and keep all of it."""

    def lines(remat, scan_unroll):
        config = FAMILIES["gpt"].model_copy(update={"scan_unroll": scan_unroll})
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))

        def total(model, batch):
            return model(batch, Execution(remat=remat)).hidden.sum()

        return jax.jit(jax.grad(total)).lower(model, BATCH).as_text().count("\n")

    assert lines("full", 3) == lines("full", 1)
    assert lines("none", 3) > 1.5 * lines("none", 1)


def step_size(num_layers):
    model = FAMILIES["llama"].model_copy(update={"num_layers": num_layers})
    config = Config.model_validate(
        {"model": model, "data": {"sequence_length": 16}, "train": {"batch_size": 2, "remat": "full"}}
    )
    program = programs.build(config, jax.devices()[:1])
    with meshes.use(program.mesh):
        traced = jax.jit(functools.partial(train_step, program)).trace(
            states.abstract(program), program.abstract_batch()
        )
        return count_equations(traced.jaxpr.jaxpr), traced.lower().as_text().count("\n")


def count_equations(jaxpr):
    inner = jax.extend.core.jaxprs_in_params
    return sum(1 + sum(map(count_equations, inner(equation.params))) for equation in jaxpr.eqns)


@pytest.mark.parametrize(
    ("recipe", "devices", "parameters"),
    [
        ("turing_nlg_17b", 128, 17_177_045_760),
        ("gpt2_124m", 8, 124_439_808),
        ("gpt2_355m", 8, 354_823_168),
        ("gpt2_774m", 8, 774_030_080),
        ("gpt2_1_5b", 8, 1_557_611_200),
        ("llama3_8b", 8, 8_030_261_248),
        ("llama3_70b", 64, 70_553_706_496),
        ("palm_8b", 8, 8_632_012_800),
        ("gemma2_2b", 8, 2_614_341_888),
        ("gemma3_1b", 8, 999_885_952),
    ],
)
def test_published_parameter_counts_without_allocating_one(recipe, devices, parameters):
    config = load(RECIPES / f"{recipe}.yaml")
    program = programs.on_mesh(config, meshes.abstract(config.mesh, devices), "gpu", 9.0)
    assert program.num_parameters == parameters
    leaves = jax.tree.leaves(program.parameters)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.float32 for leaf in leaves)


def test_initial_weights_have_the_published_deviations():
    config = DecoderConfig(vocab_size=1000, num_layers=4, embed_dim=128, num_heads=4, max_length=512)
    params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    layers = params["layers"]
    written = (layers["attention"]["out"], layers["mlp"]["down"])
    read = (*(layers["attention"][name] for name in ("query", "key", "value")), layers["mlp"]["up"])
    assert np.std(params["embed"]["table"][:1000]) == pytest.approx(0.02, rel=0.02)
    assert not np.asarray(params["embed"]["table"][1000:]).any()
    assert np.std(params["position"]["table"]) == pytest.approx(0.01, rel=0.02)
    for matrix in read:
        assert np.std(matrix["kernel"]) == pytest.approx(0.02, rel=0.02)
    for matrix in written:
        assert np.std(matrix["kernel"]) == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert not any(np.asarray(matrix["bias"]).any() for matrix in (*read, *written))
    for norm in (layers["attention_norm"], layers["mlp_norm"], params["final_norm"]):
        assert (np.asarray(norm["scale"]) == 1).all()
        assert not np.asarray(norm["bias"]).any()


def test_every_layer_starts_differently():
    kernel = Decoder(FAMILIES["gpt"], rngs=nnx.Rngs(0)).layers.mlp.up.kernel[...]
    assert len(np.unique(kernel[:, 0, 0])) == 3
