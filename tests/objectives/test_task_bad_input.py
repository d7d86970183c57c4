"""Records of tasks that cannot be: one line that names the file, the line and what to do."""

import json
from typing import Any

import numpy as np
import pytest
from task_cases import OBJECTIVES, records, tree, write

from stack.config import Config, ConfigError, StackError
from stack.data import open_data
from stack.data.tokenizer import ByteTokenizer
from stack.objectives import build
from stack.objectives.labels import with_labels

TEXT = "red cat runs"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("classification", {"label": "a"}, "no field 'text'; fields present: label; set objective.text"),
    ("classification", {"text": TEXT}, "no field 'label'; fields present: text; set objective.label"),
    ("classification", {"text": 3, "label": "a"}, "field 'text' holds a int, not text"),
    ("classification", {"text": "", "label": "a"}, "one of its texts is empty"),
    ("classification", {"text": " \n\u3000", "label": "a"}, "one of its texts is empty"),
    ("classification", {"text": None, "label": "a"}, "one of its texts is empty"),
    ("classification", {"text": TEXT, "label": "z"}, "label 'z' is none of objective.labels (a, b, c); mend"),
    ("classification", {"text": TEXT, "label": ""}, "field 'label' is empty, not a label"),
    ("classification", {"text": TEXT, "label": None}, "field 'label' is null, not a label"),
    ("classification", {"text": TEXT, "label": {}}, "field 'label' is a dict, not a label"),
    ("classification", {"text": TEXT, "label": float("nan")}, "field 'label' is nan, not a label"),
    ("classification", {"text": TEXT, "label": ["a"]}, "is a list, and a record has one label; set"),
    (
        "classification",
        {"text": "x" * 63, "label": "a"},
        "65 tokens, those around its texts too, and a row has",
    ),
    ("classification", {"text": "\ud83d", "label": "a"}, "half of a surrogate pair at character 0"),
    ("pairs", {"text": TEXT, "label": True}, "no field 'other'"),
    ("pairs", {"text": TEXT, "other": " ", "label": True}, "one of its texts is empty"),
    ("multi_label", {"text": TEXT, "label": "a"}, "field 'label' is no list of labels"),
    ("multi_label", {"text": TEXT, "label": ["a", None]}, "field 'label' is null, not a label"),
    ("multi_label", {"text": TEXT, "label": ["a", "z"]}, "label 'z' is none of objective.labels"),
    ("tagging", {"text": TEXT}, "no field 'entities'"),
    (
        "tagging",
        {"text": TEXT, "entities": {}},
        "is no list of objects with start, end (characters) and label",
    ),
    (
        "tagging",
        {"text": TEXT, "entities": [{"start": "0", "end": 2, "label": "X"}]},
        "is no list of objects",
    ),
    (
        "tagging",
        {"text": TEXT, "entities": [{"start": True, "end": 2, "label": "X"}]},
        "is no list of objects",
    ),
    ("tagging", {"text": TEXT, "entities": [{"start": 0, "end": 2}]}, "is no list of objects"),
    (
        "tagging",
        {"text": TEXT, "entities": [{"start": 4, "end": 13, "label": "X"}]},
        "an entity from character 4 to 13 is not within the text of 12",
    ),
    (
        "tagging",
        {"text": TEXT, "entities": [{"start": -1, "end": 3, "label": "X"}]},
        "from character -1 to 3",
    ),
    ("tagging", {"text": TEXT, "entities": [{"start": 3, "end": 3, "label": "X"}]}, "from character 3 to 3"),
    ("tagging", {"text": TEXT, "entities": [{"start": 3, "end": 4, "label": "X"}]}, "is white space alone"),
    (
        "tagging",
        {
            "text": TEXT,
            "entities": [{"start": 4, "end": 7, "label": "X"}, {"start": 0, "end": 5, "label": "Y"}],
        },
        "the entity at character 4 begins before the one before it ends",
    ),
    ("tagging", {"text": TEXT, "entities": [{"start": 0, "end": 3, "label": "Z"}]}, "label 'Z' is none of"),
    ("span_answers", {"question": "q", "answers": []}, "no field 'context'"),
    ("span_answers", {"question": "q", "context": TEXT}, "no field 'answers'"),
    (
        "span_answers",
        {"question": "q", "context": TEXT, "answers": "red"},
        "is no list of objects with start",
    ),
    (
        "span_answers",
        {"question": "q", "context": TEXT, "answers": [{"text": "red"}]},
        "is no list of objects",
    ),
    (
        "span_answers",
        {"question": "q", "context": TEXT, "answers": [{"start": 1, "text": "red"}]},
        "answer 'red' is not in the passage at character 1, where 'ed ' stands",
    ),
    (
        "span_answers",
        {"question": "q", "context": TEXT, "answers": [{"start": 9, "text": "runs far"}]},
        "answer 'runs far' is not in the passage at character 9",
    ),
    ("span_answers", {"question": "q", "context": TEXT, "answers": [{"start": 0, "text": ""}]}, "answer ''"),
    (
        "span_answers",
        {
            "question": "q",
            "context": "red " * 40,
            "answers": [{"start": 4 * number, "text": "red"} for number in range(29)],
        },
        "field 'answers' has 29 answers, and 28 are read at most; leave some out",
    ),
    (
        "span_answers",
        {"question": "q" * 60, "context": TEXT, "answers": []},
        "the question of 60 tokens leaves 1",
    ),
    ("key_sentences", {"labels": [1]}, "no field 'sentences'"),
    ("key_sentences", {"sentences": ["a.", "b."], "labels": [1]}, "1 labels for 2 sentences; give as many"),
    ("key_sentences", {"sentences": ["a."], "labels": [2]}, "is no list of 0 and 1"),
    ("key_sentences", {"sentences": [], "labels": []}, "is no list of sentences"),
    ("key_sentences", {"sentences": ["a.", ""], "labels": [1, 0]}, "one of its texts is empty"),
    ("key_sentences", {"sentences": ["a.", "\udc00"], "labels": [1, 0]}, "half of a surrogate pair"),
    ("key_sentences", {"sentences": ["a" * 80], "labels": [1]}, "its first sentence: 82 tokens"),
    ("retrieval", {"query": "q", "negatives": []}, "no field 'passage'"),
    ("retrieval", {"query": "q", "passage": "p", "negatives": "n"}, "field 'negatives' is no list of texts"),
    ("retrieval", {"query": "q", "passage": "", "negatives": []}, "one of its texts is empty"),
    ("retrieval", {"query": "q", "passage": "p", "negatives": ["\udc00"]}, "half of a surrogate pair"),
    ("reranking", {"query": "q", "passages": "p", "relevant": [0]}, "field 'passages' is no list of texts"),
    (
        "reranking",
        {"query": "q", "passages": ["p", "r"], "relevant": [2]},
        "numbers of passages, from 0 to 1",
    ),
    (
        "reranking",
        {"query": "q", "passages": ["p", "r"], "relevant": [-1]},
        "numbers of passages, from 0 to 1",
    ),
    ("reranking", {"query": "q", "passages": ["p", "r"], "relevant": []}, "numbers of passages, from 0 to 1"),
    (
        "reranking",
        {"query": "q", "passages": ["p", "r"], "relevant": [[0]]},
        "numbers of passages, from 0 to 1",
    ),
    (
        "reranking",
        {"query": "q", "passages": ["p", "r"], "relevant": [True]},
        "numbers of passages, from 0 to 1",
    ),
    ("reranking", {"query": "q", "passages": ["p", "r"], "relevant": 0}, "numbers of passages, from 0 to 1"),
]


