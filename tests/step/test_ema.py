"""The moving average of the weights: its formula, its place, and that it is what is evaluated."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import records, run, saved_state

from stack import StackError, Trainer
from stack.doctor.numerics import ONE_DEVICE, config_of, example_batch
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.ema import average
from stack.step.step import train_step

EMA = "optimizer.ema_decay=0.8"
STAGE_3 = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def test_it_is_its_formula_and_a_step_that_is_not_applied_leaves_it() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(3, 4)) for _ in range(60)]
    mean, applied = weights[0], 0
    ours = {"w": jnp.asarray(weights[0], jnp.float32)}
    update = jax.jit(partial(average, 0.8))
    for number, weight in enumerate(weights[1:]):
        is_good = number % 5 != 3
        now = {"w": jnp.asarray(weight if is_good else weight * np.nan, jnp.float32)}
        before = ours
        ours = update(ours, now, applied=jnp.int32(applied), is_good=jnp.bool(is_good))
        if is_good:
            decay = min(0.8, (1 + applied) / (10 + applied))
            mean, applied = decay * mean + (1 - decay) * weight, applied + 1
        else:
            np.testing.assert_array_equal(ours["w"], before["w"])
        np.testing.assert_allclose(ours["w"], mean, rtol=1e-5, atol=1e-6)
    assert applied > 40, "longer than the decay grows"


@pytest.mark.parametrize(
    ("layout", "devices"), [([], 1), pytest.param(STAGE_3, 8, marks=pytest.mark.full, id="zero 3")]
)
def test_the_step_keeps_it_beside_the_weights_that_are_trained(layout, devices) -> None:
    config = config_of(ONE_DEVICE, "llama", "float32").replace(EMA, "optimizer.frozen=[embed.*]", *layout)
    made = programs.build(config, jax.devices()[:devices])
    places = made.abstract_batch()
    rows = {name: jax.device_put(rows, places[name].sharding) for name, rows in example_batch("gpt").items()}
    step = jax.jit(partial(train_step, made))

    def sharding(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, tree)

    with meshes.use(made.mesh):
        state = states.init(made)
        mean = jax.device_get(state["params"])
        for applied in range(3):
            assert sharding(state["ema"]) == sharding(states.abstract(made)["ema"])
            state, _ = step(state, rows)
            decay, now = (1 + applied) / (10 + applied), jax.device_get(state["params"])
            mean = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, mean, now)
        broken, metrics = step(state | {"params": jax.tree.map(lambda x: x * jnp.nan, state["params"])}, rows)
        assert metrics["skipped"] == 1
        jax.tree.map(
            np.testing.assert_array_equal, jax.device_get(broken["ema"]), jax.device_get(state["ema"])
        )
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(state["ema"]), mean)
    assert "embed" not in state["ema"]
    used = states.join(state)
    np.testing.assert_array_equal(used["head"]["table"], state["ema"]["head"]["table"])
    np.testing.assert_array_equal(used["embed"]["table"], state["frozen"]["embed"]["table"])


def test_it_is_what_is_evaluated_and_a_run_goes_on_with_it(tmp_path) -> None:
    options = ("train.steps=8", "eval.every=4", "checkpoint.every=4", "model.num_layers=1")
    whole = run(tmp_path, "whole", EMA, *options)
    run(tmp_path, "parts", EMA, *options[1:], "train.steps=4")
    parts = run(tmp_path, "parts", EMA, *options)
    assert records(tmp_path, "parts") == records(tmp_path, "whole")
    assert saved_state(tmp_path, "parts") == saved_state(tmp_path, "whole")
    plain = run(tmp_path, "plain", *options)
    assert whole.state is not None
    assert plain.state is not None
    losses = [
        [record["loss"] for record in records(tmp_path, name) if record["kind"] == "train"]
        for name in ("whole", "plain")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5, err_msg="it changes no step")
    assert whole.evaluate()["loss"] != plain.evaluate()["loss"]
    plain.state |= {"params": whole.state["ema"]}
    assert whole.evaluate() == plain.evaluate()
    opened = Trainer.from_run(parts.folder, devices=jax.devices()[:1])
    assert opened.evaluate() == whole.evaluate()


def test_a_run_that_goes_on_with_one_is_asked_and_begins_it_where_it_stands(tmp_path) -> None:
    options = ("checkpoint.every=4", "eval.every=0", "model.num_layers=1")
    run(tmp_path, "late", *options, "train.steps=4")
    with pytest.raises(StackError, match=r"optimizer\.ema_decay null -> 0\.8"):
        run(tmp_path, "late", *options, "train.steps=5", EMA)
    late = run(tmp_path, "late", *options, "train.steps=5", EMA, accept=["optimizer.ema_decay"])
    assert late.state is not None
    mean, now = late.state["ema"], late.state["params"]
    gaps = jax.tree.map(lambda mean, now: float(jnp.abs(mean - now).max()), mean, now)
    # Of two numbers a step apart, a learning rate is the most that Adam moves one.
    assert 0 < max(jax.tree.leaves(gaps)) < 0.01
