"""Predictions: in order, as an evaluation scores them, on any mesh; kept where a call ends."""

import json
from functools import partial
from typing import Any, cast

import jax
import numpy as np
import pytest
from task_cases import config, leaves, records, tree, write

from stack import Trainer
from stack.cli import main
from stack.config import Config, StackError
from stack.data.tokenizer import ByteTokenizer
from stack.evaluation import files
from stack.evaluation.files import evaluate_file, predict_file, read_given
from stack.evaluation.predict import predict
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states

EVERYDAY = ("classification", "span_answers")
NAMES = [
    "classification",
    "multi_label",
    "tagging",
    "span_answers",
    "key_sentences",
    "retrieval",
]
"""Reranking is scored passage by passage: see below."""
TRUNK = {"retrieval": "decoder", "key_sentences": "encoder_decoder"}
WORDS = ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def opened(folder):
    """Program and initial parameters of a kind of task."""
    made = {}

    def get(name: str):
        if name not in made:
            settings = config(
                name, folder, TRUNK.get(name, "encoder"), data={"packed": False}, train={"batch_size": 4}
            )
            made[name] = build(settings)
        return made[name]

    return get


def build(settings: Config, num_devices: int = 1, values: Any = None):
    program = programs.build(settings, jax.devices()[:num_devices])
    if values is None:
        with meshes.use(program.mesh):
            return program, states.init_params(program)
    names = leaves(program.parameters)
    arrays = [jax.device_put(values[name], like.sharding) for name, like in names.items()]
    return program, jax.tree.unflatten(jax.tree.structure(program.parameters), arrays)


def asked(name: str, folder) -> Any:
    return list(read_given(str(folder / f"{name}.jsonl")))


@pytest.mark.parametrize(
    "name", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_records_are_scored_in_order_as_an_evaluation_scores_them(name, opened, folder, monkeypatch):
    program, params = opened(name)
    task: Any = program.objective
    path = folder / f"{name}.jsonl"
    if name == "span_answers":  # Some in windows.
        rows = records(name)
        for number in (3, 17):
            rows[number]["context"] = " ".join(["far near"] * 12) + " cat " + "sits " * 7
            rows[number]["answers"] = [{"start": 108, "text": "cat"}]
        write(path, rows)
    told: dict[str, Any] = {}
    monkeypatch.setattr(task, "measure", lambda outputs, _: told.update(outputs) or {})
    evaluate_file(program, params, WORDS, str(path))
    monkeypatch.setattr(task, "answer", lambda one, _: {"raw": one.outputs, "rows": one.rows})
    answers = list(predict(program, params, WORDS, asked(name, folder)))
    place, windows = 0, 0
    for record, answer in zip(records(name), answers, strict=True):
        windows = max(windows, len(answer["rows"]))
        for row, outputs in zip(answer["rows"], answer["raw"], strict=True):
            text = WORDS.decode(row.tokens)
            assert next(value for value in record.values() if isinstance(value, str | list))[0][:1] in text
            for key, values in outputs.items():
                whole = told[key][place][: len(values)]
                np.testing.assert_allclose(values, whole, rtol=1e-4, atol=1e-5)
            place += 1
    assert place == len(told["segments"]) - (told["segments"].max(1) == 0).sum()
    assert windows == (1 if name != "span_answers" else 3)


def test_lists_are_ranked_whole_passage_by_passage(opened, folder):
    program, params = opened("reranking")
    rows = [{"query": "red", "passages": ["far", "blue cat", "sits near"] * 4, "relevant": [5]}]
    path = write(folder / "lists.jsonl", [*rows, *records("reranking", 6)])
    (first, *_) = answers = list(predict(program, params, WORDS, list(read_given(str(path)))))
    assert sorted(first["order"]) == list(range(12))
    assert first["scores"][:3] == pytest.approx(first["scores"][3:6], abs=1e-5)
    assert "cut" not in first
    told = evaluate_file(program, params, WORDS, str(path), answers=True)
    ranks = [
        1 + min(answer["order"].index(right) for right in json.loads(line)["relevant"])
        for answer, line in zip(answers, path.read_text().splitlines(), strict=True)
    ]
    assert told["whole_mrr"] <= np.mean([1 / rank for rank in ranks]) + 1e-9


def test_all_meshes_predict_the_same(opened, folder):
    for name in ("classification",):
        program, params = opened(name)
        expected = list(predict(program, params, WORDS, asked(name, folder)))
        settings = program.config.replace("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "mesh.zero=3")
        many, placed = build(settings, 8, leaves(params))
        told = list(predict(many, placed, WORDS, asked(name, folder)))
        for one, other in zip(expected, told, strict=True):
            assert one["label"] == other["label"]
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)
            assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_metrics_of_a_file_are_those_of_its_predictions(opened, folder):
    program, params = opened("classification")
    told = evaluate_file(program, params, WORDS, str(folder / "classification.jsonl"))
    answers = list(predict(program, params, WORDS, asked("classification", folder)))
    truth = [record["label"] for record in records("classification")]
    right = [answer["label"] == label for answer, label in zip(answers, truth, strict=True)]
    assert told["accuracy"] == pytest.approx(np.mean(right))
    # Weights and smoothing are of training alone.
    losses = [-np.log(answer["probabilities"][label]) for answer, label in zip(answers, truth, strict=True)]
    assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_records_need_no_labels_and_keep_their_fields(opened, tmp_path):
    program, params = opened("classification")
    rows = [{"id": number, "text": row["text"]} for number, row in enumerate(records("classification", 9))]
    write(tmp_path / "in.jsonl", rows)
    paths = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert predict_file(program, params, WORDS, paths, name="a") == 9
    told = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in told] == list(range(9))
    assert all(set(row) == {"id", "text", "prediction"} for row in told)
    assert told[4]["prediction"]["label"] in "abc"
    rows[4]["prediction"] = "an old one"
    write(tmp_path / "in.jsonl", rows)
    with pytest.raises(StackError, match=r"in\.jsonl:5: it has a field 'prediction' already"):
        predict_file(program, params, WORDS, (paths[0], str(tmp_path / "other.jsonl")), name="a")