@pytest.mark.parametrize(("name", "record", "error"), BAD)
def test_a_record_is_refused_by_file_and_line(name, record, error, tmp_path):
    labels = {"tagging": ["X", "Y"], "classification": ["a", "b", "c"], "multi_label": ["a", "b", "c"]}
    objective: dict[str, Any] = {"labels": labels[name]} if name in labels else {}
    objective |= {"labels": ["true", "false"]} if name == "pairs" else {}
    objective |= {"class_weights": "none"} if name == "classification" else {}
    path = tmp_path / f"{name}.jsonl"
    lines = [json.dumps(row) for row in [*records(name, 2), record, *records(name, 1)]]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    settings = Config.model_validate(tree(name, tmp_path, objective=objective))
    task: Any = build(settings)
    with pytest.raises(StackError) as refused:
        open_data(settings, examples=task.examples, show_progress=False)
    told = str(refused.value)
    assert told.startswith(f"{path}:4: "), told
    assert error in told
    assert "\n" not in told


def test_a_token_of_two_entities_is_refused():
    settings = Config.model_validate(tree("tagging", "nowhere", objective={"labels": ["X", "Y"]}))
    task: Any = build(settings)

    class Words(ByteTokenizer):
        def encode_with_offsets(self, text):
            ids, offsets = super().encode_with_offsets(text)
            return ids[::2], offsets.reshape(-1, 4)[:, [0, 3]]

    record = {
        "text": "abcd",
        "entities": [{"start": 0, "end": 1, "label": "X"}, {"start": 1, "end": 2, "label": "Y"}],
    }
    from stack.data.records import Record

    with pytest.raises(StackError, match="here:1: 'b' at character 1 begins in the token in which another"):
        task.encoder(Words(), labelled=True)([Record.at(json.dumps(record), "here:1")])


