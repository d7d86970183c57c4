"""`stack data report` tells what is read: counts, packing, the mixture drawn, rows with what is hidden."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from task_cases import tree, write

from stack.cli import main
from stack.config import Config
from stack.data import open_data
from stack.objectives import build
from stack.report.data import as_html, as_text, examine

TEXTS = {
    "songs": ["La la la. Tra la la? Hey!\nNo <b> more & so on."] * 1
    + [f"song {n}. It is short. Yes {n}!" for n in range(30)],
    "tales": [f"Once upon a time there were {n} bears. They slept. Then {n} came home." for n in range(60)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, texts in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def config(folder, kind: str = "causal", **model) -> Config:
    shape = {"kind": "encoder", "num_types": 4} if kind in ("masked_words", "unilm") else {}
    return Config.model_validate(
        {
            "name": "looked-at",
            "model": {"vocab_size": 361, "max_length": 96, **shape, **model},
            "objective": {"kind": kind},
            "data": {
                "sources": [
                    {"kind": "jsonl", "path": f"{folder}/songs.jsonl", "weight": 1.0},
                    {"kind": "jsonl", "path": f"{folder}/tales.jsonl", "weight": 3.0},
                ],
                "cache_dir": f"{folder}/cache",
                "sequence_length": 96,
                "heldout_fraction": 0.1,
            },
            "train": {"batch_size": 4, "steps": 200},
        }
    )


def test_what_is_counted_is_what_is_there(folder):
    report = examine(config(folder))
    for source, texts in zip(report.sources, TEXTS.values(), strict=True):
        lengths = sorted(len(text.encode()) for text in texts)
        assert (source.documents, source.tokens) == (len(texts), sum(lengths))
        assert source.megabytes == pytest.approx(sum(lengths) / 1e6)
        assert (source.lengths[0], source.lengths[-1]) == (lengths[0], lengths[-1])
        assert source.lengths[1] in lengths
    assert [source.asked for source in report.sources] == [0.25, 0.75]
    assert report.places == 800
    assert sum(source.drawn for source in report.sources) == pytest.approx(1)
    assert abs(report.sources[1].drawn - 0.75) < 0.01
    assert report.epochs == pytest.approx(800 / sum(source.rows[0] for source in report.sources))


def test_a_weight_that_changes_is_asked_for_on_the_whole(folder):
    tree = config(folder).replace("data.sources.1.weight=[[0, 0.0], [800, 2.0]]")
    report = examine(tree, rows=0)
    # From 1 : 0 to 1 : 2, in a straight line of shares.
    assert [source.asked for source in report.sources] == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert abs(report.sources[1].drawn - 1 / 3) < 0.01


def test_packing_is_that_of_the_rows_that_are_drawn(folder):
    tree = config(folder, "span_corruption")
    report, objective = examine(tree), build(tree)
    data = open_data(tree, examples=objective.examples, show_progress=False).train
    assert 0.3 < report.filled["length"] <= 1
    assert 1 < report.texts_per_row < 6
    draws = np.zeros((data.num_rows, 3), np.int64)
    rows = data.examples.read(data, np.arange(data.num_rows), draws, objective.fields)
    assert abs(report.filled["length"] - float((rows["segments"] > 0).mean())) < 0.1
    assert 0 < report.labels_per_row < 48


@pytest.mark.parametrize(
    "kind", ["causal", "prefix_lm", "fill_in_middle", "span_corruption", "sentence_removal"]
)
def test_texts_of_one_row_are_shown_whole(folder, kind):
    """What a model reads and what it is to predict, in the order of the row, with special words named."""
    known = "".join(text for texts in TEXTS.values() for text in texts)
    for row in examine(config(folder, kind), rows=6).rows:
        assert row.source.endswith(("songs.jsonl", "tales.jsonl"))
        for text in row.texts:
            whole = "".join(span.text for span in text.spans)
            parts = re.split(r"<\|endoftext\|>|<fim_\w+>|<extra_id_\d+>", whole)
            assert all(part in known for part in parts), whole
            assert any(span.kind == "predicted" for span in text.spans)
            if kind in ("span_corruption", "sentence_removal", "prefix_lm"):
                assert [span.kind for span in text.spans] == ["read", "predicted"]
            if kind in ("span_corruption", "sentence_removal"):
                assert "<extra_id_0>" in text.spans[0].text
                assert text.spans[1].text.startswith("<extra_id_0>")


def test_hidden_words_are_shown_with_what_is_behind_them(folder):
    known = {text for texts in TEXTS.values() for text in texts}
    report = examine(config(folder, "unilm"), rows=30)
    notes = {text.note.split(" of ")[0] for row in report.rows for text in row.texts}
    assert notes == {"read in both directions", "read from left to right", "a source"}
    for row in report.rows:
        for text in row.texts:
            assert {span.kind for span in text.spans} <= {"read", "hidden"}
            whole = "".join(span.label or span.text for span in text.spans)
            assert whole.replace("<|endoftext|>", "") in known
    seen = [
        span.text for row in report.rows for text in row.texts for span in text.spans if span.kind == "hidden"
    ]
    assert seen.count("[MASK]") > 0.6 * len(seen)


class Page(HTMLParser):
    """The text of a page by the class of what holds it."""

    def __init__(self):
        super().__init__()
        self.spans, self.kind = [], ""

    def handle_starttag(self, tag, attrs):
        self.kind = dict(attrs).get("class", "") if tag == "span" else tag if tag == "b" else self.kind

    def handle_data(self, data):
        self.spans.append((self.kind, data))


def test_the_page_holds_the_same_and_text_cannot_become_markup(folder):
    report = examine(config(folder, "masked_words"), rows=10)
    page = Page()
    page.feed(as_html(report))
    for row in report.rows:
        for text in row.texts:
            for span in text.spans:
                assert (span.kind, span.text) in page.spans
    assert "<b> more" not in as_html(examine(config(folder), rows=100))


def test_text_cannot_move_the_cursor(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "a.txt").write_text("one\x1b[2Jtwo\nthree" * 9)
    tree = config(folder).replace(
        f"data.sources=[{{kind: text, path: {folder}/bad}}]", "data.heldout_fraction=0", "train.batch_size=1"
    )
    lines = list(as_text(examine(tree)))
    assert "\x1b" not in "".join(lines)
    assert any("⏎three" in line for line in lines)


def test_the_command_prints_it_or_writes_the_page(folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(config(folder, "masked_words").model_dump_json())
    assert main(["data", "report", str(file), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "asked 75.00%" in shown
    assert "⟦[MASK] → " in shown
    assert main(["data", "report", str(file), "--html", str(tmp_path / "pages" / "report.html")]) == 0
    assert "<!doctype html>" in (tmp_path / "pages" / "report.html").read_text()
    assert main(["data", "report", str(file), "--rows", "-1"]) == 2
    assert "--rows -1 is below 0" in capsys.readouterr().err
    assert main(["data", "report", str(file), "objective.mask_token=[HIDE]"]) == 2
    assert "the tokenizer has no word '[HIDE]'" in capsys.readouterr().err


SHOWN = {
    "classification": [("red cat", "a"), ("dog runs", "b")],
    "multi_label": [("red cat", "a, b"), ("dog runs", "no label")],
    "tagging": [("red ⟦cat → X⟧", ""), ("⟦dog → Y⟧ runs", "")],
    "span_answers": [("who?⏎red ⟦cat → answer⟧", ""), ("who?⏎dog runs", "no answer")],
    "key_sentences": [("red cat.⟦ It runs. → in the summary⟧", ""), ("⟦dog. → in the summary⟧ far.", "")],
    "retrieval": [
        ("red", "query of record 1"),
        ("red cat", "passage of record 1"),
        ("dog", "negative of record 1"),
    ],
    "reranking": [
        ("red⏎cat", "passage of record 1: does not answer"),
        ("red⏎dog", "passage of record 1: answers"),
    ],
}
RECORDS = {
    "classification": [{"text": "red cat", "label": "a"}, {"text": "dog runs", "label": "b"}],
    "multi_label": [{"text": "red cat", "label": ["b", "a"]}, {"text": "dog runs", "label": []}],
    "tagging": [
        {"text": "red cat", "entities": [{"start": 4, "end": 7, "label": "X"}]},
        {"text": "dog runs", "entities": [{"start": 0, "end": 3, "label": "Y"}]},
    ],
    "span_answers": [
        {"question": "who?", "context": "red cat", "answers": [{"start": 4, "text": "cat"}]},
        {"question": "who?", "context": "dog runs", "answers": []},
    ],
    "key_sentences": [
        {"sentences": ["red cat.", "It runs."], "labels": [0, 1]},
        {"sentences": ["dog.", "far."], "labels": [1, 0]},
    ],
    "retrieval": [{"query": "red", "passage": "red cat", "negatives": ["dog"]}],
    "reranking": [{"query": "red", "passages": ["cat", "dog"], "relevant": [1]}],
}


@pytest.mark.parametrize("name", SHOWN)
def test_labels_of_tasks_are_shown_by_name(name, tmp_path):
    write(tmp_path / f"{name}.jsonl", RECORDS[name] * 2)
    objective = {"class_weights": "balanced"} if name == "classification" else {}
    made = tree(name, tmp_path, objective=objective, train={"batch_size": 1})
    report = examine(Config(**made), rows=2)
    lines = list(as_text(report))
    end = "<|endoftext|>"
    for text, note in SHOWN[name]:
        parts = [*text.split("⏎"), ""] if "⏎" in text else [text, ""]
        wanted = f"  {f'({note}) ' if note else ''}{end}{end.join(parts)}"
        assert wanted in lines, (wanted, lines)
    number = {"tagging": 7, "key_sentences": 2, "retrieval": 1, "reranking": 2}.get(name, 1)
    assert report.labels_per_row >= number
    assert report.without_labels == 0
    page = as_html(report)
    for text, note in SHOWN[name]:
        assert not note or f"<i>{note}</i>" in page
        for label in re.findall(r"→ ([^⟧]*)⟧", text):
            assert f"<b>{label}</b></span>" in page


def test_labels_of_several_tasks_are_shown_by_name(tmp_path):
    made = tree("classification", tmp_path, train={"batch_size": 1})
    names = ("classification", "span_answers")
    for name in names:
        write(tmp_path / f"{name}.jsonl", RECORDS[name] * 2)
    made["data"]["sources"] = [
        {"kind": "jsonl", "path": f"{tmp_path}/{name}.jsonl", "field": None, "task": name} for name in names
    ]
    tasks = [{"name": name, "objective": {"kind": name}} for name in names]
    report = examine(Config(**made | {"objective": {"kind": "multi_task", "tasks": tasks}}), rows=4)
    lines = "\n".join(as_text(report))
    assert "  (a) <|endoftext|>red cat<|endoftext|>" in lines
    assert "red ⟦cat → answer⟧<|endoftext|>" in lines
    assert report.labels_per_row >= 1
    assert report.without_labels == 0
