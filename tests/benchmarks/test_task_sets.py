"""The sets of benchmarks/tasks.py: rows are what packages say, and nothing held out is trained on."""

import gzip
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from task_sets import debian, labelled, library, pretraining, rfcs
from task_sets.checks import check
from task_sets.retrieval import write_retrieval
from task_sets.splits import SPLITS, Row, balanced, cut, in_splits, plain, read_jsonl, split_of, write_jsonl

from stack import StackError

BUILT = os.environ.get("STACK_TASK_SETS", "")
MANY = dict.fromkeys(SPLITS, 1000)
RFC = """\
Network Working Group                                         J. Klensin
Request for Comments: 9321                                  October 2008
Obsoletes: 2821
Category: Standards Track

                     Simple Mail Transfer Protocol

Abstract

   This document is a specification of the basic protocol for Internet
   electronic mail transport.  It covers the extension mechanisms.

Table of Contents

   1. Introduction . . . . . . . . . . . . . . . . . . . . . . . . .  5
   2. The Model . . . . . . . . . . . . . . . . . . . . . . . . . . . 6

1. Introduction

   The objective of the Simple Mail Transfer Protocol (SMTP) is to
   transfer mail reliably, e.g. over Wide Area Networks.  It is independent



Klensin                     Standards Track                     [Page 1]
\f
RFC 9321                          SMTP                      October 2008


   of the transmission subsystem and requires only a reliable channel.

   Mail is relayed. The simple mail transfer protocol is described with
   its extension mechanisms for electronic mail transport in the basic form.

2. The Model of Relaying Mail

   A client opens a channel to a server in order to transfer messages, and
   SMTP tells them what to say. Responsibility for a message passes to the
   server with its reply, until it has been handed on, and a report is made
   of each message that cannot be.

      field      value     meaning
"""
INDEX = """\
                                  RFC INDEX
9321 Simple Mail Transfer Protocol. J. Klensin. October 2008. (Format:
     TXT, HTML) (Obsoletes RFC2821) (Status: DRAFT STANDARD)
9322 Several. P. Resnick, Ed., A. Bee. May 2001. (Format: TXT) (Updates RFC0001, RFC0002)
"""


def rfc(number=9321):
    row = rfcs.read_index(INDEX)[9321]
    return rfcs.Rfc(number=number, text=rfcs.without_pages(RFC), **row)


def test_a_document_is_on_one_side_whatever_the_order_of_rows():
    rows = [
        Row(document=f"d{k // 3}", row={"text": f"text {k % 50} of {k}", "label": "a"}) for k in range(600)
    ]
    splits = in_splits(rows, same=("text",), at_most=MANY)
    random.Random(0).shuffle(rows)
    assert in_splits(rows, same=("text",), at_most=MANY) == splits
    assert sum(map(len, splits.values())) == 600
    side = {row.row["text"]: split_of(row.document) for row in rows}
    assert all(side[row["text"]] == split for split in SPLITS for row in splits[split])
    assert 0.7 < len(splits["train"]) / 600 < 0.9
    assert splits["valid"]
    assert splits["test"]


def test_the_same_text_twice_is_kept_once_and_held_out_rather_than_trained_on():
    rows = [
        Row(document=f"d{k}", row={"text": " The  SAME text" if k % 2 else "the same text"})
        for k in range(80)
    ]
    splits = in_splits(rows, same=("text",), at_most=MANY)
    assert [len(splits[split]) for split in SPLITS] == [0, 0, 1]


def test_no_class_takes_more_than_its_share():
    rows = [Row(document=f"d{k}", row={"text": str(k), "label": "ab"[k % 10 == 0]}) for k in range(100)]
    kept = [row.row["label"] for row in balanced(rows, field="label", at_most=20)]
    assert (kept.count("a"), kept.count("b")) == (20, 10)


def test_a_text_is_cut_between_words():
    assert cut("one two three", 9) == "one two"
    assert cut("one two three", 7) == "one two"
    assert cut("one", 9) == "one"


