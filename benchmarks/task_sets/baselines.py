"""What is reached without a neural network: the methods that a user would otherwise take, on the same rows.

Choices (the strength of a penalty) are made on the validation rows; figures are of the test rows.
"""

import json
import platform
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer

from stack import StackError

from . import crf, scores
from .retrieval import Bm25
from .scores import Scores
from .splits import SPLITS, read_jsonl

Rows = list[dict[str, Any]]
Sets = Mapping[str, Rows]
Method = Iterator[tuple[str, Scores]]
_SPLITS: tuple[str, ...] = SPLITS
_PENALTIES = (1.0, 10.0, 100.0)


def run(folder: Path, *, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Fits and scores the methods of every set, prints a table, and writes `baselines.json`.

    Args:
        folder: What `tasks.py data` wrote.
        only: Names of sets, or all.

    Returns:
        Figures by set and method, with seconds of a CPU; and the versions they were measured with.

    Raises:
        StackError: If the folder has no manifest, or no set of a name.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise StackError(f"{path} is missing: python benchmarks/tasks.py data --out {folder}")
    sets = json.loads(path.read_text())["sets"]
    for name in only or ():
        if name not in sets:
            raise StackError(f"there is no set {name} in {folder}, only {', '.join(sets)}")
    record = folder / "baselines.json"
    figures: dict[str, Any] = json.loads(record.read_text())["figures"] if record.exists() else {}
    libraries = ("scikit-learn", "python-crfsuite", "bm25s", "nervaluate", "rouge-score", "sacrebleu")
    for name in only or sets:
        rows = {path.stem: read_jsonl(path) for path in (folder / name).glob("*.jsonl")}
        figures[name] = {}
        start = time.process_time()
        for method, values in METHODS[sets[name]["kind"]](rows):
            seconds = time.process_time() - start
            figures[name][method] = {key: round(value, 4) for key, value in values.items()}
            figures[name][method]["seconds"] = round(seconds, 1)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
            print(f"{name:18} {method:24} {shown}  ({seconds:.1f} s)", flush=True)
            start = time.process_time()
        about = {"python": platform.python_version()} | {library: version(library) for library in libraries}
        record.write_text(json.dumps({"figures": figures, "versions": about}, indent=1) + "\n")
    return figures


def _words() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)


def _matrix(model: TfidfVectorizer, texts: Sequence[str]) -> Any:
    """A sparse matrix, [texts, terms], of rows of length one."""
    return model.transform(texts)


def _fitted(penalties: Sequence[float], fit: Callable[[float], Any], score: Callable[[Any], float]) -> Any:
    """The model that does best on the validation rows."""
    return max((fit(penalty) for penalty in penalties), key=score)


def classification(sets: Sets) -> Method:
    """The commonest class; TF-IDF of words and pairs of words with a logistic regression."""
    texts = {split: [row["text"] for row in sets[split]] for split in _SPLITS}
    labels = {split: [row["label"] for row in sets[split]] for split in _SPLITS}
    words = _words().fit(texts["train"])
    vectors = {split: words.transform(texts[split]) for split in _SPLITS}
    if isinstance(labels["train"][0], list):
        binary = MultiLabelBinarizer().fit(labels["train"])
        truth = {split: np.asarray(binary.transform(labels[split])) for split in _SPLITS}
        rates = truth["train"].mean(axis=0)
        constant = np.where(rates == rates.max(), 1.0, rates * (rates >= 0.5))
        yield "most frequent", scores.of_label_sets(truth["test"], np.tile(constant, (len(truth["test"]), 1)))
        model = _fitted(
            _PENALTIES,
            lambda c: OneVsRestClassifier(LogisticRegression(C=c, max_iter=2000)).fit(
                vectors["train"], truth["train"]
            ),
            lambda model: scores.of_label_sets(truth["valid"], model.predict_proba(vectors["valid"]))[
                "macro_f1"
            ],
        )
        yield "TF-IDF + regression", scores.of_label_sets(truth["test"], model.predict_proba(vectors["test"]))
        return
    yield from _single(vectors, labels)


def _single(vectors: Mapping[str, Any], labels: Mapping[str, list[str]]) -> Method:
    classes = sorted(set(labels["train"]))
    rates = np.asarray([labels["train"].count(name) for name in classes]) / len(labels["train"])
    yield (
        "most frequent",
        scores.of_classes(labels["test"], np.tile(rates, (len(labels["test"]), 1)), classes),
    )
    model = _fitted(
        _PENALTIES,
        lambda c: LogisticRegression(C=c, max_iter=2000).fit(vectors["train"], labels["train"]),
        lambda model: model.score(vectors["valid"], labels["valid"]),
    )
    yield (
        "TF-IDF + regression",
        scores.of_classes(labels["test"], model.predict_proba(vectors["test"]), list(model.classes_)),
    )


