"""Metrics of tasks against their definitions, and cases that are counted by hand."""

import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score
from task_cases import config

from stack.data.tokenizer import ByteTokenizer
from stack.objectives import build
from stack.objectives.metrics import answers, classes, ranking, texts
from stack.objectives.tagging import Entity, entities


def test_one_label_of_several():
    labels = np.array([0, 0, 0, 1, 1, 2])
    shares = np.array(
        [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6]]
    )
    told = classes.measure_one(shares, labels, ("a", "b", "c"))
    # Guessed a a b b a c. a: precision 2/3, recall 2/3; b: 1/2, 1/2; c: 1, 1.
    assert told["accuracy"] == pytest.approx(4 / 6)
    assert told["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # Matthews of many classes (Gorodkin, 2004): (right n - sum of true times guessed) / ...
    true, guessed = np.array([3, 2, 1]), np.array([3, 2, 1])
    mcc = (4 * 6 - true @ guessed) / math.sqrt((36 - guessed @ guessed) * (36 - true @ true))
    assert told["mcc"] == pytest.approx(mcc)
    assert told["most_frequent"] == 0.5
    truth = labels[:, None] == np.arange(3)
    pairs = [
        np.mean(
            [
                (shares[yes, label] > shares[no, label]) + (shares[yes, label] == shares[no, label]) / 2
                for yes in np.flatnonzero(truth[:, label])
                for no in np.flatnonzero(~truth[:, label])
            ]
        )
        for label in range(3)
    ]
    assert told["auroc"] == pytest.approx(np.mean(pairs))
    assert told["auroc"] == pytest.approx(roc_auc_score(truth, shares, average="macro"))


def test_what_is_of_one_class_alone_has_no_auroc():
    told = classes.measure_one(np.array([[0.7, 0.3], [0.2, 0.8]]), np.array([0, 0]), ("a", "b"))
    assert "auroc" not in told
    assert told["accuracy"] == 0.5


def test_several_labels():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
    shares = np.array([[0.9, 0.1], [0.8, 0.4], [0.6, 0.2], [0.3, 0.5]])
    told = classes.measure_several(shares, labels, ("a", "b"))
    # A half is a yes. a: guessed 1 1 1 0, b: 0 0 0 1; a: P 2/3 R 1, b: P 1 R 1/2.
    assert told["accuracy"] == 0.5
    assert told["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert told["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert told["auroc"] == 1.0


def test_calibration_is_counted_bin_by_bin():
    confidence = np.array([0.05, 0.15, 0.18, 0.95, 1.0])
    right = np.array([0, 1, 0, 1, 1])
    # Of 10 bins: |0 - 0.05|, 2 |1/2 - 0.165|, 2 |1 - 0.975|.
    expected = (0.05 + 2 * 0.335 + 2 * 0.025) / 5
    assert classes.calibration_error(confidence, right, bins=10) == pytest.approx(expected)
    perfect = np.repeat([0.25, 0.75], 400)
    outcome = np.concatenate([np.arange(400) % 4 == 0, np.arange(400) % 4 != 0])
    assert classes.calibration_error(perfect, outcome) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        # 0 outside; 1 and 2 begin and continue the first label, 3 and 4 the second.
        ([0, 1, 2, 0], [(1, 3, 0)]),
        ([1, 1, 2], [(0, 1, 0), (1, 3, 0)]),
        ([1, 4, 4], [(0, 1, 0), (1, 3, 1)]),
        ([2, 2, 0, 4], [(0, 2, 0), (3, 4, 1)]),
        ([1, 2, 3, 2], [(0, 2, 0), (2, 3, 1), (3, 4, 0)]),
        ([1, -1, 2], [(0, 1, 0), (2, 3, 0)]),
        ([], []),
    ],
)
def test_entities_are_spelled_as_conlleval_reads_them(tags, expected):
    assert entities(np.array(tags, int)) == [Entity(*each) for each in expected]


