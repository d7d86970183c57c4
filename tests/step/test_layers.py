"""Rates that fall from layer to layer, and layers that are trained one after the other from the top down."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from stack.config import Config, ConfigError
from stack.doctor.numerics import example_batch
from stack.parallel import mesh as meshes
from stack.step import groups
from stack.step import program as programs
from stack.step import state as states
from stack.step.program import Program
from stack.step.step import apply, train_step

LAYERS = 3
MODELS: dict[str, dict[str, Any]] = {
    "decoder": {"position": "learned", "tied_embeddings": False},
    "encoder": {
        "kind": "encoder",
        "num_types": 2,
        "head_transform": True,
        "pooler": True,
        "embedding_norm": True,
    },
    "both": {"kind": "encoder_decoder", "num_decoder_layers": 2, "position": "relative"},
}
OBJECTIVES = {"decoder": "causal", "encoder": "masked_words", "both": "span_corruption"}
ABOVE = {
    "decoder": {"final_norm", "head"},
    "encoder": {"final_norm", "head", "pooler"},
    "both": {"encoder.final_norm", "decoder.final_norm"},
}
BELOW = {
    "decoder": {"embed": 3, "position": 3},
    "encoder": {"embed": 3, "position": 3, "types": 3, "embedding_norm": 3},
    "both": {"embed": 3, "encoder.relative": 3, "decoder.relative": 2},
}
FIELDS = {
    "data": {"sequence_length": 16},
    "optimizer": {"learning_rate": 0.1, "schedule": {"kind": "constant", "warmup_steps": 0}},
    "train": {"batch_size": 16, "steps": 40, "remat": "full"},
}
MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulation=2"]
KINDS = ("adamw", "sgd", "lion", "adafactor", "muon")
CASES = [
    *(("decoder", kind) for kind in KINDS),
    # Adafactor takes no stacks of several depths.
    *(pytest.param("both", kind, marks=pytest.mark.full) for kind in KINDS if kind != "adafactor"),
]


def program(*overrides: str, model: str = "decoder", devices: int = 1) -> Program:
    sizes = {"vocab_size": 101, "num_layers": LAYERS, "embed_dim": 32, "num_heads": 4, "max_length": 16}
    fields = {"model": sizes | {"dtype": "float32"} | MODELS[model]}
    fields["objective"] = {"kind": OBJECTIVES[model]}
    return programs.build(Config.model_validate(FIELDS | fields).replace(*overrides), jax.devices()[:devices])


def flat(tree: Any) -> dict[str, Any]:
    return {".".join(path): leaf for path, leaf in flatten_dict(tree).items()}


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_a_layer_or_above_or_below_all(model):
    made = program(model=model)
    depths, named = flat(made.depths), set[str]()
    for name, depth in depths.items():
        owner = next((one for one in (*ABOVE[model], *BELOW[model]) if name.startswith(f"{one}.")), None)
        if owner is None:
            number = 2 if name.startswith("decoder.") else LAYERS
            assert "layers." in name
            np.testing.assert_array_equal(depth, range(number)[::-1])
        else:
            named.add(owner)
            assert depth == BELOW[model].get(owner, -1), name
    assert named == {*ABOVE[model], *BELOW[model]}


def update(made: Program, steps: int = 1) -> tuple[dict, list[dict]]:
    """The parameters at first and after each update by gradients that are made up and not small."""
    with jax.set_mesh(states.concrete(made)):
        state = states.init(made)
        params, opt_state = state["params"], state["opt_state"]
        gradient = jax.tree.map(lambda leaf: jnp.cos(1e3 * leaf + 1), params)
        first, after = jax.device_get(params), []
        step = jax.jit(partial(apply, made))
        for _ in range(steps):
            params, opt_state = step(gradient, opt_state, params, jnp.bool(True))
            after.append(jax.device_get(params))
    return first, after


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_each_layer_moves_by_the_decay_to_the_number_of_layers_above_it(kind, model):
    """Exactly what plain updates are times BEiT's factor, weight decay too; groups have their own besides."""
    base = [f"optimizer.kind={kind}", "optimizer.clip_norm=null", "optimizer.weight_decay=0.3"]
    group = "optimizer.groups.0={parameters: ['*mlp*'], learning_rate_factor: 3}"
    first, (plain,) = update(program(*base, model=model))
    _, (decayed,) = update(program(*base, "optimizer.layer_decay=0.5", group, model=model))
    depths = flat(program(model=model).depths)
    for name, start in flat(first).items():
        factor = 0.5 ** (np.asarray(depths[name], np.float64) + 1) * (3 if "mlp" in name else 1)
        factor = factor.reshape(-1, *[1] * (start.ndim - 1)) if factor.ndim else factor
        wanted = factor * (np.float64(flat(plain)[name]) - start)
        moved = np.float64(flat(decayed)[name]) - start
        np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=3e-7, err_msg=name)
        assert np.abs(wanted).max() > 1e-5


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_layers_are_trained_one_after_the_other_from_the_top_down(kind, model):
    """What waits stays to the bit, weight decay too; what is trained is as if all were."""
    every, steps = 2, 8
    base = [f"optimizer.kind={kind}", "optimizer.weight_decay=0.3"]
    made = program(*base, f"optimizer.unfreeze_every={every}", model=model)
    first, after = update(made, steps)
    depths = flat(made.depths)
    previous = flat(first)
    for step, params in enumerate(map(flat, after)):
        for name, depth in depths.items():
            starts = every * np.maximum(depth, 0)
            moved = (params[name] != previous[name]).reshape(params[name].shape[0], -1).any(axis=1)
            if np.ndim(depth):
                np.testing.assert_array_equal(moved, step >= starts, err_msg=f"{name} at step {step}")
            else:
                assert moved.any() == (step >= starts), f"{name} at step {step}"
        previous = params
    _, (plain, *_) = update(program(*base, model=model))
    for name, depth in depths.items():
        here, there = flat(after[0])[name], flat(plain)[name]
        if np.ndim(depth):
            here, there = here[-1], there[-1]
        if np.ndim(depth) or depth == -1:
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-6 * np.abs(there).max(), err_msg=name)


