"""Parameters that are frozen stay bit for bit, cost no moments, and change nobody else's gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from stack import Trainer
from stack.config import Config, ConfigError
from stack.doctor.numerics import LIMIT, example_batch
from stack.parallel import mesh as meshes
from stack.planner.plan import plan
from stack.step import program as programs
from stack.step import state as states
from stack.step.program import Program
from stack.step.step import loss_gradient, train_step

FIELDS = {
    "model": {
        "vocab_size": 101,
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "max_length": 16,
        "init_std": 0.2,
        "qkv_bias": False,
        "tied_embeddings": False,
        "dtype": "float32",
    },
    "data": {"sequence_length": 16},
    "optimizer": {"schedule": {"kind": "constant", "warmup_steps": 0}},
    "train": {"batch_size": 16, "remat": "full"},
}
PATTERNS = 'optimizer.frozen=["embed.*", "layers.attention.*"]'
STAGE_3 = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulation=2"]


def program(*overrides: str, devices: int = 1) -> Program:
    return programs.build(Config.model_validate(FIELDS).replace(*overrides), jax.devices()[:devices])


def batch(program: Program) -> dict[str, Any]:
    arrays, places = example_batch(), program.abstract_batch()
    return {name: jax.device_put(values, places[name].sharding) for name, values in arrays.items()}


def frozen_names(program: Program) -> set[str]:
    return {".".join(path) for path in program.frozen}


@pytest.mark.parametrize(
    ("layout", "devices"),
    [
        pytest.param([], 1, id="one device"),
        pytest.param(STAGE_3, 8, id="zero 3", marks=pytest.mark.full),
        pytest.param([*STAGE_3, "mesh.zero=1"], 8, id="zero 1", marks=pytest.mark.full),
    ],
)
def test_the_gradient_of_the_rest_is_what_it_was(layout, devices):
    whole, partly = program(), program(PATTERNS, *layout, devices=devices)
    with meshes.use(whole.mesh):
        params = states.init_params(whole)
        expected, _ = jax.jit(partial(loss_gradient, whole))(params, jnp.int32(0), batch(whole))
    with meshes.use(partly.mesh):
        trained, frozen = partly.split(states.init_params(partly))
        compute = jax.jit(partial(loss_gradient, partly))
        gradient, _ = compute(trained, jnp.int32(0), batch(partly), frozen)
    flat: dict[Any, Any] = flatten_dict(gradient)
    all_of_it: dict[Any, Any] = flatten_dict(expected)
    assert flat.keys() == all_of_it.keys() - partly.frozen
    assert partly.frozen
    for path, leaf in flat.items():
        limit = LIMIT * float(jnp.abs(all_of_it[path]).max())
        np.testing.assert_allclose(leaf, all_of_it[path], atol=limit, err_msg=".".join(path))


@pytest.mark.parametrize("offload", [pytest.param("false", marks=pytest.mark.full), "true"])
def test_steps_move_the_rest_alone(offload):
    partly = program(PATTERNS, f"train.offload_optimizer={offload}")
    assert frozen_names(partly) == {
        "embed.table",
        *(f"layers.attention.{name}.kernel" for name in ("query", "key", "value", "out")),
        "layers.attention.out.bias",
    }
    with meshes.use(partly.mesh):
        state = states.init(partly)
        moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
        assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
        before = jax.device_get(states.join(state))
        step = jax.jit(partial(train_step, partly))
        for _ in range(2):
            state, _ = step(state, batch(partly))
    after: dict[Any, Any] = flatten_dict(jax.device_get(states.join(state)))
    earlier: dict[Any, Any] = flatten_dict(before)
    same = {path for path, leaf in earlier.items() if np.array_equal(leaf, after[path])}
    assert same == partly.frozen


@pytest.mark.full
def test_a_run_with_frozen_parameters_goes_on_and_is_opened(tmp_path):
    overrides = (
        f"output_dir={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "data.sources.0={kind: synthetic, max_bytes: 40000}",
        "data.heldout_fraction=0.1",
        "model.vocab_size=257",
        "train.steps=4",
        "checkpoint.every=2",
        'sample={prompt: "", length: 3}',
        PATTERNS,
    )
    config = Config.model_validate(FIELDS).replace(*overrides)
    whole = Trainer(config.replace("name=whole"), devices=jax.devices()[:1])
    whole.fit()
    half = config.replace("name=half")
    Trainer(half.replace("train.steps=2"), devices=jax.devices()[:1]).fit()
    rest = Trainer(half, devices=jax.devices()[:1])
    rest.fit()
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(rest.state), strict=True):
        np.testing.assert_array_equal(one, other)
    opened = Trainer.from_run(rest.folder, devices=jax.devices()[:1])
    assert opened.evaluate() == whole.evaluate()
    assert opened.generate(["a"]) == whole.generate(["a"])


def test_what_cannot_be_frozen_is_told():
    with pytest.raises(ConfigError, match=r"^optimizer\.frozen: 'embd\.\*' is the name of none of "):
        program('optimizer.frozen=["embd.*"]')
    with pytest.raises(ConfigError, match=r"^optimizer\.frozen leaves nothing to train"):
        program('optimizer.frozen=["*"]')
    with pytest.raises(
        ConfigError, match=r"^optimizer\.groups\.0\.parameters: 'embed\.\*' is the name of none"
    ):
        program(PATTERNS, "optimizer.groups.0={parameters: [embed.*], weight_decay: 0}")
    planned = Config.model_validate(FIELDS).replace('optimizer.frozen=["embd.*"]', "mesh.fsdp=1")
    with pytest.raises(ConfigError, match=r"^optimizer\.frozen: 'embd\.\*' is the name of none of "):
        plan(planned, hardware="h100", devices=1)