def found(name: str, folder: Any, rows: list[dict[str, Any]], **objective: Any) -> Config:
    write(folder / f"{name}.jsonl", rows)
    return with_labels(Config(**tree(name, folder, objective=objective)))


def test_labels_are_those_of_the_records(tmp_path):
    made = found("classification", tmp_path, records("classification")).objective
    counts = [sum(row["label"] == name for row in records("classification")) for name in "abc"]
    assert made.labels == ("a", "b", "c")
    assert made.class_weights == pytest.approx([40 / 3 / count for count in counts])
    assert sum(w * n for w, n in zip(made.class_weights, counts, strict=True)) == pytest.approx(40)
    assert found("pairs", tmp_path, records("pairs")).objective.labels == ("false", "true")
    assert found("tagging", tmp_path, records("tagging")).objective.labels == ("X", "Y")
    numbers = [{"text": "x", "label": number % 2} for number in range(4)]
    assert found("classification", tmp_path, numbers).objective.labels == ("0", "1")


def test_a_label_of_one_record_is_refused(tmp_path):
    rows = records("classification")
    rows[7] = {"text": "x", "label": "lonely"}
    with pytest.raises(
        StackError, match=r"classification.jsonl:8: label 'lonely' is that of this record alone"
    ):
        found("classification", tmp_path, rows)
    # Twice in one record is still of one.
    rows = records("multi_label", 12)
    rows[3]["label"] = ["a", "lonely", "lonely"]
    with pytest.raises(StackError, match=r"multi_label.jsonl:4: label 'lonely' is that of this record alone"):
        found("multi_label", tmp_path, rows)


def test_labels_that_leave_nothing_to_learn_are_refused(tmp_path):
    one = [{"text": "x", "label": "a"}] * 3
    with pytest.raises(StackError, match="all records have the label 'a', so there is nothing to choose"):
        found("classification", tmp_path, one)
    with pytest.raises(StackError, match="no record has a label"):
        found("multi_label", tmp_path, [{"text": "x", "label": []}] * 3)
    with pytest.raises(ConfigError, match="no record has the label 'c'; give numbers"):
        found("classification", tmp_path, [*one, {"text": "x", "label": "b"}], labels=["a", "b", "c"])
    with pytest.raises(ConfigError, match="class_weights has 2 numbers for 3 labels"):
        found("classification", tmp_path, one, labels=["a", "b", "c"], class_weights=[1, 2])
    many = [{"text": "x", "label": [f"l{number // 2}"]} for number in range(114)]
    with pytest.raises(StackError, match="labels has 57 names, and multi_label takes 56 at most"):
        found("multi_label", tmp_path, many)
    with pytest.raises(ConfigError, match="labels names 'a' twice"):
        found("classification", tmp_path, one, labels=["a", "a"])
    with pytest.raises(ConfigError, match="labels has 'a' alone"):
        found("classification", tmp_path, one, labels=["a"])


