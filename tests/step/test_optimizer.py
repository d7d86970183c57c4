"""Optimizers, schedules and decay."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stack.config import Config, ConfigError, DecoderConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stack.doctor.numerics import ONE_DEVICE, config_of, example_batch
from stack.parallel import mesh as meshes
from stack.step import optimizer as optimizers
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import apply, loss_gradient

KINDS = ("adamw", "sgd", "lion", "adafactor", "muon")
LAYERS = 3
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "query": {
            "kernel": ("layers", "embed", "heads", "head_dim"),
            "bias": ("layers", "heads", "head_dim"),
        },
        "mlp": {"kernel": ("layers", "embed", "mlp")},
        "norm": {"scale": ("layers", "embed")},
    },
}
ROLES = {
    "embed": {"table": "table"},
    "layers": {
        "query": {"kernel": "matrix", "bias": "vector"},
        "mlp": {"kernel": "matrix"},
        "norm": {"scale": "vector"},
    },
}
SIZES = {"vocab": 160, "embed": 144, "heads": 2, "head_dim": 72, "mlp": 256, "layers": LAYERS}


def tree(seed: int) -> dict:
    """Random arrays of AXES; Adafactor factors those with two dimensions of 128 or more."""
    rng = np.random.default_rng(seed)
    scale = np.array([1e-3, 1.0, 10.0])  # layers of different size: a rule over the stack would mix them

    def make(names):
        values = rng.normal(size=[SIZES[name] for name in names]).astype(np.float32)
        if names[0] == "layers":
            values *= scale.reshape(-1, *[1] * (values.ndim - 1)).astype(np.float32)
        return jnp.asarray(values)

    return jax.tree.map(make, AXES, is_leaf=lambda node: isinstance(node, tuple))


def unstack(stacked: dict, axes: bool = False) -> dict:
    """The layers as separate parameters, each under a number."""
    take = (lambda _: lambda leaf: leaf[1:]) if axes else (lambda i: lambda leaf: leaf[i])
    is_leaf = (lambda node: isinstance(node, tuple)) if axes else None
    layers = {str(i): jax.tree.map(take(i), stacked["layers"], is_leaf=is_leaf) for i in range(LAYERS)}
    return {"embed": stacked["embed"], "layers": layers}


def build(config, **trees):
    options: dict[str, Any] = {"axes": AXES, "roles": ROLES} | trees
    return optimizers.build(config, steps=10, **options)


def train(tx, params, gradients):
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_and_unstacked_layers_train_alike(kind):
    config = OptimizerConfig(kind=kind, learning_rate=0.1, schedule=ScheduleConfig(warmup_steps=1))
    params, gradients = tree(0), [tree(1), tree(2), tree(3)]
    stacked = train(build(config), params, gradients)
    roles = {"embed": ROLES["embed"], "layers": {str(layer): ROLES["layers"] for layer in range(LAYERS)}}
    apart = train(
        build(config, axes=unstack(AXES, axes=True), roles=roles),
        unstack(params),
        [unstack(gradient) for gradient in gradients],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), unstack(stacked), apart)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_of_different_depth_train_as_each_alone(kind):
    config = OptimizerConfig(kind=kind, learning_rate=0.1, schedule=ScheduleConfig(warmup_steps=1))
    short, long = ({"layers": tree(seed)["layers"]} for seed in (0, 1))
    short = jax.tree.map(lambda leaf: leaf[:2], short)
    axes, roles = {"layers": AXES["layers"]}, {"layers": ROLES["layers"]}
    gradients = [jax.tree.map(lambda leaf, by=by: leaf * by, {"a": short, "b": long}) for by in (1.0, -0.5)]
    both = build(config, axes={"a": axes, "b": axes}, roles={"a": roles, "b": roles})
    together = train(both, {"a": short, "b": long}, gradients)
    alone = build(config, axes=axes, roles=roles)
    for name, params in (("a", short), ("b", long)):
        # The clip looks at the whole gradient.
        norms = [optax.tree.norm(gradient) for gradient in gradients]
        own = [
            jax.tree.map(lambda leaf, norm=norm: leaf / norm, gradient[name])
            for gradient, norm in zip(gradients, norms, strict=True)
        ]
        assert config.clip_norm == 1.0
        expected = train(alone, params, own)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), together[name], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_decay(kind):
    moved = {}
    for decay in (0.0, 0.5):
        config = OptimizerConfig(
            kind=kind, weight_decay=decay, decay_embeddings=False, schedule=ScheduleConfig(warmup_steps=0)
        )
        moved[decay] = train(build(config), tree(0), [tree(1)])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), moved[0.0], moved[0.5])
    layers = same["layers"]
    assert all([same["embed"]["table"], layers["norm"]["scale"], layers["query"]["bias"]])
    assert not any([layers["query"]["kernel"], layers["mlp"]["kernel"]])


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig(
        kind="sgd",
        beta1=0.0,
        learning_rate=1.0,
        weight_decay=0.0,
        clip_norm=0.5,
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
    )
    params = tree(0)
    after = train(build(config), params, [tree(1)])
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, params, after))
    assert moved == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("epsilon", [1e-8, 0.3])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_is_its_formula(clip_norm, epsilon):
    """Clipping of the whole gradient, then arXiv 1711.05101 (algorithm 2), in float64."""
    config = OptimizerConfig(
        learning_rate=0.1,
        beta1=0.8,
        beta2=0.9,
        epsilon=epsilon,
        weight_decay=0.2,
        clip_norm=clip_norm,
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
    )
    gradients = [tree(seed) for seed in (1, 2, 3)]
    actual = train(build(config), tree(0), gradients)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (tree(0), gradients))
    params, gradients = jax.tree.leaves(exact[0]), [jax.tree.leaves(one) for one in exact[1]]
    decays = [0.0 if role == "vector" else 0.2 for role in jax.tree.leaves(ROLES)]
    first, second = ([np.zeros_like(leaf) for leaf in params] for _ in range(2))
    for number, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in gradient))
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        for i, leaf in enumerate(gradient):
            first[i] = 0.8 * first[i] + 0.2 * scale * leaf
            second[i] = 0.9 * second[i] + 0.1 * np.square(scale * leaf)
            mean, square = first[i] / (1 - 0.8**number), second[i] / (1 - 0.9**number)
            params[i] = params[i] - 0.1 * (mean / (np.sqrt(square) + epsilon) + decays[i] * params[i])
    for one, other in zip(jax.tree.leaves(actual), params, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


GROUPS = (
    {"parameters": ["layers.mlp.*", "embed.*"], "learning_rate_factor": 3.0},
    {"parameters": ["*.bias"], "weight_decay": 0.5},
    {"parameters": ["layers.query.kernel"], "learning_rate_factor": 0.25, "weight_decay": 0.0},
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_has_its_own_rate_and_decay_and_the_others_do_not_notice(kind):
    options = {"kind": kind, "learning_rate": 0.1, "weight_decay": 0.2}
    options |= {"clip_norm": None, "schedule": {"kind": "constant", "warmup_steps": 0}}

    def moves(groups, **changes):
        tx = build(OptimizerConfig.model_validate(options | changes | {"groups": groups}))
        return tx.update(tree(1), tx.init(tree(0)), tree(0))[0]

    plain, grouped, still = moves([]), moves(GROUPS), moves([], weight_decay=0.0)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    close(grouped["embed"]["table"], 3 * plain["embed"]["table"])
    close(grouped["layers"]["mlp"]["kernel"], 3 * plain["layers"]["mlp"]["kernel"])
    close(grouped["layers"]["query"]["kernel"], 0.25 * still["layers"]["query"]["kernel"])
    bias = tree(0)["layers"]["query"]["bias"]
    close(grouped["layers"]["query"]["bias"], plain["layers"]["query"]["bias"] - 0.1 * 0.5 * bias)
    np.testing.assert_array_equal(grouped["layers"]["norm"]["scale"], plain["layers"]["norm"]["scale"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"parameters": ["layers.none.*"], "weight_decay": 0.0}], r"groups\.0\.parameters: 'layers\.none"),
        (
            [GROUPS[0], {"parameters": ["*table"], "weight_decay": 0.0}],
            r"groups\.1.* embed\.table is in .*\.0",
        ),
    ],
)
def test_a_group_that_names_nothing_or_what_another_has_is_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        build(OptimizerConfig.model_validate({"groups": groups}))


def rates(kind: str, **options) -> list[float]:
    config = OptimizerConfig(
        learning_rate=1.0, schedule=ScheduleConfig(kind=kind, warmup_steps=10, **options)
    )
    schedule = optimizers.schedule(config, steps=110)
    return [float(np.asarray(schedule(step))) for step in range(110)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_to_the_peak_and_the_first_step_moves(kind):
    values = rates(kind)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert values[:10] == sorted(values[:10])


def test_decays_end_at_the_final_fraction():
    assert rates("cosine", final_fraction=0.1)[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates("linear", final_fraction=0.1)[-1] == pytest.approx(0.1, abs=1e-6)
    assert rates("constant")[-1] == 1.0


def test_wsd_is_flat_then_falls():
    values = rates("wsd", decay_fraction=0.2, final_fraction=0.0)
    assert values[10:89] == [1.0] * 79
    assert values[-1] == pytest.approx(0.0, abs=1e-6)
    assert values[99] == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope="module")
def step_without_update():
    """A program, its parameters, and the gradient of a batch that has every word but the padding."""
    program = programs.build(config_of(ONE_DEVICE, "llama", "float32"), jax.devices()[:1])
    batch = {name: jnp.asarray(values) for name, values in example_batch().items()}
    with meshes.use(program.mesh):
        params = states.init_params(program)
        gradient, _ = jax.jit(lambda *arrays: loss_gradient(program, *arrays))(params, jnp.int32(0), batch)
    return program, params, gradient


@pytest.mark.parametrize("kind", KINDS)
def test_padded_words_stay_zero_under_every_optimizer(step_without_update, kind):
    plain, params, gradient = step_without_update
    changed = OptimizerConfig(kind=kind, schedule=ScheduleConfig(warmup_steps=1))
    program = dataclasses.replace(plain, config=plain.config.model_copy(update={"optimizer": changed}))
    with meshes.use(program.mesh):
        state = program.optimizer.init(params)
        after, _ = jax.jit(lambda *arrays: apply(program, *arrays))(gradient, state, params, jnp.bool(True))
    words = program.config.model.vocab_size
    for name in ("embed", "head"):
        table = np.asarray(after[name]["table"])
        assert (table[words:] == 0).all()
        assert table[:words].any(axis=1).all()
        assert (table[:words] != np.asarray(params[name]["table"])[:words]).any()


def test_config_of_a_whole_run_builds():
    config = Config(model=DecoderConfig(num_layers=1), train=TrainConfig(steps=200))
    assert programs.build(config, jax.devices()[:1]).optimizer.init