def pairs(sets: Sets) -> Method:
    """The commonest class; a logistic regression on how alike the two texts are.

    Alike: cosine of TF-IDF vectors of words and of runs of 3 to 5 letters, and the share of the first text's
    words that the second has.
    """
    train = [row[field] for row in sets["train"] for field in ("first", "second")]
    words = TfidfVectorizer(sublinear_tf=True).fit(train)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=3).fit(train)

    def features(rows: Rows) -> np.ndarray:
        first, second = [row["first"] for row in rows], [row["second"] for row in rows]
        cosines = [
            np.asarray(_matrix(model, first).multiply(_matrix(model, second)).sum(axis=1)).ravel()
            for model in (words, letters)
        ]
        shared = [
            len(set(re.findall(r"\w+", one.lower())) & set(re.findall(r"\w+", two.lower())))
            / max(1, len(set(re.findall(r"\w+", one.lower()))))
            for one, two in zip(first, second, strict=True)
        ]
        return np.stack([*cosines, np.asarray(shared)], axis=1)

    vectors = {split: features(sets[split]) for split in _SPLITS}
    yield from _single(vectors, {split: [row["label"] for row in sets[split]] for split in _SPLITS})


def tagging(sets: Sets) -> Method:
    """The commonest tag of each word; a conditional random field over words, shapes and neighbours."""
    truth = [row["entities"] for row in sets["test"]]
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    everywhere: Counter[str] = Counter()
    for row in sets["train"]:
        tokens = crf.tokens(row["text"])
        for token, tag in zip(tokens, crf.tags(tokens, row["entities"]), strict=True):
            counts[token.text.lower()][tag[2:]] += 1
            everywhere[tag[2:]] += 1
    common = everywhere.most_common(1)[0][0]
    predicted = []
    for row in sets["test"]:
        tokens = crf.tokens(row["text"])
        labels = [
            (counts.get(token.text.lower()) or Counter([common])).most_common(1)[0][0] for token in tokens
        ]
        predicted.append(crf.merged(tokens, labels))
    yield "commonest tag of a word", scores.of_entities(truth, predicted)
    rows = ((crf.tokens(row["text"]), row["entities"]) for row in sets["train"])
    model = crf.fit(
        ((crf.features(tokens), crf.tags(tokens, entities)) for tokens, entities in rows), rounds=200
    )
    found = []
    for row in sets["test"]:
        tokens = crf.tokens(row["text"])
        found.append(crf.entities(tokens, model.tag(crf.features(tokens))))
    yield "random field (CRF)", scores.of_entities(truth, found)


def spans(sets: Sets) -> Method:
    """No answer; a conditional random field that knows the question's kind and its abbreviation."""
    truth = [[answer["text"] for answer in row["answers"]] for row in sets["test"]]
    yield "never an answer", scores.of_answers(truth, ["" for _ in truth])

    def made(row: Mapping[str, Any]) -> tuple[list[crf.Token], list[list[str]]]:
        tokens = crf.tokens(row["context"])
        return tokens, crf.features(tokens, question=row["question"])

    def examples() -> Iterator[tuple[list[list[str]], list[str]]]:
        for row in sets["train"]:
            tokens, features = made(row)
            marked = [
                {"start": answer["start"], "end": answer["start"] + len(answer["text"]), "label": "answer"}
                for answer in row["answers"]
            ]
            yield features, crf.tags(tokens, marked)

    model = crf.fit(examples(), rounds=60)
    predicted = []
    for row in sets["test"]:
        tokens, features = made(row)
        found = crf.entities(tokens, model.tag(features))
        predicted.append(row["context"][found[0]["start"] : found[0]["end"]] if found else "")
    yield "random field (CRF)", scores.of_answers(truth, predicted)


