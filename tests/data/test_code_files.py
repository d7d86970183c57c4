"""A tree of source code gives the files that a person wrote, one document each."""

from pathlib import Path

import pytest

from stack.config import SourceConfig
from stack.config.errors import ConfigError, StackError
from stack.data import files
from stack.data.cache import open_corpus
from stack.data.files import list_files, source_files
from stack.data.parts import Range, cut
from stack.data.sources import read_documents
from stack.data.tokenizer import ByteTokenizer

TREE = {
    "setup.py": "setup()\n",
    "src/a.py": "a = 1\n",
    "src/deep/b.py": "b = 2\n",
    "src/deep/b.c": "int b;\n",
    "docs/a.md": "# A\n",
    "docs/src/c.py": "c = 3\n",
    ".git/config": "[core]\n",
    "web/node_modules/x/index.js": "x\n",
    "web/app.min.js": "y\n",
    "web/app.js": "z\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def names(root: Path, **settings: object) -> list[str]:
    source = SourceConfig.model_validate({"kind": "code", "path": str(root), **settings})
    return [str(file.relative_to(root)) for file in source_files(source)]


def test_by_default_all_is_read_that_is_not_hidden_nor_someone_elses(tree: Path) -> None:
    assert names(tree) == [
        *("docs/a.md", "docs/src/c.py", "setup.py", "src/a.py", "src/deep/b.c", "src/deep/b.py"),
        "web/app.js",
    ]
    assert len(names(tree, exclude=[])) == 9, "the hidden one alone is not read"
    told = SourceConfig.model_fields["exclude"].description or ""
    assert all(name in told for name in files._NOT_WRITTEN)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["*.py"], ["docs/src/c.py", "setup.py", "src/a.py", "src/deep/b.py"]),
        (["src"], ["docs/src/c.py", "src/a.py", "src/deep/b.c", "src/deep/b.py"]),
        (["/src/"], ["docs/src/c.py", "src/a.py", "src/deep/b.c", "src/deep/b.py"]),
        (["src/*.py"], ["src/a.py"]),
        (["src/**/*.py"], ["src/a.py", "src/deep/b.py"]),
        (["**/src/*.py"], ["docs/src/c.py", "src/a.py"]),
        (["src/deep", "*.md"], ["docs/a.md", "src/deep/b.c", "src/deep/b.py"]),
        (["?.[ch]"], ["src/deep/b.c"]),
    ],
)
def test_patterns_are_of_names_or_of_paths_from_the_root(tree, patterns, chosen) -> None:
    assert names(tree, include=patterns) == chosen
    everything = names(tree)
    assert names(tree, exclude=["node_modules", "*.min.js", *patterns]) == [
        name for name in everything if name not in chosen
    ]


def test_what_is_excluded_is_excluded_though_it_is_included(tree: Path) -> None:
    assert names(tree, include=["*.py"], exclude=["src/deep", "docs"]) == ["setup.py", "src/a.py"]
    assert list_files(SourceConfig(kind="code", path=str(tree))).passed_over == ()


def test_a_folder_that_is_excluded_is_not_entered(tree: Path, monkeypatch) -> None:
    entered: list[str] = []
    entries = files._entries
    monkeypatch.setattr(files, "_entries", lambda folder: entered.append(folder.name) or entries(folder))
    names(tree)
    assert "deep" in entered
    assert {"node_modules", ".git"}.isdisjoint(entered)


def test_binary_files_and_files_with_long_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfa = 1\r\n" + b"x" * 1000 + b"\n")
    (tmp_path / "b.py").write_bytes(b"x" * 1001)
    (tmp_path / "c.bin").write_bytes(b"text" + bytes(10))
    (tmp_path / "d.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "e.py").write_bytes(b"")
    source = SourceConfig(kind="code", path=str(tmp_path))
    text = "a = 1\r\n" + "x" * 1000 + "\n"
    assert list(read_documents(source)) == [text]
    (part,) = cut(source, ByteTokenizer(), 0)
    assert isinstance(part, Range), "read where it is tokenized"
    assert part.read() == ([text], 4)
    for change, more in (
        ({"max_line_characters": None}, {"x" * 1001}),
        ({"encoding": "latin-1"}, {"é"}),
    ):
        found = set(read_documents(source.model_copy(update=change)))
        assert {one for one in found if "a = 1" not in one} == more


def test_how_long_a_line_may_be_is_part_of_what_the_cache_knows_it_by(tree, tmp_path_factory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    sources = [
        SourceConfig(kind="code", path=str(tree), max_line_characters=some) for some in (6, 1000, None)
    ]
    corpora = [open_corpus(source, ByteTokenizer(), cache) for source in sources]
    assert len({corpus.key for corpus in corpora}) == 3
    assert len(corpora[0].num_bytes) < len(corpora[1].num_bytes) == len(corpora[2].num_bytes)


def test_what_is_no_tree_or_holds_nothing_is_named(tree: Path) -> None:
    with pytest.raises(StackError, match=r"setup\.py is no folder; give a source of kind code the root"):
        names(tree / "setup.py")
    with pytest.raises(StackError, match=r"no file in .* is chosen; check path, include and exclude"):
        names(tree, include=["*.rs"])
    with pytest.raises(ConfigError, match="include has an empty pattern"):
        SourceConfig(kind="code", path="x", include=("/",))
    with pytest.raises(ConfigError, match=r"include=.* is not read with kind=text; remove it"):
        SourceConfig(kind="text", path="x", include=("*.py",))