def lists(folder: Path, packages: int = 40) -> Path:
    """Files as apt keeps them."""
    control, english, german = "", "", ""
    for k in range(packages):
        source = f"Source: base{k // 2} (1.{k})\n" if k % 2 else ""
        name = f"pack{k}" if k % 2 else f"base{k // 2}"
        control += (
            f"Package: {name}\n{source}Section: games\nDescription-md5: m{k}\n"
            f"Tag: role::program, interface::graphical,\n use::gameplaying\n\n"
        )
        long = f"A game about the number {k}, which is played with many others on one board for hours.\n .\n"
        english += f"Package: {name}\nDescription-md5: m{k}\nDescription-en: a game of number {k}\n {long}"
        english += "   * a list\n .\n Its end.\n\n"
        german += (
            f"Package: {name}\nDescription-md5: m{k}\nDescription-de: ein Spiel der Zahl {k}\n Lang.\n\n"
        )
    write = {"binary-amd64_Packages": control, "i18n_Translation-en": english, "i18n_Translation-de": german}
    for name, text in write.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_descriptions_are_read_with_their_source_tags_and_translation(tmp_path):
    packages = debian.read_packages(lists(tmp_path))
    assert len(packages) == 40
    first, second = packages[2:4]
    assert (first.source, second.source, second.name) == ("base1", "base1", "pack3")
    assert second.tags == {"role::program", "interface::graphical", "use::gameplaying"}
    assert (second.short, second.german) == ("a game of number 3", "ein Spiel der Zahl 3")
    assert [text[:24] for text in debian.paragraphs(second.long)] == ["A game about the number ", "Its end."]


def test_rows_of_descriptions_take_one_package_of_a_source(tmp_path):
    packages = debian.read_packages(lists(tmp_path))
    rows = list(debian.facets(packages))
    assert len(rows) == len({row.document for row in rows}) == 20
    assert all(row.row["label"] == ["interface::graphical", "use::gameplaying"] for row in rows)
    assert {row.row["label"] for row in debian.sections(packages)} == {"games"}
    (row,) = [row for row in debian.translations(packages) if row.row["completion"] == "a game of number 7"]
    assert row.row["prompt"] == "ein Spiel der Zahl 7"
    assert all("A game about" in row.row["prompt"] for row in debian.summaries(packages))


def test_a_pair_is_the_same_exactly_if_it_is_and_never_of_another_side(tmp_path):
    packages = debian.read_packages(lists(tmp_path, packages=400))
    rows = list(debian.pairs(packages))
    labels = [row.row["label"] for row in rows]
    assert 60 < labels.count("same") < 140
    for row in rows:
        first = row.row["first"].split()[-1]
        second = row.row["second"].split("number ")[1].split(",")[0]
        assert (first == second) == (row.row["label"] == "same")
        assert split_of(f"debian:base{int(second) // 2}") == split_of(row.document)


def test_a_paragraph_that_a_page_break_parts_is_one_again():
    text = rfc().text
    assert "[Page" not in text
    assert "\f" not in text
    paragraphs = rfcs.prose(text)
    assert any("It is independent of the transmission subsystem and" in paragraph for paragraph in paragraphs)
    assert not any("field value" in paragraph for paragraph in paragraphs)


def test_sections_are_not_taken_from_the_table_of_contents():
    assert [title for title, _ in rfcs.sections(rfc().text)] == ["Introduction", "The Model of Relaying Mail"]
    assert rfcs.abstract(rfc().text).startswith("This document is a specification")
    assert rfcs.abstract(rfc().text).endswith("extension mechanisms.")
    assert rfcs.sentences("See e.g. The one. It ends.") == ["See e.g. The one.", "It ends."]
    (row,) = rfcs.passages([rfc()], of_each=3)
    assert row.row["query"] == "Simple Mail Transfer Protocol: The Model of Relaying Mail"
    assert row.row["passage"].startswith("A client opens a channel")


def test_the_index_gives_title_first_author_date_and_relations():
    index = rfcs.read_index(INDEX)
    assert index[9321]["author"] == "J. Klensin"
    assert index[9321]["obsoletes"] == "RFC2821"
    assert (index[9322]["author"], index[9322]["date"]) == ("P. Resnick", "May 2001")


