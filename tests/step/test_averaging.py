"""Instances that train apart: what they compute, wherever they lie."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from plain_sgd import SGD, Params, PlainSgd, params_of
from tiny_runs import config, records, saved_state

from stack import ConfigError, StackError, Trainer
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.train import starting
from stack.train.checkpoint.checkpoints import named_leaves
from stack.transfer.exporting import export

LOCAL = ("average.every=4", "average.instances=4")
DILOCO = (*LOCAL, "average.outer=nesterov")


def trainer(folder, name: str, *overrides: str, devices: int = 1) -> Trainer:
    return Trainer(config(folder, name, "mesh.fsdp=1", *overrides), devices=jax.devices()[:devices])


def begun(made: Trainer) -> dict[str, Any]:
    return starting.begin(made.program, made.tokenizer, warn=print)[0]


def train(made: Trainer, steps: int, *, first: int = 0) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The state after so many steps, and the metrics of each."""
    told = []
    with meshes.use(made.mesh):
        state = begun(made)
        for step in range(steps):
            state, metrics = made.steps.advance(step, state, made.batch(first + step))
            told.append(made.steps.read(metrics))
    return state, told


def by_hand(made: Trainer, steps: int, *, nesterov: bool) -> Params:
    """Local SGD and DiLoCo of plain SGD, in NumPy."""
    average, number = made.config.average, 4
    apart = PlainSgd(made.config, number)
    outer, momentum = apart.begun, {name: np.zeros_like(values) for name, values in apart.begun.items()}
    inner = [dict(outer) for _ in range(number)]
    for step in range(steps):
        apart.step(step, inner)
        if (step + 1) % average.every:
            continue
        for name, begun in list(outer.items()):
            mean = np.mean([params[name] for params in inner], axis=0)
            if nesterov:
                momentum[name] = average.outer_momentum * momentum[name] + (begun - mean)
                change = (begun - mean) + average.outer_momentum * momentum[name]
                mean = begun - average.outer_learning_rate * change
            outer[name] = mean
        inner = [dict(outer) for _ in range(number)]
    return outer


@pytest.mark.parametrize(
    ("overrides", "nesterov"),
    [(LOCAL, False), ((*DILOCO, "average.outer_learning_rate=0.6", "average.outer_momentum=0.8"), True)],
    ids=["local SGD", "DiLoCo"],
)
def test_instances_of_plain_sgd_are_a_loop_in_numpy(tmp_path, overrides, nesterov):
    made = trainer(tmp_path, "instances", *SGD, *overrides)
    state, _ = train(made, 8)
    for name, values in by_hand(made, 8, nesterov=nesterov).items():
        np.testing.assert_allclose(params_of(state)[name], values, atol=2e-6, err_msg=name)


def test_the_average_of_every_step_is_data_parallelism(tmp_path):
    """With plain SGD and an outer step all the way: of rows that all count alike, as in these batches."""
    plain, counted = train(trainer(tmp_path, "plain", *SGD), 2, first=1)
    assert {one["tokens"] for one in counted} == {256}
    each = ("average.outer=nesterov", "average.outer_learning_rate=1", "average.outer_momentum=0")
    apart, _ = train(trainer(tmp_path, "apart", *SGD, *each, "average.instances=4"), 2, first=1)
    for name, values in params_of(plain).items():
        np.testing.assert_allclose(params_of(apart)[name], values, atol=2e-6, err_msg=name)


def test_without_periods_there_are_no_instances(tmp_path):
    made = trainer(tmp_path, "plain", "average.every=1", "mesh.data=4", devices=4)
    assert made.program.instances is None
    assert states.abstract(made.program).keys() == {"params", "opt_state", "step", "guard"}