def test_entity_f1_is_that_of_whole_entities(tmp_path):
    # The example of the README of seqeval: MISC found too early, PER right; precision, recall and F1 are 1/2.
    task: Any = build(config("tagging", tmp_path, objective={"labels": ["MISC", "PER"]}))
    true = [[0, 0, 0, 1, 2, 2, 0], [3, 4, 0, -1, -1, -1, -1]]
    said = [[0, 0, 1, 2, 2, 2, 0], [3, 4, 0, 1, 1, 1, 1]]
    scores = np.eye(5)[np.array(said)]
    told = task.measure({"labels": np.array(true), "scores": scores}, ByteTokenizer())
    assert told == pytest.approx({"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "entity_f1": 0.5})


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The Cat's  hat!", "cats hat", 1, 1),
        ("an apple a day", "Apple day.", 1, 1),
        ("in the summer of 1999", "summer 1999", 0, 2 * 2 / (4 + 2)),
        ("cat cat", "cat", 0, 2 * 1 / 3),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("cat", "", 0, 0),
        ("", "cat", 0, 0),
        ("theatre", "atre", 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(said, right, exact, f1):
    told = answers.compare([(said, [right] if right else [])])
    assert told["exact_match"] == exact
    assert told["f1"] == pytest.approx(f1)


def test_the_best_of_right_answers_counts_and_sides_are_told():
    told = answers.compare([("a red cat", ["dog", "red cat"]), ("", []), ("x", [])])
    assert told["exact_match"] == pytest.approx(2 / 3)
    assert told["has_answer_f1"] == 1.0
    assert told["no_answer_exact_match"] == 0.5
    assert "no_answer_f1" not in answers.compare([("x", ["x"])])


def test_one_right_passage_by_scikit_learn():
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(600, 30)), rng.integers(0, 30, 600)
    told = ranking.measure(scores, right, (1, 5, 10, 50))
    truth = np.eye(30)[right]
    ranks = np.array([1 + (row > row[one]).sum() for row, one in zip(scores, right, strict=True)])
    assert told["ndcg_at_10"] == pytest.approx(ndcg_score(truth, scores, k=10))
    assert told["mrr"] == pytest.approx((1 / ranks).mean())
    assert {k: told[f"recall_at_{k}"] for k in (1, 5, 10)} == {
        k: pytest.approx((ranks <= k).mean()) for k in (1, 5, 10)
    }
    assert "recall_at_50" not in told


def test_a_model_that_scores_all_alike_finds_nothing():
    told = ranking.measure(np.zeros((4, 20)), np.array([0, 3, 5, 19]), (1, 5, 10))
    assert told["recall_at_10"] == 0.0
    assert told["ndcg_at_10"] == 0.0
    assert told["mrr"] == 1 / 20
    lists = ranking.measure_lists([np.zeros(4)] * 2, [np.array([1, 0, 0, 0]) > 0] * 2)
    assert lists["mrr"] < 1
    assert lists["ndcg_at_10"] < 1


def test_lists_of_passages():
    scores = [np.array([0.1, 0.9, 0.5]), np.array([3.0, 2.0, 1.0, 0.0]), np.array([1.0])]
    relevant = [np.array([1, 0, 1]) > 0, np.array([1, 0, 0, 1]) > 0, np.array([1]) > 0]
    told = ranking.measure_lists(scores, relevant)
    assert told["mrr"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    gain = [1 / math.log2(rank + 1) for rank in range(1, 5)]
    first = (gain[1] + gain[2]) / (gain[0] + gain[1])
    second = (gain[0] + gain[3]) / (gain[0] + gain[1])
    assert told["ndcg_at_10"] == pytest.approx((first + second) / 2)


def test_precision_at_k_of_sentences(tmp_path):
    task: Any = build(config("key_sentences", tmp_path, objective={"taken": 2}))
    # Two texts in a row: of the first the right ones are 0 and 3; of the second 1 alone.
    outputs = {
        "segments": np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]]),
        "labels": np.array([[-1, 1, 0, 0, 1, -1, 0, 1, -1]]),
        "scores": np.array([[9.0, 3, 2, 1, 0, 9, 1, 2, 9]]),
    }
    told = task.measure(outputs, ByteTokenizer())
    assert told == pytest.approx(
        {
            "precision_at_k": (1 / 2 + 1) / 2,
            "recall_at_k": (1 / 2 + 1) / 2,
            "lead_precision_at_k": (1 / 2 + 1) / 2,
        }
    )


def test_texts():
    told = texts.written(["the cats sat", "x"], ["the cat sat ", "y"])
    assert told["exact_match"] == 0.0
    # Stems are equal: cats is cat.
    assert (told["rouge1"], told["rouge2"], told["rougeL"]) == (0.5, 0.5, 0.5)
    same = texts.written(["a b c d e"], ["a b c d e"])
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