def read(path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def ended(opened, tmp_path, monkeypatch):
    """A call that ended after some records, and one that did not."""
    program, params = opened("classification")
    write(
        tmp_path / "in.jsonl",
        [{"text": f"{row['text']} \u4e2d\r\u2028"} for row in records("classification", 12)],
    )
    whole = (str(tmp_path / "in.jsonl"), str(tmp_path / "whole.jsonl"))
    predict_file(program, params, WORDS, whole, name="run 1")

    class End(Exception):
        pass

    def ends(*given: Any, **options: Any) -> Any:
        for number, answer in enumerate(predict(*given, **options)):
            if number == 5:
                raise End
            yield answer

    def call(name: str = "run 1", *, end: bool = False, source: str = "in.jsonl") -> Any:
        monkeypatch.setattr(files, "predict", ends if end else predict)
        paths = (str(tmp_path / source), str(tmp_path / "out.jsonl"))
        if not end:
            return predict_file(program, params, WORDS, paths, name=name)
        with pytest.raises(End):
            predict_file(program, params, WORDS, paths, name=name)
        (part,) = tmp_path.glob("out.jsonl.*.part")
        assert len(read(part)) == 5
        return part

    return call


def test_what_is_written_is_kept_and_gone_on_from(ended, tmp_path):
    part = ended(end=True)
    before = part.read_bytes()
    part.write_bytes(before + b'{"text": "cut with')
    assert ended() == 12
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    assert not part.exists()
    with pytest.raises(StackError, match=r"out.jsonl is there already; remove it"):
        ended()


def test_what_is_written_is_not_written_anew(ended, tmp_path):
    part = ended(end=True)
    lines = [row | {"prediction": "kept"} for row in read(part)]
    write(part, lines)
    ended()
    told = [row["prediction"] for row in read(tmp_path / "out.jsonl")]
    assert told[:5] == ["kept"] * 5
    assert "kept" not in told[5:]


def test_another_step_begins_anew(ended, tmp_path):
    part = ended(end=True)
    assert ended("run 2") == 12
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert part.exists()


def test_other_records_are_refused(ended, tmp_path):
    part = ended(end=True)
    rows = read(tmp_path / "in.jsonl")
    write(tmp_path / "in.jsonl", [*rows[:2], {"text": "other"}, *rows[3:]])
    with pytest.raises(StackError, match=rf"{part.name}:3 is of another record than .*in.jsonl:3; remove"):
        ended()
    write(tmp_path / "in.jsonl", rows[:3])
    with pytest.raises(StackError, match=rf"{part.name} has 5 records and .*in.jsonl 3; remove"):
        ended()
    part.write_bytes(b"no json\n")
    with pytest.raises(StackError, match=rf"{part.name}:1 is no record; remove"):
        ended()


def test_what_is_cut_or_left_out_is_told(folder, tmp_path):
    long = {"text": "far " * 60, "label": "a"}
    write(tmp_path / "in.jsonl", [*records("classification", 3), long])
    write(folder / "classification.jsonl", records("classification"))
    for too_long, expected in (("cut", {"cut": True}), ("leave_out", {"left_out": "it is too long"})):
        settings = config("classification", folder, objective={"too_long": too_long})
        program, params = build(settings)
        told = list(predict(program, params, WORDS, read_given(str(tmp_path / "in.jsonl"))))
        assert all("cut" not in answer and "left_out" not in answer for answer in told[:3])
        assert told[3].items() >= expected.items()
    assert told[3] == expected
    refuse, params = build(config("classification", folder))
    with pytest.raises(StackError, match=r"in.jsonl:4: 242 tokens, .* a row has data.sequence_length=64"):
        list(predict(refuse, params, WORDS, read_given(str(tmp_path / "in.jsonl"))))


def test_a_run_is_asked_by_the_command_line(tmp_path, capsys):
    rows = [
        {"text": f"{row['text']} {n}", "label": row["label"]}
        for n, row in enumerate(records("classification", 60))
    ]
    write(tmp_path / "classification.jsonl", rows)
    made = tree("classification", tmp_path, data={"heldout_fraction": 0.3})
    made |= {"name": "run", "output_dir": f"{tmp_path}/runs", "train": {"batch_size": 8, "steps": 2}}
    made["sample"] = {"at_end": True}
    (tmp_path / "run.yaml").write_text(json.dumps(made))
    trainer = Trainer(Config.model_validate(made), devices=jax.devices()[:1])
    trainer.fit(progress=False)
    held = trainer.data.heldout
    texts = {WORDS.decode(part[part != 256]) for row in range(held.num_rows) for part in held.pieces(row)}
    write(tmp_path / "held.jsonl", [row for row in rows if row["text"] in texts])
    assert len(texts) > 5
    within = trainer.evaluate()
    again = evaluate_file(trainer.program, trainer.trained, trainer.words, str(tmp_path / "held.jsonl"))
    assert again == pytest.approx(within, rel=1e-5)
    run = str(tmp_path / "runs" / "run")
    (tmp_path / "classification.jsonl").rename(tmp_path / "gone.jsonl")
    capsys.readouterr()
    held_out = str(tmp_path / "held.jsonl")
    assert main(["eval", run, "--data", held_out, "mesh.fsdp=1", "mesh.data=8"]) in (0, None)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["accuracy"]) == pytest.approx(within["accuracy"], abs=1e-5)
    assert float(printed["loss"]) == pytest.approx(within["loss"], rel=1e-4)
    out = str(tmp_path / "out.jsonl")
    assert main(["predict", run, "--input", held_out, "--output", out]) in (0, None)
    assert f"{len(texts)} records in {out}" in capsys.readouterr().out
    told = read(tmp_path / "out.jsonl")
    right = [row["prediction"]["label"] == row["label"] for row in told]
    assert np.mean(right) == pytest.approx(within["accuracy"])
    write(tmp_path / "bad.jsonl", [rows[0], {"text": "x", "label": "unheard"}])
    assert main(["eval", run, "--data", str(tmp_path / "bad.jsonl")]) == 1
    assert "bad.jsonl:2: label 'unheard' is none of objective.labels (a, b, c)" in capsys.readouterr().err


def test_an_interrupt_tells_what_is_kept_and_the_same_call_goes_on(tmp_path, monkeypatch) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(5)))
    interrupts = [True]

    def answers(*run, **_):
        for place, _ in enumerate(run[3]):
            if interrupts and place == 3:
                raise KeyboardInterrupt
            yield {"label": "a"}

    monkeypatch.setattr(files, "predict", answers)
    told, nothing = tmp_path / "told.jsonl", cast("Any", None)
    call = partial(predict_file, nothing, {}, nothing, (str(asked), str(told)), name="run")
    with pytest.raises(KeyboardInterrupt, match="3 of 5 records are kept; the same command goes on there"):
        call()
    interrupts.clear()
    assert call() == 5
    assert len(told.read_text().splitlines()) == 5