PLACES = {
    "data 4": (4, ("mesh.data=4",)),
    "two slices each": (8, ("mesh.data=8",)),
    "two on each slice, fsdp zero 1": (4, ("mesh.data=2", "mesh.fsdp=2", "mesh.zero=1")),
    "tensor sequence parallel": (8, ("mesh.data=4", "mesh.tensor=2", "mesh.sequence_parallel=true")),
    "stages": (
        8,
        ("mesh.data=4", "mesh.stage=2", "mesh.zero=1", "train.accumulation=2"),
    ),
}
LARGER = (*DILOCO, "model.num_layers=2", "train.batch_size=16", "model.residual_dropout=0.1")


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("one"), "one", *LARGER)
    state, told = train(made, 6)
    return params_of(state), told


@pytest.mark.parametrize(
    "place", [place if place == "data 4" else pytest.param(place, marks=pytest.mark.full) for place in PLACES]
)
def test_instances_have_the_same_numbers_wherever_they_lie(tmp_path, one_device, place):
    devices, mesh = PLACES[place]
    state, told = train(trainer(tmp_path, "there", *LARGER, *mesh, devices=devices), 6)
    params, metrics = one_device
    for name, values in params.items():
        np.testing.assert_allclose(params_of(state)[name], values, atol=2e-5, err_msg=name)
    for mine, theirs in zip(told, metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_metrics_are_of_all_rows(tmp_path):
    """Also where instances have not as many words each: the first loss is that of one model over them."""
    changes = ("data.packed=false", "data.sources.0.max_bytes=20000", "train.batch_size=16")
    _, told = train(trainer(tmp_path, "apart", *LOCAL, *changes), 1)
    _, plain = train(trainer(tmp_path, "plain", *changes), 1)
    for name in ("loss", "accuracy", "tokens", "learning_rate"):
        assert told[0][name] == pytest.approx(plain[0][name], rel=1e-5), name


def test_a_bad_step_of_one_instance_is_left_out_of_it_alone(tmp_path):
    made = trainer(tmp_path, "bad", *DILOCO)
    with meshes.use(made.mesh):
        state = begun(made)
        leaves, tree = jax.tree.flatten(state["instances"]["params"])
        broken = np.array(leaves[0])
        broken[2] = np.nan
        leaves[0] = jax.device_put(broken, leaves[0].sharding)
        state["instances"]["params"] = jax.tree.unflatten(tree, leaves)
        before = [np.asarray(leaf) for leaf in jax.tree.leaves(state["instances"]["opt_state"])]
        state, metrics = made.steps.advance(0, state, made.batch(0))
        told = made.steps.read(metrics)
    assert told["skipped"] == 0.25
    np.testing.assert_array_equal(state["instances"]["guard"]["skipped"], [0, 0, 1, 0])
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(state["instances"]["opt_state"])]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new[2], old[2])
        assert (new[1] != old[1]).any()


def test_a_run_goes_on_within_a_period_bit_for_bit(tmp_path):
    changes = (*DILOCO, "mesh.data=2", "eval.every=4", "checkpoint.every=3")
    trainer(tmp_path, "whole", *changes, devices=2).fit(progress=False)
    first = trainer(tmp_path, "parts", *changes, "train.stop_after_minutes=1e-9", devices=2)
    while not (records(tmp_path, "parts") if first.folder.exists() else []):
        with pytest.raises(StackError, match=r"train\.stop_after_minutes"):
            first.fit(progress=False)
    trainer(tmp_path, "parts", *changes, devices=2).fit(progress=False)
    assert saved_state(tmp_path, "parts") == saved_state(tmp_path, "whole")


