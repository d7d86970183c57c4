"""RFCs: questions with spans, key sentences, and passages to find.

Truth comes from elsewhere than the text that is read: from the RFC index (author, date, relations),
from where an abbreviation is spelled out (asked of another paragraph, if there is one), from the abstract
(for sentences of the body).
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .splits import Row, cut, number, plain

_PAGE = re.compile(r"\n*[^\n]*\[Page +[\divx]+\][ \t]*\n+\f?\n*(?:RFC +\d+ [^\n]*\n+)?")
_HEADING = re.compile(r"^(?:Appendix )?([A-Z]|\d+)((?:\.\d+)*)\.?[ \t]{1,3}([A-Z][^\n]{2,70})$", re.M)
_INDEX = re.compile(r"^(\d{4}) (.*?)(?=^\d{4} |\Z)", re.M | re.S)
_FORMAL = re.compile(
    r"introduction|references|acknowledge?ments?|security consid|iana consid|author|abstract|status of"
    r"|terminology|conventions|copyright|table of|overview|contributors|notation|requirements language"
    r"|appendix|index|change|background|summary|conclusion|definitions|general|motivation|examples?$|scope|purpose",
    re.I,
)
_SENTENCE = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!\bSec\.)(?<!\bcf\.)(?<!\bvs\.)(?<=[.?!])\s+(?=[A-Z\"(])")
_DEFINED = re.compile(r"((?:[A-Z][A-Za-z]+[- ](?:(?:of|and|for|the|to|in) )?){2,6})\(([A-Z]{2,7})\)")
_SMALL = {"of", "and", "for", "the", "to", "in"}


@dataclass(frozen=True, kw_only=True)
class Rfc:
    """An RFC: `text` without page breaks; what the index says of it."""

    number: int
    title: str
    author: str
    date: str
    obsoletes: str
    updates: str
    text: str

    @property
    def document(self) -> str:
        """Its name among the documents that are split."""
        return f"rfc:{self.number}"


def without_pages(text: str) -> str:
    """The text of a paged RFC in one piece; a paragraph that a page break parts is joined again."""

    def joint(match: re.Match[str]) -> str:
        ended = match.string[: match.start()].rstrip().endswith((".", ":", "!", "?", ")", ";"))
        return "\n\n" if ended else "\n"

    return re.sub(r"\n{3,}", "\n\n", _PAGE.sub(joint, text.replace("\r", ""))).replace("\f", "").strip("\n")


def read_index(text: str) -> dict[int, dict[str, str]]:
    """Title, first author, date and relations of each RFC of `rfc-index.txt`."""
    entries = {}
    for match in _INDEX.finditer(text):
        entry = " ".join(match[2].split())
        found = re.match(
            r"(.+?)\. ((?:[A-Z]\.-?)+ ?[^,.(]+)(?:,.*?|)\. ((?:[A-Z][a-z]+) \d{4})\. \(Format", entry
        )
        if found:
            row = {"title": found[1], "author": found[2].strip(), "date": found[3]}
            for name in ("Obsoletes", "Updates"):
                relation = re.search(rf"\({name} ([^)]*)\)", entry)
                row[name.lower()] = relation[1] if relation else ""
            entries[int(match[1])] = row
    return entries


def read_rfcs(folder: Path) -> Iterator[Rfc]:
    """Every RFC of Debian's doc-rfc packages that the index knows, in the order of their numbers.

    Summaries of a hundred other RFCs are left out: they repeat what may be held out.
    """
    index = read_index(gzip.decompress((folder / "rfc-index.txt.gz").read_bytes()).decode("utf-8", "replace"))
    paths = {}
    for path in folder.glob("*/rfc*.txt.gz"):
        if (match := re.fullmatch(r"rfc(\d+)\.txt\.gz", path.name)) and path.parent.name != "links":
            paths[int(match[1])] = path
    for key in sorted(paths):
        if key in index and not index[key]["title"].startswith("Request for Comments Summary"):
            text = gzip.decompress(paths[key].read_bytes()).decode("utf-8", "replace")
            yield Rfc(number=key, text=without_pages(text), **index[key])


def prose(text: str) -> list[str]:
    """Paragraphs of running text, each in one line: no tables, figures or lists of fields."""
    found = []
    for part in re.split(r"\n\s*\n", text):
        line = " ".join(part.split())
        columns = any("   " in row.strip() for row in part.split("\n"))
        letters = sum(char.isalpha() or char == " " for char in line)
        if len(line) >= 60 and letters >= 0.9 * len(line) and line[-1] in ".:?!" and not columns:
            found.append(line)
    return found


def sections(text: str) -> list[tuple[str, str]]:
    """Titles of the numbered sections and the text below each; the table of contents is not taken for one."""
    headings = [match for match in _HEADING.finditer(text) if not re.search(r"\.\s?\.|\s\d+$", match[0])]
    starts = [match.start() for match in headings]
    return [
        (match[3].strip(), text[match.end() : end])
        for match, end in zip(headings, [*starts[1:], len(text)], strict=False)
    ]


def abstract(text: str) -> str:
    """The abstract in one line, or nothing."""
    match = re.search(
        r"^ {0,3}(?:\d\.? +)?Abstract[ \t]*\n(.*?)(?=^\S|^ {0,2}Table of|\Z)", text, re.M | re.S
    )
    return " ".join(match[1].split()) if match else ""


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph."""
    return [sentence.strip() for sentence in _SENTENCE.split(paragraph) if sentence.strip()]