def test_every_answer_stands_where_it_is_said_to():
    rows = [row.row for number in range(9321, 9341) for row in rfcs.questions([rfc(number)])]
    answers = [(row, answer) for row in rows for answer in row["answers"]]
    for row, answer in answers:
        assert row["context"][answer["start"] : answer["start"] + len(answer["text"])] == answer["text"]
    found = {row["question"]: answer["text"] for row, answer in answers}
    assert found == {
        "Who is the first author?": "J. Klensin",
        "When was it published?": "October 2008",
        "Which RFC does it make obsolete?": "2821",
        "What does SMTP stand for?": "simple mail transfer protocol",
    }
    without = [row for row in rows if not row["answers"]]
    assert {row["question"] for row in without} >= {"Which RFC does it update?", "What does SMTP stand for?"}
    assert not any("mail transfer protocol" in row["context"] for row in without if "SMTP" in row["question"])


def test_an_abbreviation_has_the_initials_of_what_it_stands_for():
    text = "The Internet Engineering Task Force (IETF), the House of Lords (HL) and a Big Red Fox (XYZ)."
    assert rfcs.abbreviations(text) == {
        "IETF": "Internet Engineering Task Force",
        "HL": "House of Lords",
    }


def test_the_oracle_takes_what_makes_the_extract_most_like_the_summary():
    summary = "mail is relayed by servers and a report is made of failures"
    sentences = [
        "Nothing to see here at all.",
        "Mail is relayed by servers.",
        "A report is made of failures.",
    ]
    assert rfcs.oracle(summary, sentences, at_most=3) == [1, 2]
    assert rfcs.oracle(summary, sentences, at_most=1) == [2]
    assert rfcs.oracle("xyz", sentences, at_most=3) == []


def test_entities_are_where_their_words_are_and_neighbours_of_one_label_are_one(tmp_path):
    path = tmp_path / "labelled.xml"
    path.write_text(
        "<A><N><Street>Straße</Street> <Street>Ost,</Street> <Place>Köln 😀</Place>\n  <And>&amp;</And>\n</N>"
        "<N><Street>one</Street></N></A>",
        encoding="utf-8",
    )
    (row,) = labelled.parserator([path], at_least=1)
    assert row.row["text"] == "Straße Ost, Köln 😀 &"
    words = {
        entity["label"]: row.row["text"][entity["start"] : entity["end"]] for entity in row.row["entities"]
    }
    assert words == {"Street": "Straße Ost", "Place": "Köln 😀", "And": "&"}
    assert list(labelled.parserator([path], at_least=2)) == []


def test_ratings_become_three_classes_and_a_review_is_one_document(tmp_path):
    (tmp_path / "amazon_GroundTruth.txt").write_text(
        "1_1\t0.5\tfine &amp; good enough\n1_2\t-0.6\tbroken within a day\n2_1\t0.1\tit is a player\n"
    )
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "amazon_GroundTruth.txt", "all/amazon_GroundTruth.txt")
    rows = list(labelled.sentiment(tmp_path / "all.tar.gz"))
    assert [row.row["label"] for row in rows] == ["positive", "negative", "neutral"]
    assert [row.document for row in rows] == ["amazon:1", "amazon:1", "amazon:2"]
    assert rows[0].row["text"] == "fine & good enough"


def test_a_function_is_found_by_its_docstring_and_does_not_hold_it():
    source = (
        "class A:\n    def stop(self, now):\n        '''Stop the server at once,\n        or later.\n\n"
        "        More.\n        '''\n        self.now = now\n        return self.shut_down_everything(now)\n"
    )
    ((query, passage),) = library.documented(source)
    assert query == "Stop the server at once, or later."
    assert passage.startswith("def stop(self, now):\n")
    assert "Stop" not in passage
    assert "More" not in passage
    assert passage.endswith("return self.shut_down_everything(now)")


