"""Descriptions of Debian's packages: classes, several labels, pairs, summaries and translations.

The labels are the maintainers', taggers' and translators' own: the archive's section, debtags, the line above
a description, and its German translation.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .splits import Row, cut, number, plain, split_of

SECTIONS = (
    "admin", "database", "editors", "electronics", "fonts", "games", "graphics", "mail", "math", "net",
    "science", "sound", "text", "utils", "video", "web", "x11",
)  # fmt: skip
FACETS = (
    "interface::commandline", "interface::daemon", "interface::graphical", "interface::text-mode",
    "use::checking", "use::configuring", "use::converting", "use::editing", "use::gameplaying",
    "use::monitor", "use::searching", "use::viewing", "works-with::archive", "works-with::audio",
    "works-with::db", "works-with::file", "works-with::image", "works-with::mail", "works-with::text",
    "works-with::video",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Package:
    """What the archive says of a package; `german` is the translation of `short`, or empty."""

    name: str
    source: str
    section: str
    tags: frozenset[str]
    short: str
    long: str
    german: str
    german_long: str

    @property
    def document(self) -> str:
        """The source: packages made of one source describe themselves alike."""
        return f"debian:{self.source}"


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a control file (Debian policy, 5.1): a continued value keeps its lines."""
    fields: dict[str, str] = {}
    name = ""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                if fields:
                    yield fields
                fields = {}
            elif line[0] in " \t":
                fields[name] += "\n" + line.strip()
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
    if fields:
        yield fields


def read_packages(lists: Path) -> list[Package]:
    """All packages of a folder with apt's lists: the short and long description, in English and in German."""
    english = {
        row["Description-md5"]: row["Description-en"] for row in stanzas(lists / "i18n_Translation-en")
    }
    german = {row["Description-md5"]: row["Description-de"] for row in stanzas(lists / "i18n_Translation-de")}
    packages = []
    for row in stanzas(lists / "binary-amd64_Packages"):
        digest = row.get("Description-md5", "")
        if digest in english:
            short, _, long = english[digest].partition("\n")
            german_short, _, german_long = german.get(digest, "").partition("\n")
            packages.append(
                Package(
                    name=row["Package"],
                    source=row.get("Source", row["Package"]).split()[0],
                    section=row.get("Section", ""),
                    tags=frozenset(tag.strip() for tag in row.get("Tag", "").split(",")),
                    short=short,
                    long=long,
                    german=german_short,
                    german_long=german_long,
                )
            )
    return packages


def paragraphs(long: str) -> list[str]:
    """The paragraphs of a long description, each in one line; its lists are left out."""
    found = []
    for part in re.split(r"\n\.(?:\n|$)", long):
        lines = part.split("\n")
        if not any(re.match(r"\s*[*+•o-]\s", line) for line in lines):
            text = " ".join(" ".join(lines).split())
            if text:
                found.append(text)
    return found


def one_of_each_source(packages: Iterable[Package]) -> list[Package]:
    """One package of each source, that whose name hashes lowest."""
    chosen: dict[str, Package] = {}
    for package in sorted(packages, key=lambda package: number(package.name)):
        chosen.setdefault(package.source, package)
    return list(chosen.values())


def sections(packages: Iterable[Package]) -> Iterator[Row]:
    """Classification: the archive's section from the description."""
    for package in one_of_each_source(package for package in packages if package.section in SECTIONS):
        if text := _text(package):
            yield Row(document=package.document, row={"text": text, "label": package.section})


def facets(packages: Iterable[Package]) -> Iterator[Row]:
    """Classification, several labels: debtags of the program's interface, use and what it works with."""
    programs = (package for package in packages if "role::program" in package.tags)
    for package in one_of_each_source(programs):
        labels = [facet for facet in FACETS if facet in package.tags]
        if labels and (text := _text(package)):
            yield Row(document=package.document, row={"text": text, "label": labels})


def _text(package: Package) -> str:
    body = " ".join(paragraphs(package.long))
    return cut(f"{package.short}\n{body}", 400) if len(body) >= 60 else ""


def pairs(packages: Iterable[Package]) -> Iterator[Row]:
    """Pair classification: does the line above a description belong to it?

    Half of the pairs do. The others take the description of a package of the same section and split: of eight
    drawn, that which shares most words with the line.
    """
    usable = []
    for package in one_of_each_source(packages):
        body = cut(" ".join(paragraphs(package.long)), 300)
        if len(body) >= 80 and len(package.short) >= 15:
            usable.append((package, body))
    groups: dict[tuple[str, str], list[tuple[Package, str]]] = {}
    for package, body in usable:
        groups.setdefault((package.section, split_of(package.document)), []).append((package, body))
    for group in groups.values():
        for package, body in group:
            place = number(f"pair:{package.name}")
            if place % 2:
                row = {"first": package.short, "second": body, "label": "same"}
            else:
                others = [group[number(f"{place}:{draw}") % len(group)] for draw in range(8)]
                others = [other for other in others if other[0].source != package.source]
                words = set(plain(package.short).split())
                if not others:
                    continue
                other = max(others, key=lambda other: len(words & set(plain(other[1]).split())))
                row = {"first": package.short, "second": other[1], "label": "different"}
            yield Row(document=package.document, row=row)


def summaries(packages: Iterable[Package]) -> Iterator[Row]:
    """Text to text: the line above a description from its first paragraphs."""
    for package in one_of_each_source(packages):
        body = cut(" ".join(paragraphs(package.long)), 450)
        if len(body) >= 100 and len(package.short) >= 15:
            yield Row(document=package.document, row={"prompt": body, "completion": package.short})


def translations(packages: Iterable[Package]) -> Iterator[Row]:
    """Text to text: the line above a description, from German into English."""
    for package in packages:
        german, english = package.german, package.short
        if len(german) >= 12 and plain(german) != plain(english) and "fixme" not in german.casefold():
            yield Row(document=package.document, row={"prompt": german, "completion": english})