def sentences(sets: Sets) -> Method:
    """The first three; the extract that the labels are; a logistic regression on TF-IDF and place."""
    test = sets["test"]
    yield "lead-3", scores.of_extracts(test, [[0, 1, 2] for _ in test], size=3)
    chosen = [[place for place, label in enumerate(row["labels"]) if label] for row in test]
    yield "oracle", scores.of_extracts(test, chosen, size=3)
    words = _words().fit(sentence for row in sets["train"] for sentence in row["sentences"])

    def features(rows: Rows) -> Any:
        places = [
            [1 / (1 + place), float(place == 0), len(sentence) / 250]
            for row in rows
            for place, sentence in enumerate(row["sentences"])
        ]
        texts = [sentence for row in rows for sentence in row["sentences"]]
        return sparse.hstack([words.transform(texts), sparse.csr_matrix(places)]).tocsr()

    def best(model: Any, rows: Rows) -> list[list[int]]:
        chances = model.predict_proba(features(rows))[:, 1]
        ends = np.cumsum([len(row["sentences"]) for row in rows])[:-1]
        return [np.argsort(-part)[:3].tolist() for part in np.split(chances, ends)]

    def hits(model: Any) -> float:
        rows = sets["valid"]
        return sum(row["labels"][k] for row, top in zip(rows, best(model, rows), strict=True) for k in top)

    vectors = features(sets["train"])
    labels = [label for row in sets["train"] for label in row["labels"]]
    model = _fitted(
        (0.1, 1.0, 10.0), lambda c: LogisticRegression(C=c, max_iter=2000).fit(vectors, labels), hits
    )
    yield "TF-IDF + place, best 3", scores.of_extracts(test, best(model, test), size=3)


def retrieval(sets: Sets) -> Method:
    """BM25 and cosine of TF-IDF over the whole corpus."""
    corpus, queries = sets["corpus"], sets["queries"]
    names = [passage["id"] for passage in corpus]
    texts = [passage["text"] for passage in corpus]
    asked = [query["query"] for query in queries]
    right = [names.index(query["relevant"][0]) for query in queries]
    found = Bm25(texts).search(asked, min(1000, len(texts)))
    yield "BM25", scores.of_ranks(_ranks(found, right))
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(texts)
    alike = (_matrix(words, asked) @ _matrix(words, texts).T).toarray()
    yield "TF-IDF cosine", scores.of_ranks(_ranks(np.argsort(-alike, axis=1, kind="stable").tolist(), right))


def _ranks(found: Sequence[Sequence[int]], right: Sequence[int]) -> list[int | None]:
    return [
        list(row).index(place) + 1 if place in row else None for row, place in zip(found, right, strict=True)
    ]


def reranking(sets: Sets) -> Method:
    """BM25's own order of the candidates; cosine of TF-IDF; and the mean of any order."""
    test = sets["test"]
    right = [row["relevant"][0] for row in test]
    yield "BM25", scores.of_ranks([place + 1 for place in right])
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    words.fit(text for row in sets["train"] for text in row["passages"])
    orders = []
    for row in test:
        alike = (_matrix(words, [row["query"]]) @ _matrix(words, row["passages"]).T).toarray()[0]
        orders.append(np.argsort(-alike, kind="stable").tolist())
    yield "TF-IDF cosine", scores.of_ranks(_ranks(orders, right))
    draw = np.random.default_rng(0)
    mixed = [draw.permutation(len(row["passages"])).tolist() for row in test for _ in range(20)]
    yield "any order", scores.of_ranks(_ranks(mixed, [place for place in right for _ in range(20)]))


def text_to_text(sets: Sets) -> Method:
    """The prompt itself; its first words, as many as answers have; the answer to the most similar prompt."""
    test = sets["test"]
    truth = [row["completion"] for row in test]
    prompts = [row["prompt"] for row in test]
    yield "copy", scores.of_texts(truth, prompts)
    length = round(np.mean([len(row["completion"].split()) for row in sets["train"]]))
    yield (
        f"first {length} words",
        scores.of_texts(truth, [" ".join(text.split()[:length]) for text in prompts]),
    )
    words = TfidfVectorizer(sublinear_tf=True).fit(row["prompt"] for row in sets["train"])
    alike = _matrix(words, prompts) @ _matrix(words, [row["prompt"] for row in sets["train"]]).T
    nearest = np.asarray(alike.argmax(axis=1)).ravel()
    yield "nearest of training", scores.of_texts(truth, [sets["train"][k]["completion"] for k in nearest])


METHODS: dict[str, Callable[[Sets], Method]] = {
    "classification": classification,
    "pairs": pairs,
    "tagging": tagging,
    "spans": spans,
    "sentences": sentences,
    "retrieval": retrieval,
    "reranking": reranking,
    "text_to_text": text_to_text,
}