def test_moments_of_a_layer_that_waits_follow_its_gradient():
    """So that Adam's first steps of it are no larger than others: of one gradient, of the rate."""
    made = program(
        *("optimizer.unfreeze_every=4", "optimizer.beta2=0.999", "optimizer.weight_decay=0"),
        "optimizer.clip_norm=null",
    )
    first, after = update(made, 6)
    kernel = "layers.mlp.up.kernel"
    before, now = flat(after[3])[kernel], flat(after[4])[kernel]
    np.testing.assert_array_equal(before[1], flat(first)[kernel][1])
    np.testing.assert_allclose(np.abs(now[1] - before[1]), 0.1, rtol=1e-2)
    np.testing.assert_array_equal(now[0], before[0])


def batch(made: Program) -> dict[str, Any]:
    arrays, places = example_batch(), made.abstract_batch()
    return {name: jax.device_put(values, places[name].sharding) for name, values in arrays.items()}


def trained(made: Program, steps: int) -> dict[str, Any]:
    with meshes.use(made.mesh):
        state, step = states.init(made), jax.jit(partial(train_step, made))
        for _ in range(steps):
            state, _ = step(state, batch(made))
        return flat(jax.device_get(state["params"]))


BOTH = ["optimizer.layer_decay=0.7", "optimizer.unfreeze_every=1", "optimizer.epsilon=1e-3"]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([*MESH, "mesh.zero=3"], id="zero 3"),
        pytest.param([*MESH, "mesh.zero=1"], id="zero 1", marks=pytest.mark.full),
        pytest.param(["mesh.data=4", "mesh.tensor=2"], id="data and tensor", marks=pytest.mark.full),
    ],
)
def test_every_layout_trains_as_one_device(layout):
    one = trained(program(*BOTH, "model.qkv_bias=false"), 3)
    many = trained(program(*BOTH, "model.qkv_bias=false", *layout, devices=8), 3)
    first = trained(program("model.qkv_bias=false"), 0)
    for name, wanted in one.items():
        moved = np.abs(wanted - first[name]).max()
        np.testing.assert_allclose(many[name], wanted, rtol=0, atol=1e-4 * moved, err_msg=name)
    kernel = "layers.attention.out.kernel"
    assert [bool((one[kernel][layer] != first[kernel][layer]).any()) for layer in range(3)] == [True] * 3
    np.testing.assert_array_equal(one["embed.table"], first["embed.table"])


@pytest.mark.parametrize("model", ["decoder", pytest.param("both", marks=pytest.mark.full)])
def test_moments_in_host_memory_change_nothing_of_it(model):
    _, plain = update(program(*BOTH, model=model), 4)
    _, offloaded = update(program(*BOTH, "train.offload_optimizer=true", model=model), 4)
    for step, (here, there) in enumerate(zip(map(flat, plain), map(flat, offloaded), strict=True)):
        for name, wanted in here.items():
            np.testing.assert_allclose(
                there[name], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=f"{name} at {step}"
            )


def test_what_is_frozen_stays_and_still_counts_as_a_layer():
    made = program('optimizer.frozen=["embed.*", "layers.attention.*"]', *BOTH)
    assert flat(made.depths).keys() == flat(states.abstract(made)["params"]).keys()
    assert "layers.attention.out.kernel" not in flat(made.depths)
    np.testing.assert_array_equal(flat(made.depths)["layers.mlp.up.kernel"], [2, 1, 0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.layer_decay=0"], r"optimizer\.layer_decay=0 must be greater than 0"),
        (["optimizer.layer_decay=1.1"], r"optimizer\.layer_decay=1\.1 must be "),
        (["optimizer.unfreeze_every=0"], r"optimizer\.unfreeze_every=0 must be "),
        (
            ["optimizer.unfreeze_every=14"],
            r"unfreeze_every=14 trains what is below 3 layers from step 42 on, and .*; set it to 13 or less",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        program(*overrides)


def test_modules_below_the_layers_are_named_once():
    """A model with another one outside of its layers must say on which side it is."""
    assert set(groups.BELOW) == {name.rpartition(".")[2] for names in BELOW.values() for name in names}