def test_evaluation_and_text_are_of_the_average(tmp_path):
    made = trainer(tmp_path, "run", *DILOCO, "eval.every=4", "mesh.data=4", devices=4)
    made.fit(progress=False)
    average = params_of(made._trained())
    each = named_leaves(made._trained()["instances"]["params"])
    for name, values in average.items():
        np.testing.assert_array_equal(values, states.to_host(each[name])[3], err_msg=name)
    opened = Trainer.from_run(made.folder, ["mesh.data=1"], devices=jax.devices()[:1])
    assert opened._trained().keys() == {"params", "step"}
    assert int(opened._trained()["step"]) == 8
    for name, values in params_of(opened._trained()).items():
        np.testing.assert_array_equal(values, average[name], err_msg=name)
    assert opened.generate("def ") == made.generate("def ")
    told = list(export(opened, tmp_path / "hf"))
    assert any("step 8" in line for line in told), told
    assert opened.evaluate()["loss"] == pytest.approx(made.evaluate()["loss"], rel=1e-5)


def test_a_run_keeps_its_instances(tmp_path):
    trainer(tmp_path, "run", "average.every=4", "mesh.data=4", "eval.every=4", devices=4).fit(progress=False)
    on_two = trainer(tmp_path, "run", "average.every=4", "mesh.data=2", "eval.every=4", devices=2)
    with pytest.raises(StackError, match=r"average\.instances 4 -> 2"):
        on_two.fit(progress=False)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("average.every=4",), r"mesh\.data=1 makes one instance.* set average\.instances, or mesh\.data"),
        (("average.every=4", "mesh.data=4", "average.instances=6"), r"neither divides the other; set .*=4$"),
        (("average.every=4", "mesh.data=4", "train.batch_size=6"), r"train\.batch_size=6 .* set it to 8$"),
        (("average.every=3", "mesh.data=4"), r"train\.steps=8 comes between two averages.* set it to 9$"),
        (("average.every=4", "mesh.data=4", "eval.every=3"), r"eval\.every=3 comes .* set it to 4$"),
        (("average.every=4", "mesh.data=4", "optimizer.ema_decay=0.9"), r"optimizer\.ema_decay is not built"),
        (
            ("mesh.data=4", "average.outer_momentum=0.5"),
            r"average: outer_momentum=0\.5 is not read with outer=none",
        ),
        (("average.every=0",), r"average\.every"),
    ],
)
def test_what_cannot_be_averaged_is_refused_with_what_can(tmp_path, overrides, told):
    with pytest.raises(ConfigError, match=told):
        trainer(tmp_path, "refused", *overrides, devices=4 if "mesh.data=4" in overrides else 1)


def fit_twice(folder: str, mesh: tuple[str, ...], devices: Any = None) -> dict[str, np.ndarray]:
    """To the middle of a period, and from its checkpoint to the end."""
    changes = (*LARGER, *mesh, "eval.every=0")
    stopped = config(Path(folder), "twice", *changes, "train.stop_after_minutes=1e-9")
    with pytest.raises(StackError, match=r"train\.stop_after_minutes"):
        Trainer(stopped, devices=devices).fit(progress=False)
    made = Trainer(config(Path(folder), "twice", *changes), devices=devices)
    made.fit(progress=False)
    with meshes.use(made.mesh):
        return params_of(made._trained())


def train_here(folder: str, mesh: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    made = Trainer(config(Path(folder), "there", *LARGER, *mesh))
    state, told = train(made, 6)
    return params_of(state), told


@pytest.mark.full
def test_two_processes_share_the_instances_of_a_slice(run_processes, tmp_path, one_device):
    params, metrics = one_device
    for found, told in run_processes(train_here, str(tmp_path), ("mesh.fsdp=4",), processes=2, devices=2):
        for name, values in params.items():
            np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)
        for mine, theirs in zip(told, metrics, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.full
def test_two_processes_save_within_a_period_and_go_on(run_processes, tmp_path):
    (tmp_path / "one").mkdir()
    alone = fit_twice(str(tmp_path / "one"), ("mesh.fsdp=1",), devices=jax.devices()[:1])
    mesh = ("mesh.data=2", "mesh.fsdp=2")
    for found in run_processes(fit_twice, str(tmp_path), mesh, processes=2, devices=2):
        for name, values in alone.items():
            np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)
