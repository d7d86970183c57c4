"""The causal objective: padding is not seen, batches are divided by their labels, metrics are means."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config
from stack.doctor.numerics import LIMIT
from stack.objectives import build
from stack.objectives.causal import Causal
from stack.objectives.protocol import Sums
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import loss_gradient

FIELDS = {
    "model": {
        "vocab_size": 61,
        "num_layers": 1,
        "embed_dim": 32,
        "num_heads": 4,
        "max_length": 16,
        "init_std": 0.4,
        "position_init_std": 0.4,
        "qkv_bias": False,  # A key's bias has no gradient but rounding.
        "dtype": "float32",
    },
    "train": {"batch_size": 2},
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 7)).astype(np.int32)
ROTARY = {"position": "rotary", "position_init_std": 0.01}


def rows(length: int, *, left: int = 6) -> dict[str, np.ndarray]:
    """Six tokens with their labels at the start of each row, the rest padding, as the data makes it."""
    room = length - left
    padded = partial(np.pad, pad_width=((0, 0), (0, room)))
    ones, places = np.ones((2, left), np.int32), np.tile(np.arange(left, dtype=np.int32), (2, 1))
    return {
        "tokens": padded(TOKENS[:, :left]),
        "labels": padded(TOKENS[:, 1 : left + 1], constant_values=-1),
        "segments": padded(ones),
        "positions": padded(places),
        "example": np.arange(2, dtype=np.int32),
    }


def run(length: int, *, packed: bool, **model) -> tuple[Sums, dict]:
    """Sums and gradient of such rows."""
    tree = FIELDS | {
        "model": FIELDS["model"] | model,
        "data": {"sequence_length": length, "packed": packed},
    }
    program = programs.build(Config.model_validate(tree), jax.devices()[:1])
    with meshes.use(program.mesh):
        params = states.init_params(program)
        gradient, sums = jax.jit(partial(loss_gradient, program))(params, jnp.int32(0), rows(length))
        return sums, gradient


@pytest.mark.parametrize(
    "model", [pytest.param({}, id="learned", marks=pytest.mark.full), pytest.param(ROTARY, id="rotary")]
)
def test_padding_changes_neither_loss_nor_gradient(model):
    """Rows of 6, 8 and 16 with the same six labels cost 26.43, 26.88 and 27.70 nats."""
    exact, expected = run(6, packed=True, **model)
    for length, packed in ((8, False), (16, False)):
        sums, gradient = run(length, packed=packed, **model)
        assert float(sums["nll"]) == pytest.approx(float(exact["nll"]), rel=1e-6), (length, packed)
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=LIMIT * float(jnp.abs(other).max()))


def test_smoothed_labels_are_trained_for_and_not_told():
    """The loss by its formula in float64, from the model's own scores; what is told is plain."""
    tree = FIELDS | {"data": {"sequence_length": 6}, "objective": {"kind": "causal", "label_smoothing": 0.3}}
    program = programs.build(Config.model_validate(tree), jax.devices()[:1])
    with meshes.use(program.mesh):
        params, batch = states.init_params(program), jax.tree.map(jnp.asarray, rows(6))
        _, sums = jax.jit(partial(loss_gradient, program))(params, jnp.int32(0), batch)
        output = program.merge(params)(batch, program.execution())
    scores = np.asarray(output.hidden, np.float64) @ np.asarray(output.table, np.float64)[:61].T
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logs, batch["labels"][..., None], -1).sum()
    assert float(sums["nll"]) == pytest.approx(nll, rel=1e-5)
    assert float(sums["loss"]) == pytest.approx((0.7 * nll - 0.3 * logs.mean(-1).sum()) / 12, rel=1e-5)


def test_the_divisor_is_the_labels_and_at_least_one():
    objective = Causal(Config())
    assert objective.divisor({"labels": jnp.asarray(rows(8)["labels"])}) == 12
    assert objective.divisor({"labels": jnp.full((2, 3), -1)}) == 1


def test_metrics_are_means_over_labels():
    objective = build(Config())
    assert isinstance(objective, Causal)
    sums = {"nll": 6.0, "correct": 1.0, "tokens": 4.0}
    metrics = objective.metrics({name: jnp.float32(value) for name, value in sums.items()})
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 1.5,
        "accuracy": 0.25,
        "tokens": 4.0,
    }
    nothing = objective.metrics({name: jnp.float32(0) for name in sums})
    assert not any(map(float, nothing.values())), "a batch without labels is no division by zero"
    assert "nats_per_byte" not in objective.evaluate(sums, num_bytes=None)
    assert objective.evaluate(sums, num_bytes=12.0) == {
        "loss": 1.5,
        "perplexity": math.exp(1.5),
        "accuracy": 0.25,
        "nats_per_byte": 0.5,
        "tokens": 4.0,
    }


def test_the_fields_are_what_the_data_has_and_the_example():
    assert [field.name for field in Causal.fields] == ["tokens", "labels", "segments", "positions", "example"]
    assert {field.name: field.padding for field in Causal.fields}["labels"] == -1
