"""Python's own library: docstrings to find functions by, and its documentation to pretrain on."""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .splits import Row, cut


def functions(library: Path) -> Iterator[Row]:
    """Retrieval: the first paragraph of a docstring, and the function without its docstring.

    A description that several functions share is left out: none of them would be the right one.
    """
    found = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if "lib2to3/tests" in name or name.startswith(("test/", "idlelib/idle_test")):
            continue
        found += [(name, *pair) for pair in documented(path.read_text("utf-8", "replace"))]
    counts = Counter(query for _, query, _ in found)
    for name, query, passage in found:
        if counts[query] == 1:
            yield Row(document=f"python:{name}", row={"query": query, "passage": passage})


def documented(source: str) -> Iterator[tuple[str, str]]:
    """First paragraph of the docstring, in one line, and source without it, of each function of a file."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        said = ast.get_docstring(node)
        if not said:
            continue
        text = node.body[0]
        query = cut(" ".join(re.split(r"\n\s*\n", said)[0].split()), 240)
        code = [
            *lines[node.lineno - 1 : text.lineno - 1],
            *lines[text.end_lineno or text.lineno : node.end_lineno],
        ]
        passage = cut(textwrap.dedent("\n".join(code)), 600)
        if len(query.split()) >= 4 and len(passage) >= 60:
            yield query, passage