def test_fifty_six_labels_have_room(tmp_path):
    names = [f"l{number:02}" for number in range(56)]
    rows = [{"text": "x", "label": names[:half]} for half in (0, 1, 28, 29, 56, 56)]
    rows += [{"text": "yy", "label": names[27:30]}]
    settings = found("multi_label", tmp_path, rows, labels=names)
    settings = settings.replace("data.packed=false", "train.batch_size=1")
    task: Any = build(settings)
    data = open_data(settings, examples=task.examples, show_progress=False).train
    numbers = np.arange(data.num_rows)
    batch = data.examples.read(data, numbers, np.zeros((len(numbers), 3), np.int64), task.fields)
    told = [[names[i] for i, yes in enumerate(row[0]) if yes == 1] for row in batch["labels"]]
    assert sorted(told) == sorted(row["label"] for row in rows)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_records_that_are_too_long(name, tmp_path):
    rows = records(name, 6)
    long = "far " * 30
    match name:
        case "tagging":
            rows[2] = {"text": f"{long}cat", "entities": [{"start": 0, "end": 3, "label": "X"}]}
        case "span_answers":
            rows[2] = {"question": "q", "context": f"{long}cat", "answers": [{"start": 4, "text": "far"}]}
        case "key_sentences":
            rows[2] = {"sentences": ["cat.", long], "labels": [1, 1]}
        case "retrieval":
            rows[2] = {"query": "q", "passage": long, "negatives": ["x"]}
        case "reranking":
            rows[2] = {"query": "q", "passages": ["cat", long], "relevant": [0]}
        case _:
            rows[2] = {**rows[2], "text": long}
    write(tmp_path / f"{name}.jsonl", rows)
    labels = {"tagging": ["X", "Y"], "pairs": ["true", "false"]}.get(name, ["a", "b", "c"])
    for how in ("refuse", "leave_out", "windows" if name == "span_answers" else "cut"):
        objective: dict[str, Any] = {"too_long": how}
        if name in {"tagging", "pairs", "classification", "multi_label"}:
            objective |= {"labels": labels} | ({"class_weights": "none"} if name == "classification" else {})
        settings = Config.model_validate(tree(name, tmp_path, objective=objective))
        settings = settings.replace("data.packed=false", "train.batch_size=1")
        task: Any = build(settings)
        if how == "refuse":
            with pytest.raises(StackError, match=rf"{name}.jsonl:3: 1\d\d tokens, those around"):
                open_data(settings, examples=task.examples, show_progress=False)
            continue
        data = open_data(settings, examples=task.examples, show_progress=False)
        assert any("1 of 6" in note or "1 record" in note for note in data.notes) == (how == "leave_out"), (
            data.notes
        )
        number = {"leave_out": 5, "cut": 6, "windows": 8}[how]
        assert data.train.num_rows == number


def test_every_option_that_is_read_changes_the_key():
    changed = {
        "classification": {
            "text": "other",
            "second": "other",
            "label": "other",
            "labels": ["b", "a"],
            "multi_label": True,
            "too_long": "cut",
        },
        "tagging": {"text": "o", "entities": "o", "labels": ["b", "a"], "too_long": "cut"},
        "span_answers": {"question": "o", "context": "o", "answers": "o", "stride": 9, "too_long": "refuse"},
        "key_sentences": {"sentences": "o", "labels": "o", "too_long": "leave_out"},
        "retrieval": {"query": "o", "passage": "o", "negatives": "o", "most_negatives": 2, "too_long": "cut"},
        "reranking": {"query": "o", "passages": "o", "relevant": "o", "most_passages": 4, "too_long": "cut"},
    }
    for name, changes in changed.items():
        plain: dict[str, Any] = {"labels": ["a", "b"]} if name in {"classification", "tagging"} else {}
        plain |= {"class_weights": "none"} if name == "classification" else {}

        def keys(name: str = name, length: int = 64, **more: Any) -> tuple[str, str]:
            given = tree(name, "nowhere", objective=more, data={"sequence_length": length})
            task: Any = build(Config.model_validate(given))
            made = task.examples(ByteTokenizer())
            return made.encoder.key, task.encoder(ByteTokenizer(), labelled=False).key

        before = keys(**plain)
        assert before[0] != before[1]
        assert keys(**plain, length=63)[0] != before[0], name
        for option, value in changes.items():
            assert keys(**plain | {option: value})[0] != before[0], (name, option)
