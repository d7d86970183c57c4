"""A step done again is the same to the last bit; where a machine or a record lies, it is told."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import config, run, trainer

from stack import StackError, Trainer
from stack.train.bits import different_leaves, digests
from stack.train.replay import replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def finished(folder) -> Trainer:
    return run(folder, "run", "checkpoint.every=3", "checkpoint.keep_last=9")


@pytest.mark.parametrize(
    ("step", "lines"),
    [
        pytest.param(2, ["replayed steps 1 to 2 from the seed; the last one twice",
                         "compared with 2 records of the history"], marks=pytest.mark.full),
        pytest.param(5, ["replayed steps 4 to 5 from the checkpoint of step 3; the last one twice",
                         "compared with 2 records of the history"], marks=pytest.mark.full),
        (6, ["replayed steps 4 to 6 from the checkpoint of step 3; the last one twice",
             "compared with 3 records of the history", "compared with the checkpoint of step 6"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("finished")
def test_a_step_done_again_is_the_same(folder, step, lines) -> None:
    assert list(replay(trainer(folder, "run"), step)) == [*lines, "every bit is the same"]


def test_a_record_that_is_not_what_the_step_gives_is_told(folder, finished) -> None:
    path = finished.folder / "metrics.jsonl"
    text = path.read_text()
    records = [json.loads(line) for line in text.splitlines()]
    records[4]["loss"] += 2**-20
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = []

    def listen() -> None:
        lines.extend(replay(trainer(folder, "run"), 5))

    with pytest.raises(StackError, match="step 5 is not what it was: on the same machine"):
        listen()
    path.write_text(text)
    assert re.match(r"step 5: loss is [\d.]+, the run had [\d.]+$", lines[-1])


def test_leaves_that_differ_are_named() -> None:
    some = {"c": jnp.arange(3), "d": jnp.bfloat16(1), "e": jnp.bool(True)}
    one = {"a": jnp.array([1.0, jnp.nan]), "b": some}
    assert different_leaves(one, jax.tree.map(jnp.copy, one)) == []
    other = one | {"b": some | {"d": jnp.bfloat16(1.0078125)}}
    assert different_leaves(one, other) == ["b.d"]
    changed = jax.tree.map(lambda a, b: a != b, digests(one), digests(other))
    assert [bool(leaf) for leaf in jax.tree.leaves(changed)] == [False, False, True, False]


@pytest.mark.parametrize(
    "mesh",
    [
        ["mesh.fsdp=4"],
        pytest.param(["mesh.data=2", "mesh.fsdp=2", "mesh.zero=2"], marks=pytest.mark.full),
    ],
)
def test_a_gradient_on_other_devices_is_the_same_to_the_last_bit(folder, mesh) -> None:
    made = Trainer(
        config(folder, f"recomputed{len(mesh)}", "stability.recompute_every=2", "train.steps=4", *mesh),
        devices=jax.devices()[:4],
    )
    made.fit(progress=False)
    moved = made._recompute
    assert all(one != other for one, other in moved._next.items())
    assert made.history.curve("loss")[0] == [1, 2, 3, 4]


@pytest.mark.full
def test_a_device_that_computes_wrongly_is_told(folder, monkeypatch) -> None:
    """As a stand-in for a broken one, one parameter changes a little on its way there."""
    made = Trainer(
        config(folder, "broken", "stability.recompute_every=2", "mesh.fsdp=2"), devices=jax.devices()[:2]
    )
    whole = made._recompute._move

    def flip(tree):
        moved = whole(tree)
        if "params" in moved:
            table = moved["params"]["embed"]["table"]
            with jax.set_mesh(table.sharding.mesh):
                moved["params"]["embed"]["table"] = table * (1 + 2**-20)
        return moved

    monkeypatch.setattr(made._recompute, "_move", flip)
    with pytest.raises(StackError, match=r"step 2: the gradient of .* differs when it is computed on other"):
        made.fit(progress=False)
