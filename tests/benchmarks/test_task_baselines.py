"""The classical methods of benchmarks/tasks.py and their figures, on rows whose figures are known."""

import json

import numpy as np
import pytest
from task_sets import baselines, crf, scores
from task_sets.splits import SPLITS, write_jsonl

from stack import StackError


def test_ranks_give_recall_reciprocal_rank_and_gain():
    found = scores.of_ranks([1, 2, 20, None])
    assert found["recall@1"] == 0.25
    assert found["recall@10"] == 0.5
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 20) / 4)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3)) / 4)


def test_answers_are_compared_as_squad_does():
    found = scores.of_answers([["The  Fox.", "a dog"], [], [], ["one two"]], ["fox", "", "x", "two three"])
    assert found == {"exact": 0.5, "f1": pytest.approx((1 + 1 + 0 + 0.5) / 4)}


def test_classes_are_scored_and_confidence_is_held_against_accuracy():
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.9, 0.1]])
    found = scores.of_classes(["a", "a", "b", "b"], chances, ["a", "b"])
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["auroc"] == pytest.approx((2 + 1 / 2 * 2) / 4)
    assert found["ece"] == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.2)


def test_sets_of_labels_are_cut_at_one_half():
    truth = np.array([[1, 0], [1, 1], [0, 0]])
    found = scores.of_label_sets(truth, np.array([[0.5, 0.1], [0.9, 0.4], [0.1, 0.2]]))
    assert found["exact"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == pytest.approx(4 / 5)
    assert found["macro_f1"] == pytest.approx(0.5)


def test_an_entity_counts_only_with_its_ends_and_label():
    truth = [[{"start": 0, "end": 3, "label": "a"}, {"start": 4, "end": 6, "label": "b"}], []]
    near = [[{"start": 0, "end": 3, "label": "a"}, {"start": 4, "end": 5, "label": "b"}], []]
    assert scores.of_entities(truth, truth)["f1"] == 1
    assert scores.of_entities(truth, near)["f1"] == 0.5


def test_texts_and_extracts_are_scored_by_the_libraries():
    assert scores.of_texts(["a tool for mail"], ["a tool for mail"])["exact"] == 1
    assert scores.of_texts(["a tool for mail and more"], ["a tool for mail and more"])[
        "bleu"
    ] == pytest.approx(100)
    row = {"sentences": ["Mail is sent.", "Nothing else."], "labels": [1, 0], "summary": "mail is sent"}
    found = scores.of_extracts([row], [[0]], size=1)
    assert (found["rouge1"], found["precision@1"]) == (1, 1)


def test_entities_become_tags_and_come_back():
    text = "Ann Lee, 5 Old-Hill Rd 😀"
    marked = [
        {"start": 0, "end": 7, "label": "name"},
        {"start": 9, "end": 10, "label": "number"},
        {"start": 11, "end": 22, "label": "street"},
    ]
    words = crf.tokens(text)
    tags = crf.tags(words, marked)
    assert tags[:4] == ["B-name", "I-name", "O", "B-number"]
    assert crf.entities(words, tags) == marked
    assert crf.merged(words, [tag[2:] for tag in tags]) == marked


def test_a_field_learns_which_run_of_words_an_abbreviation_stands_for():
    long = {"SMT": "Simple Mail Transfer", "DNS": "Domain Name System", "LAN": "Local Area Network"}

    def row(short, before):
        words = crf.tokens(f"{before} {long[short]} is used here")
        start = len(before) + 1
        answer = {"start": start, "end": start + len(long[short]), "label": "answer"}
        return words, crf.features(words, question=f"What does {short} stand for?"), crf.tags(words, [answer])

    rows = [row(short, before) for short in ("SMT", "DNS") for before in ("the", "a very good", "x of the")]
    model = crf.fit(((features, tags) for _, features, tags in rows), rounds=50)
    _, features, tags = row("LAN", "one of the")
    assert model.tag(features) == tags


def test_methods_are_fitted_scored_and_written(tmp_path, capsys):
    kinds = {"good": "fine nice great", "bad": "awful poor broken"}
    rows = [
        {"text": f"it is {word} number {k}", "label": label}
        for label, words in kinds.items()
        for word in words.split()
        for k in range(8)
    ]
    for split in SPLITS:
        write_jsonl(tmp_path / "mood" / f"{split}.jsonl", rows)
    (tmp_path / "manifest.json").write_text(json.dumps({"sets": {"mood": {"kind": "classification"}}}))
    baselines.run(tmp_path)
    written = json.loads((tmp_path / "baselines.json").read_text())
    assert written["figures"]["mood"]["most frequent"]["accuracy"] == 0.5
    assert written["figures"]["mood"]["TF-IDF + regression"]["accuracy"] == 1
    assert set(written["versions"]) >= {"scikit-learn", "bm25s"}
    assert "TF-IDF + regression" in capsys.readouterr().out
    with pytest.raises(StackError, match="there is no set moon"):
        baselines.run(tmp_path, only=["moon"])


def test_a_folder_without_sets_is_refused(tmp_path):
    with pytest.raises(StackError, match=r"manifest.json is missing: python benchmarks/tasks.py data"):
        baselines.run(tmp_path)
