"""Prompts and completions for an encoder and a decoder: each in its row, both rows as full as they may be."""

import json
from typing import Any

import numpy as np
import pytest
from tiny_runs import run

from stack.config import Config, ConfigError, StackError
from stack.data import open_data
from stack.data.records import Record
from stack.data.tokenizer import ByteTokenizer
from stack.inference.text import encode_prompts
from stack.objectives import build

END, START = 256, 7
MODEL = {
    "kind": "encoder_decoder",
    "vocab_size": 257,
    "num_layers": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "start_token": START,
    "max_length": 64,
    "dtype": "float32",
}


def config(folder: object = "nowhere", *, length: int = 24, **changes: Any) -> Config:
    tree = {
        "model": MODEL,
        "objective": {"kind": "completion", "target_length": 12, **changes.pop("objective", {})},
        "data": {
            "sources": [{"kind": "jsonl", "path": f"{folder}/rows.jsonl", "field": None}],
            "sequence_length": length,
            "heldout_fraction": 0.0,
            "cache_dir": f"{folder}/cache",
        },
        "train": {"batch_size": 2},
        **changes,
    }
    return Config(**tree)


LINES = [{"prompt": "p" * (n % 11), "completion": "c" * (1 + n % 5)} for n in range(44)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(line | {"id": n}) + "\n" for n, line in enumerate(LINES))
    )
    settings = config(folder)
    objective = build(settings)
    data = open_data(settings, examples=objective.examples, show_progress=False)
    numbers = np.arange(-1, data.train.num_rows)
    draws = np.zeros((len(numbers), 3), np.int64)
    return dict(data.train.examples.read(data.train, numbers, draws, objective.fields))


def test_what_is_read_and_what_is_written_lie_in_their_rows(rows):
    assert rows["tokens"].shape[1] == 24
    assert rows["labels"].shape[1] == 12
    assert not rows["segments"][0].any(), "a row of padding"
    assert (rows["labels"][0] == -1).all(), "a row of padding"
    found = []
    for row in range(1, len(rows["tokens"])):
        texts = rows["segments"][row].max()
        assert texts == rows["target_segments"][row].max()
        for text in range(1, texts + 1):
            read = rows["segments"][row] == text
            written = rows["target_segments"][row] == text
            prompt, labels = rows["tokens"][row][read], rows["labels"][row][written]
            assert prompt[-1] == labels[-1] == END
            assert rows["target_tokens"][row][written].tolist() == [START, *labels[:-1]]
            np.testing.assert_array_equal(rows["positions"][row][read], np.arange(read.sum()))
            np.testing.assert_array_equal(rows["target_positions"][row][written], np.arange(written.sum()))
            assert set(prompt[:-1].tolist()) <= {ord("p")}
            assert set(labels[:-1].tolist()) == {ord("c")}
            found.append((len(prompt) - 1, len(labels) - 1))
        assert (rows["labels"][row][rows["target_segments"][row] == 0] == -1).all()
    assert sorted(found) == sorted((len(line["prompt"]), len(line["completion"])) for line in LINES)


def test_rows_are_packed_by_what_each_holds(rows):
    full = [(rows[name][1:] > 0).mean() for name in ("segments", "target_segments")]
    assert max(full) > 0.85, "one of the two is nearly full"


def encode(record: object, **changes: Any) -> Any:
    encoder: Any = build(config(**changes)).examples(ByteTokenizer()).encoder
    return encoder([Record.at(json.dumps(record), "here:1")])[0]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a" * 24, "completion": "b"}, "25 tokens in the prompt, .* data.sequence_length=24"),
        (
            {"prompt": "a", "completion": "b" * 12},
            "13 tokens in the completion, .* objective.target_length=12",
        ),
    ],
)
def test_long_ones_are_refused_left_out_or_cut(record, words):
    with pytest.raises(StackError, match=rf"here:1: {words}.*objective.too_long"):
        encode(record)
    assert not encode(record, objective={"too_long": "leave_out"})
    (cut,) = encode(record, objective={"too_long": "cut"})
    prompt, completion = record["prompt"].encode()[:23], record["completion"].encode()[:12]
    assert cut.tokens.tolist() == [*prompt, *completion]
    is_whole = len(record["completion"]) < 12
    assert cut.marks.tolist() == [*[0] * (1 + len(prompt)), *[1] * len(completion), int(is_whole)]


def test_what_fills_both_rows_fits():
    assert len(encode({"prompt": "a" * 23, "completion": "b" * 11})) == 1


def test_a_target_length_is_of_models_that_write_apart():
    with pytest.raises(ConfigError, match=r"objective.target_length=12 is not read with model.kind=decoder"):
        config(model={"vocab_size": 257})
    with pytest.raises(ConfigError, match=r"objective.target_length=65 exceeds model.max_length=64"):
        config(objective={"target_length": 65})


def test_a_prompt_is_a_whole_text():
    objective = build(config())
    assert encode_prompts(ByteTokenizer(), ["ab"], objective) == [[*b"ab", END]]


@pytest.mark.full
def test_a_model_learns_to_write_what_it_reads(tmp_path):
    """Trained, evaluated, sampled: a letter, read some times, is written in capitals."""
    texts = [(letter * number, letter.upper() * 2) for letter in "abcd" for number in range(1, 9)]
    lines = [{"prompt": text, "completion": told} for text, told in texts for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = json.dumps({"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl", "field": None})
    made = run(
        tmp_path,
        "letters",
        f"model={json.dumps(MODEL)}",
        "objective={kind: completion, target_length: 32}",
        f"data.sources=[{source}]",
        "train.steps=60",
    )
    assert made.evaluate()["accuracy"] > 0.95
    assert made.generate(["aaa", "dd"]) == ["AA", "DD"]
