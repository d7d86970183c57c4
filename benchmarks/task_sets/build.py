"""Every set, written as JSON lines, and the text that trunks are pretrained on."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from . import debian, labelled, library, rfcs
from .checks import check
from .packages import fetch
from .pretraining import write_pretraining
from .retrieval import write_retrieval
from .splits import SPLITS, Row, Split, balanced, in_splits, write_jsonl

Kind = Literal[
    "classification", "pairs", "tagging", "spans", "sentences", "retrieval", "reranking", "text_to_text"
]


class Sources:
    """The fetched texts, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019 - lives as long as the process does
    def packages(self) -> list[debian.Package]:
        """Debian's packages."""
        return debian.read_packages(self.folder / "lists")

    @cache  # noqa: B019
    def rfcs(self) -> list[rfcs.Rfc]:
        """Standards and informational RFCs."""
        return list(rfcs.read_rfcs(self.folder / "debian/usr/share/doc/RFC"))


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """A set: its kind, what makes its rows, the fields that tell rows apart, and how many are kept."""

    kind: Kind
    what: str
    rows: Callable[[Sources], Iterable[Row]]
    same: tuple[str, ...]
    at_most: Mapping[Split, int]


def _sizes(train: int, valid: int, test: int) -> dict[Split, int]:
    return {"train": train, "valid": valid, "test": test}


SETS: dict[str, TaskSet] = {
    "sentiment": TaskSet(
        kind="classification",
        what="readers' ratings of sentences of reviews, editorials and tweets: positive, neutral, negative",
        rows=lambda sources: labelled.sentiment(
            sources.folder / "vaderSentiment/additional_resources/hutto_ICWSM_2014.tar.gz"
        ),
        same=("text",),
        at_most=_sizes(5000, 500, 1000),
    ),
    "section": TaskSet(
        kind="classification",
        what="the archive's section of a package, one of 17, from its description",
        rows=lambda sources: balanced(debian.sections(sources.packages()), field="label", at_most=400),
        same=("text",),
        at_most=_sizes(4000, 500, 1000),
    ),
    "facets": TaskSet(
        kind="classification",
        what="debtags of a program: its interface, use and what it works with, several of 20",
        rows=lambda sources: debian.facets(sources.packages()),
        same=("text",),
        at_most=_sizes(4000, 500, 1000),
    ),
    "describes": TaskSet(
        kind="pairs",
        what="does the line above a description belong to it, or to another of its section",
        rows=lambda sources: debian.pairs(sources.packages()),
        same=("first", "second"),
        at_most=_sizes(5000, 500, 1000),
    ),
    "names": TaskSet(
        kind="tagging",
        what="parts of names of people and companies, labelled by hand",
        rows=lambda sources: labelled.parserator(
            sorted((sources.folder / "probablepeople/name_data/labeled").glob("*.xml")), at_least=30
        ),
        same=("text",),
        at_most=_sizes(4000, 400, 800),
    ),
    "addresses": TaskSet(
        kind="tagging",
        what="parts of postal addresses, labelled by hand",
        rows=lambda sources: labelled.parserator(
            [
                sources.folder / "usaddress/training" / name
                for name in (
                    "labeled.xml",
                    "us50_train_tagged.xml",
                    "us50_messiest_manual_label.xml",
                    "multi_word_state_addresses.xml",
                )
            ],
            at_least=30,
        ),
        same=("text",),
        at_most=_sizes(4000, 400, 800),
    ),
    "questions": TaskSet(
        kind="spans",
        what="questions to first pages and paragraphs of RFCs; some have no answer",
        rows=lambda sources: rfcs.questions(sources.rfcs()),
        same=("question", "context"),
        at_most=_sizes(5000, 400, 1000),
    ),
    "key_sentences": TaskSet(
        kind="sentences",
        what="sentences of an RFC's body that say what its abstract says",
        rows=lambda sources: rfcs.key_sentences(sources.rfcs()),
        same=("summary",),
        at_most=_sizes(1500, 150, 300),
    ),
    "code_search": TaskSet(
        kind="retrieval",
        what="the function of Python's library that a docstring describes",
        rows=lambda sources: library.functions(sources.folder / "debian/usr/lib/python3.11"),
        same=("query",),
        at_most=_sizes(4000, 400, 800),
    ),
    "rfc_search": TaskSet(
        kind="retrieval",
        what="the section of an RFC that a title belongs to",
        rows=lambda sources: rfcs.passages(sources.rfcs(), of_each=3),
        same=("query",),
        at_most=_sizes(4000, 400, 800),
    ),
    "summaries": TaskSet(
        kind="text_to_text",
        what="the line above a package's description, from the description",
        rows=lambda sources: debian.summaries(sources.packages()),
        same=("prompt",),
        at_most=_sizes(5000, 300, 600),
    ),
    "translations": TaskSet(
        kind="text_to_text",
        what="the line above a package's description, from German into English",
        rows=lambda sources: debian.translations(sources.packages()),
        same=("prompt",),
        at_most=_sizes(6000, 300, 600),
    ),
}


def build(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fetches packages into `folder/sources` where they are not there yet, and writes every set.

    Args:
        folder: Gets a folder for each set, `pretraining.jsonl` and `manifest.json`.
        say: Hears of what has been done.

    Returns:
        The manifest: sets with their sizes, and packages with versions, digests and licences.

    Raises:
        StackError: If a package cannot be fetched, or a set is not what it should be.
    """
    packages = fetch(folder / "sources")
    sources = Sources(folder / "sources")
    sets: dict[str, Any] = {}
    held: list[dict[str, Any]] = []
    for name, task in SETS.items():
        splits = in_splits(task.rows(sources), same=task.same, at_most=task.at_most)
        if task.kind == "retrieval":
            found, ranked = write_retrieval(folder / name, splits)
            written = {name: ("retrieval", found), f"{name}_rerank": ("reranking", ranked)}
        else:
            written = {name: (task.kind, splits)}
        for key, (kind, rows) in written.items():
            counts = {split: write_jsonl(folder / key / f"{split}.jsonl", rows[split]) for split in SPLITS}
            sets[key] = {"kind": kind, "what": task.what, "rows": counts}
            say(f"{key:18} {kind:15} " + " ".join(f"{split} {count:,}" for split, count in counts.items()))
        held += splits["valid"] + splits["test"]
    counts = write_pretraining(
        folder / "pretraining.jsonl", sources.folder, sources.packages(), sources.rfcs(), held
    )
    say("pretraining        " + " ".join(f"{name} {size / 1e6:.1f} MB" for name, size in counts.items()))
    shared = check(folder, sets)
    for name, share in shared.items():
        sets[name]["shares_13_words"] = share
    say("checked: no row is on two sides, every span is its text; test rows that share 13 words in a row")
    say("with the pretraining text: " + ", ".join(f"{name} {share:.1%}" for name, share in shared.items()))
    manifest = {"sets": sets, "pretraining": counts, "packages": packages}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest
