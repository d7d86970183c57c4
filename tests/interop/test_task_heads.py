"""Heads of tasks on imported trunks compute what those of transformers compute."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import Config
from stack.interop.hugging_face import config_from_hf, params_from_hf
from stack.models import model_class
from stack.models.stack import Execution
from stack.objectives import build

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-5
# As users compile it; see test_hugging_face_numerics.
optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
CLASSIFICATION = {"kind": "classification", "labels": ["a", "b", "c"]}
DATA = {"sequence_length": 16, "sources": [{"kind": "jsonl", "path": "none.jsonl", "field": None}]}
CASES = {
    "bert": ("bert", CLASSIFICATION),
    "tags": ("bert", {"kind": "tagging", "labels": ["a", "b"]}),
    "answers": ("bert", {"kind": "span_answers"}),
    "gpt2": ("gpt2", CLASSIFICATION),
    "llama": ("llama", CLASSIFICATION),
}


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS / "tasks.npz") as file:
        return dict(file)


def assert_close(ours, theirs, name):
    worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert worst <= TOLERANCE, f"{name} is off by {worst:.1e} of its largest value"


@pytest.mark.parametrize("name", CASES)
def test_scores_loss_and_gradients_are_those_of_transformers(name, goldens):
    trunk, objective = CASES[name]
    golden = {
        key.removeprefix(f"{name}/"): value for key, value in goldens.items() if key.startswith(f"{name}/")
    }
    with np.load(GOLDENS / f"hugging_face_{trunk}.npz") as file:
        stored = dict(file)
    weights = {k.removeprefix("weight/"): v for k, v in stored.items() if k.startswith("weight/")}
    settings = json.loads(str(stored["config"]))
    model = config_from_hf(settings, weights).model_copy(update={"dtype": "float32"})
    config = Config(model=model, objective=objective, data=DATA)
    task: Any = build(config)
    graph = nnx.graphdef(nnx.eval_shape(lambda: model_class(model)(model, rngs=nnx.Rngs(0))))
    whole = nnx.merge(graph, params_from_hf(weights, model))
    task.equip(whole, nnx.Rngs(0))
    whole.task.kernel[...] = jnp.asarray(golden["weight"].T)
    if "bias" in golden and whole.task.bias is not None:
        whole.task.bias[...] = jnp.asarray(golden["bias"])
    positions = np.broadcast_to(np.arange(16), stored["tokens"].shape)
    segments = (positions < stored["lengths"][:, None]).astype(np.int32)
    labels = golden["labels"]
    batch = {"tokens": stored["tokens"], "positions": positions, "segments": segments}
    if trunk == "bert":
        batch["types"] = stored["types"]
    if name == "answers":
        known = np.where(np.arange(2) == 0, 1, 0)[:, None]
        batch["answers"] = np.where(known & segments, 0, -1)
        batch |= {"start": np.where(known, labels[:, :1], -1), "end": np.where(known, labels[:, 1:], -1)}
    elif name == "tags":
        batch["labels"] = np.where(labels < 0, -1, labels)
    else:
        batch["labels"] = labels[:, None]
    arrays = {key: jnp.asarray(value, jnp.int32) for key, value in batch.items()}
    graph, params, rest = nnx.split(whole, nnx.Param, ...)

    @optimised
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        built = nnx.merge(graph, params, rest)
        scores = task.score(built, arrays, Execution())
        return task.losses(scores, arrays, Execution())[0] / task.count(arrays), scores["scores"]

    (loss, scores), gradient = run(params)
    real = np.asarray(segments, bool)
    # A bias that a softmax takes out is none of ours.
    logits = golden["logits"] - (golden["bias"] if name == "answers" else 0.0)
    if name in {"tags", "answers"}:
        assert_close(np.asarray(scores)[real], logits[real], "scores")
    else:
        assert_close(np.asarray(scores)[:, 0], logits, "scores")
    assert_close(loss, golden["loss"], "loss")
    assert_close(gradient["task"]["kernel"].T, golden["gradient"], "the head's gradient")
    table = np.asarray(gradient["embed"]["table"])[: len(golden["table"])]
    assert_close(table, golden["table"], "the gradient of the words")
    if trunk == "bert" and name == "bert":
        assert "pooler" in gradient
