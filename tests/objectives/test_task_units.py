"""Records in units: spans come back as the characters that were meant, and no unit sees another."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from task_cases import LENGTH, OBJECTIVES, config, tree, write

from stack.config import Config, StackError
from stack.data import open_data
from stack.data.records import Record
from stack.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from stack.data.units import LEAST, lay_out
from stack.objectives import build
from stack.objectives.labels import label_name
from stack.objectives.span_answers import window_starts
from stack.objectives.tagging import cuts_word, tags_of_words, words
from stack.objectives.task import Asked

LETTERS = st.sampled_from(
    [
        *"abc XY.",
        "\u00e9",
        "e\u0301",
        "\u00df",
        "\U0001f469\u200d\U0001f680",
        "\U0001f3fd",
        "\u4e2d",
        "\u3000",
        "\n",
        "\u0130",
        "\u200b",
    ]
)
TEXTS = st.lists(LETTERS, min_size=1, max_size=30).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    letters = "abc XY. \u00e9 e\u0301 \u00df \U0001f469\u200d\U0001f680 \u4e2d"
    write(folder / "t.jsonl", [{"text": f"{letters} abc cab XY {n}"} for n in range(20)])
    settings = Config.model_validate({"data": {"sources": [{"kind": "jsonl", "path": f"{folder}/t.jsonl"}]}})
    bpe = train_bpe(settings.data, 300, folder / "bpe" / "tokenizer.json")
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "b",
        "c",
        "##a",
        "##b",
        "##c",
        "x",
        "y",
        "##x",
        "##y",
        ".",
        "e",
        "##e",
    ]
    wordpiece = {
        "version": "1.0",
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "added_tokens": [
            {
                "id": number,
                "content": words[number],
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for number in range(3)
        ],
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: number for number, word in enumerate(words)},
        },
    }
    (folder / "wp.json").write_text(json.dumps(wordpiece))
    return {"bytes": ByteTokenizer(), "bpe": bpe, "wordpiece": load_tokenizer(str(folder / "wp.json"))}


def task_of(name: str, length: int = 200, **objective: Any) -> Any:
    """With labels, and no files."""
    given = tree(name, "nowhere", data={"sequence_length": length}, objective=objective)
    given["model"] |= {"max_length": length}
    if name in {"tagging", "classification", "multi_label"}:
        given["objective"] = {**given["objective"], "labels": ["X", "Y", "a", "b", "c"]}
        given["objective"].pop("class_weights", None)
    return build(Config.model_validate(given))


def rows_of(task: Any, tokenizer: Any, record: dict[str, Any], *, labelled: bool = True) -> list[Any]:
    """Each row that a record makes, alone."""
    text = Record.at(json.dumps(record), "here:1")
    bos, eos = [tokenizer.bos], [tokenizer.eos]
    made = task.encoder(tokenizer, labelled=labelled).encode([text])[0].parts
    return [lay_out([np.concatenate([bos, part.tokens, eos])], [part.marks]) for part in made]


def rows_unless(task: Any, tokenizer: Any, record: dict[str, Any], *reasons: str) -> list[Any] | None:
    """The same, or none where it is refused for a reason."""
    try:
        return rows_of(task, tokenizer, record)
    except StackError as error:
        if any(reason in str(error) for reason in reasons):
            return None
        raise


def meant(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


@pytest.mark.parametrize("name", ["bytes", "bpe", "wordpiece"])
@given(text=TEXTS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_entities_come_back_as_the_characters_that_were_meant(tokenizers, name, text, data):
    tokenizer = tokenizers[name]
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    task = task_of("tagging")
    record = {"text": text, "entities": [{"start": start, "end": end, "label": "Y"}]}
    made = rows_unless(task, tokenizer, record, "is empty", "reads nothing in", "is white space")
    if made is None:
        return
    (row,) = made
    labels = task.label(row)["labels"]
    assert (labels[[0, -1]] == -1).all()
    scores = np.eye(11)[np.maximum(labels, 0)]
    (blank,) = rows_of(task, tokenizer, {"text": text}, labelled=False)
    assert (task.label(blank)["labels"] == -1).all()
    told = task.answer(Asked(record=record, rows=[blank], outputs=[{"scores": scores}]), tokenizer)[
        "entities"
    ]
    wanted = meant(text, start, end)
    (one,) = told
    assert one["text"] == text[one["start"] : one["end"]]
    assert one["label"] == "Y"
    if name == "bytes":
        assert (one["start"], one["end"]) == wanted
    else:  # What tokens it touches, whole.
        _, offsets = tokenizer.encode_with_offsets(text)
        touched = offsets[(offsets[:, 0] < end) & (offsets[:, 1] > start)]
        assert (one["start"], one["end"]) == meant(text, touched[0, 0], touched[-1, 1])


@pytest.mark.parametrize("name", ["bytes", "bpe", "wordpiece"])
@given(text=TEXTS, question=TEXTS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_answers_come_back_as_the_characters_that_were_meant(tokenizers, name, text, question, data):
    tokenizer = tokenizers[name]
    task = task_of("span_answers", length=48, stride=8, longest_answer=1000)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    record = {"question": question, "context": text, "answers": [{"start": start, "text": text[start:end]}]}
    told = ("is empty", "reads nothing", "twice objective.stride", "whole in no window", "is not in the")
    rows = rows_unless(task, tokenizer, record, *told)
    if rows is None:
        return
    blank = rows_of(task, tokenizer, record, labelled=False)
    outputs = []
    assert len(rows) == len(blank)
    for row, without in zip(rows, blank, strict=True):
        assert (row.tokens == without.tokens).all()
        labels = task.label(row)
        assert labels["start"][0] >= 0
        scores = np.zeros((len(row.tokens), 2))
        scores[labels["start"][0], 0] = scores[labels["end"][0], 1] = 5.0
        outputs.append({"scores": scores})
    told = task.answer(Asked(record=record, rows=blank, outputs=outputs), tokenizer)
    _, offsets = tokenizer.encode_with_offsets(text)
    touched = offsets[(offsets[:, 0] < end) & (offsets[:, 1] > start)]
    wanted = (start, end) if name == "bytes" else (int(touched[0, 0]), int(touched[-1, 1]))
    assert (told["start"], told["end"]) == meant(text, *wanted)
    assert told["answer"] == text[told["start"] : told["end"]]


@given(
    tokens=st.integers(1, 300),
    room=st.integers(2, 60),
    data=st.data(),
)
def test_windows_cover_all_and_hold_whole_what_is_no_longer_than_the_stride(tokens, room, data):
    assume(tokens > room)
    stride = data.draw(st.integers(1, room // 2))
    starts = window_starts(tokens, room, stride)
    assert starts[0] == 0
    assert starts[-1] + room == tokens
    assert all(0 < after - before <= room - stride for before, after in itertools.pairwise(starts))
    first = data.draw(st.integers(0, tokens - 1))
    last = min(tokens, first + data.draw(st.integers(1, stride)))
    assert any(start <= first and last <= start + room for start in starts)


def test_windows_of_a_passage_are_labelled_by_what_is_whole_in_them():
    task = task_of("span_answers", length=32, stride=6)
    context = "".join(chr(97 + number % 26) for number in range(60))
    record = {"question": "qq", "context": context, "answers": [{"start": 24, "text": context[24:29]}]}
    rows = rows_of(task, ByteTokenizer(), record)
    starts = window_starts(60, 32 - 2 - 3, 6)
    assert len(rows) == len(starts)
    for row, start in zip(rows, starts, strict=True):
        labels, before = task.label(row), 4
        whole = start <= 24 and start + 27 >= 29
        assert bytes(row.tokens[before:-1].tolist()).decode() == context[start : start + 27]
        wanted = (24 - start + before, 28 - start + before) if whole else (0, 0)
        assert (labels["start"][0], labels["end"][0]) == wanted
        # Nor is a part of it right where it is cut.
        assert (labels["answers"] > 0).sum() == 5 * whole
        assert row.types.tolist() == [0] * before + [1] * (len(row.tokens) - before)
    longer = {**record, "answers": [{"start": 2, "text": context[2:58]}]}
    with pytest.raises(StackError, match="here:1: its first answer of 56 tokens lies whole in no window"):
        rows_of(task, ByteTokenizer(), longer)


def test_what_is_longer_than_its_window_is_found_again_in_the_right_one():
    task = task_of("span_answers", length=32, stride=6)
    context = "".join(chr(97 + number % 26) for number in range(60))
    record = {"question": "qq", "context": context, "answers": []}
    rows = rows_of(task, ByteTokenizer(), record, labelled=False)
    starts = window_starts(60, 27, 6)
    for best, start in enumerate(starts):
        outputs = [{"scores": np.zeros((len(row.tokens), 2))} for row in rows]
        outputs[best]["scores"][[9, 11], [0, 1]] = 4.0
        told = task.answer(Asked(record=record, rows=rows, outputs=outputs), ByteTokenizer())
        assert told == {
            "answer": context[start + 5 : start + 8],
            "start": start + 5,
            "end": start + 8,
            "score": 8.0,
        }


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_a_row_holds_no_more_units_than_it_has_room_for(lengths, units):
    task = task_of("retrieval" if units == 3 else "classification", length=LENGTH)
    examples = task.examples(ByteTokenizer())
    # Of a record the tokens of each of its units, with one before and one behind.
    stored = np.array([min(units * (each + 2), LENGTH) for each in lengths])
    room = examples.room(stored - 1)
    assert (room >= stored).all()
    assert (room >= min(units * LEAST, LENGTH)).all()
    assert (LENGTH // room.min()) * units <= task.sizes["units"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_rows_hold_units_apart_and_within_their_sizes(name, tmp_path):
    settings = config(name, tmp_path, data={"heldout_fraction": 0.3})
    task: Any = build(settings)
    data = open_data(settings, examples=task.examples, show_progress=False)
    seen = []
    for part in (data.train, data.heldout):
        numbers = np.arange(part.num_rows)
        batch = part.examples.read(part, numbers, np.zeros((len(numbers), 3), np.int64), task.fields)
        segments, positions = batch["segments"], batch["positions"]
        assert segments.max() <= task.sizes["units"]
        # A unit is one stretch, numbered on from the one before, and begins anew.
        steps = np.diff(segments, axis=1)
        assert ((steps == 0) | (steps == 1) | (segments[:, 1:] == 0)).all()
        assert ((positions == 0) == ((np.diff(segments, axis=1, prepend=0) != 0) | (segments == 0))).all()
        seen.append({part.tokenizer.decode(row[row > 0]) for row in batch["tokens"]})
    assert all(seen)


def test_windows_of_one_record_stay_on_one_side(tmp_path):
    some = [
        {"question": f"q{number}", "context": f"<{number:03}>" * 30, "answers": []} for number in range(40)
    ]
    write(tmp_path / "span_answers.jsonl", some)
    settings = config("span_answers", tmp_path, data={"heldout_fraction": 0.3})
    task: Any = build(settings)
    data = open_data(settings, examples=task.examples, show_progress=False)
    sides = []
    for part in (data.train, data.heldout):
        numbers = np.arange(part.num_rows)
        batch = part.examples.read(part, numbers, np.zeros((len(numbers), 3), np.int64), task.fields)
        sides.append(set(batch["record"][batch["start"] >= 0].tolist()))
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40


@pytest.mark.parametrize(
    ("value", "name"), [(1, "1"), (1.0, "1"), (1.5, "1.5"), (-0.0, "0"), (True, "true"), ("1.0", "1.0")]
)
def test_a_label_has_one_name(value, name):
    assert label_name(value, "file, line 1", "label") == name


@pytest.mark.parametrize("name", ["bytes", "bpe", "wordpiece"])
@given(text=TEXTS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_entities_of_whole_words_are_made_of_whole_words(tokenizers, name, text, data):
    """Whatever the scores say."""
    tokenizer = tokenizers[name]
    task = task_of("tagging", whole_words=True)
    made = rows_unless(task, tokenizer, {"text": text, "entities": []}, "is empty", "reads nothing in")
    if made is None:
        return
    (row,) = made
    seed = data.draw(st.integers(0, 99))
    scores = np.random.default_rng(seed).normal(size=(len(row.tokens), 11)).astype(np.float32)
    asked = Asked(record={"text": text}, rows=[row], outputs=[{"scores": scores}])
    for each in task.answer(asked, tokenizer)["entities"]:
        assert not cuts_word(text, each["start"])
        assert not cuts_word(text, each["end"])


def test_a_word_has_the_likeliest_label_of_all_its_tokens():
    """Against every tagging of each word, one after another."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(7, 5)).astype(np.float32)
    number = np.array([0, 0, 1, 2, 2, 2, 3])
    chances = scores - np.log(np.exp(scores.astype(np.float64)).sum(-1, keepdims=True))
    expected = []
    for word in range(4):
        own = chances[number == word]
        length = len(own)
        ways = [[0] * length]
        for begins in (1, 3):
            ways += [[first, *[begins + 1] * (length - 1)] for first in (begins, begins + 1)]
        expected += max(ways, key=lambda way, own=own: sum(own[i, tag] for i, tag in enumerate(way)))
    assert tags_of_words(scores, number).tolist() == expected
    assert tags_of_words(scores[:0], number[:0]).tolist() == []


@pytest.mark.parametrize(
    ("text", "starts"),
    [("ab cd", [0, 2, 3]), ("a-b", [0, 1, 2]), ("don't", [0, 3, 4]), ("x_1 y", [0, 3, 4]), ("", [])],
)
def test_words_are_runs_of_letters_and_digits(text, starts):
    offsets = np.array([[place, place + 1] for place in range(len(text))]).reshape(-1, 2)
    numbers = words(text, offsets)
    assert [
        place for place in range(len(text)) if not place or numbers[place] != numbers[place - 1]
    ] == starts


def test_an_entity_of_a_part_of_a_word_is_refused():
    record = {"text": "red catfish", "entities": [{"start": 4, "end": 7, "label": "X"}]}
    rows_of(task_of("tagging"), ByteTokenizer(), record)
    with pytest.raises(
        StackError, match=r"^here:1: the entity 'cat' at character 4 is a part of a word; mend"
    ):
        rows_of(task_of("tagging", whole_words=True), ByteTokenizer(), record)
