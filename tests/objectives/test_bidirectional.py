"""A decoder whose tokens see their whole text is an encoder of the same weights."""

import json

import jax
import numpy as np
import pytest
from pydantic import ValidationError
from task_cases import OBJECTIVES, compute, config, records, tree, write

from stack.config import Config
from stack.data.records import Record
from stack.data.tokenizer import ByteTokenizer
from stack.doctor.numerics import LIMIT, errors
from stack.evaluation.predict import Given, Scorer
from stack.objectives import build
from stack.objectives.labels import with_labels
from stack.objectives.task import Task
from stack.step import program as programs
from stack.step import state as states

ALIKE = {
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "mlp": "swiglu",
    "position": "rotary",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}
"""What a decoder and an encoder both have."""
ENCODER = ALIKE | {"kind": "encoder", "embedding_norm": False, "num_types": 0, "pooler": False}
DECODER = ALIKE | {"kind": "decoder"}


def both_ways(name, **more):
    return {**OBJECTIVES[name], **more, "bidirectional": True}


@pytest.mark.parametrize("name", ["tagging", "span_answers", "retrieval"])
def test_a_bidirectional_decoder_is_an_encoder_of_its_weights(name, tmp_path):
    pooling = {"pooling": "mean"} if name == "retrieval" else {}
    objective = OBJECTIVES[name] | pooling
    encoder = compute(config(name, tmp_path, model=ENCODER, objective=objective))
    settings = config(name, tmp_path, "decoder", model=DECODER, objective=both_ways(name))
    decoder = compute(settings, params=encoder.numbers.params)
    assert not {
        key: error for key, error in errors(decoder.numbers, encoder.numbers).items() if not error <= LIMIT
    }
    for key, values in encoder.outputs.items():
        assert decoder.outputs[key] == pytest.approx(values, rel=1e-5, abs=1e-6), key
    causal = config(name, tmp_path, "decoder", model=DECODER, objective=objective)
    other = compute(causal, params=encoder.numbers.params)
    assert abs(other.numbers.loss / encoder.numbers.loss - 1) > 1e-3, "causal attention is another model"


def test_predictions_see_the_whole_text_and_no_other(tmp_path):
    settings = config("tagging", tmp_path, "decoder", model=DECODER, objective=both_ways("tagging"))
    program = programs.build(settings, jax.devices()[:1])
    params = states.init_params(program)
    assert isinstance(program.objective, Task)
    scores = []
    scorer = Scorer(program, params, ByteTokenizer(), program.objective)
    for texts in (["red cat"], ["red cat", "a longer text beside it"], ["red car"]):
        given = [
            Given({"text": text}, Record.at(json.dumps({"text": text}), f"record {number}"))
            for number, text in enumerate(texts)
        ]
        scored = scorer(given)
        scores.append(scored[0].asked.outputs[0]["scores"])
    alone, beside, ended = scores
    assert beside == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert np.abs(ended[0] - alone[0]).max() > 1e-3, "the first token sees the last"


def test_one_of_several_tasks_may_be_bidirectional(tmp_path):
    sources = []
    for name in ("tagging", "classification"):
        path = write(tmp_path / f"{name}.jsonl", records(name))
        sources.append({"kind": "jsonl", "path": str(path), "field": None, "task": name})
    tasks = [
        {"name": "tagging", "objective": both_ways("tagging")},
        {"name": "classification", "objective": OBJECTIVES["classification"]},
    ]
    several = {"kind": "multi_task", "tasks": tasks}
    made = tree("tagging", tmp_path, "decoder", data={"sources": sources}) | {"objective": several}
    batch = compute(with_labels(Config.model_validate(made))).batch
    is_token = batch["segments"] > 0
    expected = is_token & (batch["task"] == 0)[:, None]
    assert 0 < expected.sum() < is_token.sum()
    np.testing.assert_array_equal(batch["prefix"], expected)


def test_the_mean_stands_for_a_text(tmp_path):
    settings = config("classification", tmp_path, "decoder", objective=both_ways("classification"))
    causal = config("classification", tmp_path, "decoder")
    for made, pooling in ((settings, "mean"), (causal, "last")):
        task = build(made)
        assert isinstance(task, Task)
        assert task.pooling == pooling


@pytest.mark.parametrize("trunk", ["encoder", "encoder_decoder"])
def test_another_trunk_is_refused(trunk, tmp_path):
    with pytest.raises(ValidationError, match=f"bidirectional=true is not read with model.kind={trunk}"):
        config("classification", tmp_path, trunk, objective=both_ways("classification"))