def test_hard_negatives_are_wrong_and_candidates_hold_the_right_passage(tmp_path):
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "omicron",
        "pi",
    ]
    draw = random.Random(0)
    rows = {
        split: [
            {
                "query": f"{first} {second}",
                "passage": f"{first} {second} " + " ".join(draw.choices(words, k=8)),
            }
            for first, second in [draw.sample(words, 2) for _ in range(size)]
        ]
        for split, size in zip(SPLITS, (30, 5, 5), strict=True)
    }
    rows["train"][0]["query"] = "nothing like it"
    found, ranked = write_retrieval(tmp_path, rows)
    assert all(row["passage"] not in row["negatives"] and row["negatives"] for row in found["train"])
    assert len(ranked["train"]) == 30
    for split in SPLITS:
        right = {(row["query"], row["passage"]) for row in rows[split]}
        assert all((row["query"], row["passages"][row["relevant"][0]]) in right for row in ranked[split])
    corpus = {row["id"]: row["text"] for row in read_jsonl(tmp_path / "corpus.jsonl")}
    queries = read_jsonl(tmp_path / "queries.jsonl")
    assert [corpus[query["relevant"][0]] for query in queries] == [row["passage"] for row in rows["test"]]
    assert len(set(corpus.values())) == len(corpus)


def test_what_is_held_out_is_not_pretrained_on():
    secret = {plain("The mail is relayed by servers until it has been handed on.")}
    text = (
        "First, a paragraph that may be read.\n\nIt says: more. The mail is relayed  by\nservers until it "
        "has been handed on. More.\n\nLast."
    )
    assert pretraining.without(text, secret) == "First, a paragraph that may be read.\n\nLast."
    assert pretraining.without(text, set()) == text


def folder_of(tmp_path: Path, kind: str, rows: dict) -> Path:
    for split in SPLITS:
        write_jsonl(tmp_path / "a" / f"{split}.jsonl", rows.get(split, []))
    write_jsonl(tmp_path / "pretraining.jsonl", [{"text": " ".join(f"w{k}" for k in range(30))}])
    (tmp_path / "manifest.json").write_text(json.dumps({"sets": {"a": {"kind": kind}}}))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        (
            "classification",
            {"train": [{"text": "One  text", "label": "a"}], "test": [{"text": "one text", "label": "b"}]},
            r"a/test.jsonl:1 is also a row of train",
        ),
        (
            "spans",
            {"test": [{"question": "q", "context": "a b", "answers": [{"start": 1, "text": "b"}]}]},
            r"a/test.jsonl:1: 'b' does not stand at 1",
        ),
        (
            "tagging",
            {"train": [{"text": "a b", "entities": [{"start": 0, "end": 2, "label": "x"}]}]},
            r"an entity of x is not at its words",
        ),
        ("sentences", {"train": [{"sentences": ["a"], "labels": [0], "summary": "b"}]}, "no sentence chosen"),
        (
            "reranking",
            {"train": [{"query": "a", "passages": ["b"], "relevant": [1]}]},
            "not among the candidates",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, kind, rows, said):
    folder = folder_of(tmp_path, kind, rows)
    with pytest.raises(StackError, match=said):
        check(folder, {"a": {"kind": kind}})


def test_the_share_of_test_rows_that_were_pretrained_on_is_counted(tmp_path):
    rows = [" ".join(f"w{k}" for k in range(start, start + 14)) for start in (0, 10, 18)]
    test = [{"text": text, "label": "a"} for text in rows]
    folder = folder_of(tmp_path, "classification", {"test": test})
    assert check(folder, {"a": {"kind": "classification"}}) == {"a": round(2 / 3, 4)}


@pytest.mark.full
@pytest.mark.skipif(not BUILT, reason="STACK_TASK_SETS names no folder that `tasks.py data` wrote")
def test_the_sets_of_the_packages_are_sound():
    folder = Path(BUILT)
    manifest = json.loads((folder / "manifest.json").read_text())
    shares = check(folder, manifest["sets"])
    assert set(shares) == set(manifest["sets"])
    assert all(rows["rows"]["test"] >= 200 for rows in manifest["sets"].values())


def test_rfcs_are_read_from_the_folder_of_debian(tmp_path):
    (tmp_path / "standard").mkdir()
    (tmp_path / "rfc-index.txt.gz").write_bytes(gzip.compress(INDEX.encode()))
    (tmp_path / "standard" / "rfc9321.txt.gz").write_bytes(gzip.compress(RFC.encode()))
    (tmp_path / "standard" / "rfc1.txt.gz").write_bytes(gzip.compress(b"not in the index"))
    (read,) = rfcs.read_rfcs(tmp_path)
    assert (read.number, read.title, read.document) == (9321, "Simple Mail Transfer Protocol", "rfc:9321")