def oracle(summary: str, chosen_from: Sequence[str], *, at_most: int) -> list[int]:
    """Sentences chosen greedily while the mean of their ROUGE-1 and ROUGE-2 F with the summary grows.

    As in Nallapati et al. 2017 (SummaRuNNer, section 3.3); words are lower-case runs of letters and digits.
    """
    wanted = [_grams(summary, size) for size in (1, 2)]
    parts = [[_grams(sentence, size) for size in (1, 2)] for sentence in chosen_from]
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < at_most:
        scores = {}
        for place in range(len(parts)):
            if place not in chosen:
                total = [sum((parts[key][size] for key in (*chosen, place)), Counter()) for size in (0, 1)]
                scores[place] = sum(_f1(have, want) for have, want in zip(total, wanted, strict=True)) / 2
        place = max(scores, key=scores.__getitem__, default=-1)
        if place < 0 or scores[place] <= best:
            break
        best = scores[place]
        chosen.append(place)
    return sorted(chosen)


def _grams(text: str, size: int) -> Counter[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def _f1(have: Counter[tuple[str, ...]], want: Counter[tuple[str, ...]]) -> float:
    both = (have & want).total()
    return 2 * both / (have.total() + want.total()) if both else 0.0


def key_sentences(rfcs: Iterable[Rfc]) -> Iterator[Row]:
    """Sentences: the abstract is the summary, up to three of the body's first 16 the extract."""
    for rfc in rfcs:
        summary = abstract(rfc.text)
        body = [text for title, text in sections(rfc.text) if not re.match("abstract|status", title, re.I)]
        found = [
            sentence
            for text in body[:6]
            for paragraph in prose(text)
            for sentence in sentences(paragraph)
            if 30 <= len(sentence) <= 250 and plain(sentence) not in plain(summary)
        ][:16]
        if 100 <= len(summary) <= 1500 and len(found) >= 8:
            chosen = oracle(summary, found, at_most=3)
            labels = [int(place in chosen) for place in range(len(found))]
            row = {"sentences": found, "labels": labels, "summary": summary}
            yield Row(document=rfc.document, row=row)


def passages(rfcs: Iterable[Rfc], *, of_each: int) -> Iterator[Row]:
    """Retrieval: the titles of an RFC and of one of its sections, and the section's first words."""
    for rfc in rfcs:
        found = {}
        for title, text in sections(rfc.text):
            body = cut(" ".join(prose(text)), 600)
            if len(body) >= 200 and not _FORMAL.search(title) and len(title) >= 8:
                found[plain(title)] = {"query": f"{rfc.title}: {title}", "passage": body}
        for key in sorted(found, key=lambda title: number(f"{rfc.number}:{title}"))[:of_each]:
            yield Row(document=rfc.document, row=found[key])


def questions(rfcs: Iterable[Rfc]) -> Iterator[Row]:
    """Spans: questions to the first page (answers: the RFC index), and what abbreviations stand for."""
    for rfc in rfcs:
        yield from _of_the_first_page(rfc)
        yield from _of_abbreviations(rfc)


def _of_the_first_page(rfc: Rfc) -> Iterator[Row]:
    context = cut(re.sub(r"[ \t]{3,}", "  ", rfc.text), 700)
    asked = {
        "Who is the first author?": rfc.author,
        "When was it published?": rfc.date,
        "Which RFC does it make obsolete?": rfc.obsoletes.removeprefix("RFC"),
        "Which RFC does it update?": rfc.updates.removeprefix("RFC"),
    }
    for question, answer in asked.items():
        if not re.fullmatch(r"\d+", answer) and question.startswith("Which") and answer:
            continue  # several
        start = context.find(answer) if answer else -1
        if answer and start < 0:
            continue
        if not answer and number(f"{rfc.number}:{question}") % 3:
            continue  # most RFCs replace none
        answers = [{"start": start, "text": answer}] if answer else []
        yield Row(document=rfc.document, row={"question": question, "context": context, "answers": answers})


def abbreviations(text: str) -> dict[str, str]:
    """What abbreviations stand for, of those spelled out as `Long Form (LF)` with the very initials."""
    found = {}
    for match in _DEFINED.finditer(text):
        words = re.split(r"[ -]", match[1].strip(" -"))
        for first in range(len(words)):
            initials = "".join(word[0] for word in words[first:] if word not in _SMALL)
            if initials == match[2] and words[first] not in _SMALL:
                long = match[1].strip(" -")
                found.setdefault(match[2], long[long.index(words[first]) if first else 0 :])
    return found


def _of_abbreviations(rfc: Rfc) -> Iterator[Row]:
    paragraphs = prose(rfc.text)
    texts = [text for text in paragraphs if len(text) <= 600]
    kept = 0
    for short, long in sorted(abbreviations(" ".join(paragraphs)).items()):
        question = f"What does {short} stand for?"
        pattern = re.compile(re.escape(long).replace(r"\ ", "[ -]"), re.I)
        meant = [text for text in texts if pattern.search(text)]
        spelled = [text for text in meant if f"({short})" not in text]
        place = number(f"{rfc.number}:{short}")
        without = (
            [text for text in texts if short in text.split() and text not in meant] if place % 3 == 0 else []
        )
        answered = (spelled or meant)[:1]
        if without:
            yield Row(
                document=rfc.document,
                row={"question": question, "context": without[place % len(without)], "answers": []},
            )
            kept += 1
        elif answered:
            (context,) = answered
            matches = pattern.finditer(context)
            answers = [{"start": match.start(), "text": match[0]} for match in matches]
            yield Row(
                document=rfc.document, row={"question": question, "context": context, "answers": answers}
            )
            kept += 1
        if kept == 4:
            return
