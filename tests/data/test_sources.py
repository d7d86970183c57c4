"""Documents come out whole, in order, and what can not be read is said with its place."""

import gzip
import json
import lzma
import sysconfig
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.files import _folders, list_files, source_files
from stack.data.parquet_files import row_group_bytes
from stack.data.parts import cut
from stack.data.sources import read_documents
from stack.data.text_files import TEXT_DOCUMENT_CHARACTERS, zstd
from stack.data.tokenizer import ByteTokenizer


def read(kind: str, path: Path | None = None, **settings: object) -> list[str]:
    name = None if path is None else str(path)
    return list(read_documents(SourceConfig.model_validate({"kind": kind, "path": name, **settings})))


def test_python_source_holds_the_help_topics_and_the_standard_library() -> None:
    documents = read("python")
    assert documents[0].startswith('The "assert" statement')
    assert Path(sysconfig.get_path("stdlib"), "argparse.py").read_text("utf-8") in documents
    assert sum(map(len, documents)) > 4_000_000
    assert documents == read("python")


def test_python_source_leaves_out_test_suites_and_installed_packages() -> None:
    folders = {part for file in source_files(SourceConfig()) for part in file.parts[:-1]}
    assert folders.isdisjoint({"test", "tests", "idlelib", "site-packages"})


def test_each_text_file_of_a_folder_is_a_document_in_the_order_of_the_paths(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second\r\nline")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / ".hidden").write_text("no")
    assert read("text", tmp_path) == ["first", "second\r\nline"]


def test_a_pattern_chooses_files_in_folders_below(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "x/3.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read("text", tmp_path / "**/*.txt") == ["x/1.txt", "x/y/2.txt"]


def test_a_huge_text_file_is_read_in_parts_that_end_with_a_line(tmp_path: Path) -> None:
    text = "a line of some length, ä\n" * (TEXT_DOCUMENT_CHARACTERS // 25 + 10)
    (tmp_path / "big.txt").write_text(text)
    parts = read("text", tmp_path / "big.txt")
    assert len(parts) == 2
    assert parts[0].endswith("ä\n")
    assert "".join(parts) == text


def test_another_encoding_is_read_when_named(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("café".encode("latin-1"))
    assert read("text", tmp_path / "old.txt", encoding="latin-1") == ["café"]


def test_jsonl_gives_the_field_of_every_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in ("one", "", "two\u2028three")) + "\n\n")
    assert read("jsonl", path, field="body") == ["one", "two\u2028three"]


def test_parquet_gives_the_column_of_every_row(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    assert read("parquet", tmp_path) == texts


def test_a_null_is_left_out_of_both_kinds_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"text": ""}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "one", ""]}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        source = SourceConfig(kind=kind, path=str(tmp_path))
        assert list(read_documents(source)) == ["one"]
        assert [part.read() for part in cut(source, ByteTokenizer(), 0)] == [(["one"], 2)]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "two"}'.encode("utf-16-le"))
    assert read("text", tmp_path / "a.txt") == ["one\ufeff"]
    assert read("jsonl", tmp_path / "b.jsonl", encoding="utf-16-le") == ["two"]


def test_each_file_is_read_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "below" / "b.txt").write_text("b")
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (tmp_path / "in" / "below" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "same.txt").symlink_to(tmp_path / "in" / "a.txt")
    (tmp_path / "in" / "z.txt").hardlink_to(tmp_path / "in" / "a.txt")
    for path in ("in", "in/**", "in/**/*.txt", "**/*.txt"):
        assert sorted(read("text", tmp_path / path)) == ["a", "b", "c"], path
    assert len(list(_folders([tmp_path]))) == 4, "each is entered once"


def test_records_are_read_whatever_the_letters_of_the_name_and_compressed(tmp_path: Path) -> None:
    for name, opener in (
        ("a.JSONL", open),
        ("b.ndjson", open),
        ("c.jsonl.gz", gzip.open),
        ("d.jsonl.xz", lzma.open),
        ("dd.jsonl.zst", zstd.open),
    ):
        with opener(tmp_path / name, "wt") as file:
            file.write(json.dumps({"text": name}) + "\n")
    (tmp_path / "e.json").write_text("{}")
    assert read("jsonl", tmp_path) == ["a.JSONL", "b.ndjson", "c.jsonl.gz", "d.jsonl.xz", "dd.jsonl.zst"]
    files = list_files(SourceConfig(kind="jsonl", path=str(tmp_path)))
    assert [file.name for file in files.passed_over] == ["e.json"]


def test_zstandard_is_read_with_several_frames_and_a_wide_window(tmp_path: Path) -> None:
    wide: dict[int, int] = {
        zstd.CompressionParameter.window_log: 28,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=wide)
    # What does not tell its size keeps its whole window.
    frame = compressor.compress(b"a wide window\n") + compressor.flush()
    (tmp_path / "a.txt.zst").write_bytes(frame + zstd.compress("and zwölf\n".encode()))
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(frame)
    assert read("text", tmp_path / "a.txt.zst") == ["a wide window\nand zwölf\n"]


def test_a_field_may_lie_inside_others(tmp_path: Path) -> None:
    records = [
        {"meta": {"text": "one", "turns": [{"said": "x"}, {"said": "y"}]}},
        {"meta": {"text": None, "turns": [{"said": "z"}, None]}},
        {"meta": None},
        {"meta.text": "a name before a path", "meta": {"turns": [0, {"said": "w"}]}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert read("jsonl", path, field="meta.text") == ["one", "a name before a path"]
    assert read("jsonl", path, field="meta.turns.1.said") == ["y", "w"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[:3]), tmp_path / "a.parquet")
    source = SourceConfig(kind="parquet", path=str(tmp_path), field="meta.text")
    assert list(read_documents(source)) == ["one"]
    assert [part.read() for part in cut(source, ByteTokenizer(), 0)] == [(["one"], 2)]


def test_a_parquet_column_behind_nested_ones_is_measured_itself(tmp_path: Path) -> None:
    large = [{"inside": {"a": str(i) * 1000, "b": str(i) * 1000}, "text": str(i)} for i in range(100)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(large), tmp_path / "a.parquet")
    sizes = {
        field: row_group_bytes(SourceConfig(kind="parquet", path="x", field=field), tmp_path / "a.parquet")[0]
        for field in ("text", "inside.a")
    }
    assert sizes["text"] < 1000 < sizes["inside.a"]


def test_documents_too_short_or_too_long_are_left_out(tmp_path: Path) -> None:
    for number, text in enumerate(("äö", "äöü", "äöüß", "äöüß€")):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read("text", tmp_path, min_characters=3, max_characters=4) == ["äöü", "äöüß"]
    assert read("text", tmp_path, max_characters=2) == ["äö"]
    assert read("text", tmp_path, min_characters=5) == ["äöüß€"]
    # What is left out was read.
    assert read("text", tmp_path, min_characters=3, max_bytes=5) == ["äöü"]


def test_max_bytes_ends_with_the_document_that_reaches_it(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("ää")
    assert len(read("text", tmp_path, max_bytes=8)) == 2
    assert len(read("text", tmp_path, max_bytes=9)) == 3


def test_synthetic_documents_follow_the_seed_and_have_uneven_lengths() -> None:
    def first(seed: int) -> list[str]:
        return list(islice(read_documents(SourceConfig(kind="synthetic"), seed=seed), 200))

    documents = first(1)
    assert documents == first(1)
    assert documents != first(2)
    assert min(map(len, documents)) < 100 < 2000 < max(map(len, documents))


def test_reading_streams_documents() -> None:
    assert next(read_documents(SourceConfig(kind="synthetic", max_bytes=10**15)))


def write_nothing(path: Path) -> None:
    """The file is missing."""
    del path


def write_truncated_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), path)
    path.write_bytes(path.read_bytes()[:-20])


def write_truncated_pages(path: Path) -> None:
    """A sound footer after pages that are not there."""
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(i) * 50 for i in range(1000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])


BAD_INPUT: dict[str, tuple[str, str, Callable[[Path], object], dict[str, str], str]] = {
    "missing path": ("text", "no.txt", write_nothing, {}, r"no\.txt does not exist; check path"),
    "empty pattern": ("text", "*.txt", write_nothing, {}, r"no file matches .*\*\.txt; check path"),
    "empty folder": ("jsonl", "folder", lambda path: path.mkdir(), {}, r"folder .* holds no file \*\.jsonl"),
    "undecodable text": (
        "text",
        "bad.txt",
        lambda path: path.write_bytes("ä".encode() * 40_000 + b"\xff"),
        {},
        r"bad\.txt: the byte at offset 80000 is not utf-8; set encoding",
    ),
    "cut character": (
        "text",
        "bad.txt",
        lambda path: path.write_bytes(b"abc" + "ä".encode()[:1]),
        {},
        r"offset 3 is not utf-8",
    ),
    "undecodable jsonl": (
        "jsonl",
        "bad.jsonl",
        lambda path: path.write_bytes(b'{"text": "ok"}\n{"text": "\xe4"}\n'),
        {},
        r"offset 25 is not utf-8",
    ),
    "unknown encoding": (
        "text",
        "a.txt",
        lambda path: path.write_text("a"),
        {"encoding": "utf-9"},
        r"no encoding 'utf-9'; set encoding",
    ),
    "bad line": (
        "jsonl",
        "bad.jsonl",
        lambda path: path.write_text('{"text": "ok"}\n{"text": \n'),
        {},
        r"bad\.jsonl:2: not JSON at column",
    ),
    "not a record": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text("[1]"),
        {},
        r":1: a JSON list, not an object",
    ),
    "missing field": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"body": "x", "id": 1}'),
        {},
        r":1: no field 'text'; fields present: body, id",
    ),
    "field without text": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"text": 3}'),
        {},
        r":1: field 'text' holds a int, not text",
    ),
    "half a surrogate pair": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"text": "x\\ud800"}'),
        {},
        r":1: .*surrogate pair at character 1",
    ),
    "number of too many digits": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"text": "x", "n": ' + "9" * 5000 + "}"),
        {},
        r":1: JSON that is a number of too many digits to be read; mend or remove the line",
    ),
    "records in records": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        {},
        r":1: JSON that is nested too deep to be read",
    ),
    "truncated gzip": (
        "text",
        "a.txt.gz",
        lambda path: path.write_bytes(gzip.compress(b"text " * 1000)[:-10]),
        {},
        r"a\.txt\.gz: not a whole \.gz file",
    ),
    "truncated zstandard": (
        "jsonl",
        "a.jsonl.zst",
        lambda path: path.write_bytes(zstd.compress(b'{"text": "a"}' * 1000)[:-4]),
        {},
        r"a\.jsonl\.zst: not a whole \.zst file",
    ),
    "no zstandard": (
        "text",
        "a.txt.zst",
        lambda path: path.write_bytes(b"text"),
        {},
        r"a\.txt\.zst: not a whole \.zst file",
    ),
    "field that is not in another": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"meta": {"text": "x"}}\n{"meta": {"body": "x", "id": 1}}'),
        {"field": "meta.text"},
        r"a\.jsonl:2: no field 'meta\.text'; fields present in 'meta': body, id; set field to one of them",
    ),
    "field of a list that is too short": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"turns": ["x"]}'),
        {"field": "turns.1"},
        r"a\.jsonl:1: no field 'turns\.1'; 'turns' is a list of 1",
    ),
    "field of a text": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_text('{"text": "x"}'),
        {"field": "text.body"},
        r"a\.jsonl:1: no field 'text\.body'; 'text' holds a str",
    ),
    "column that is not in another": (
        "parquet",
        "a.parquet",
        lambda path: pyarrow.parquet.write_table(pyarrow.table({"meta": [{"body": "x"}]}), path),
        {"field": "meta.text"},
        r"a\.parquet: no column 'meta\.text'; columns present in 'meta': body; set",
    ),
    "no gzip": (
        "text",
        "a.txt.gz",
        lambda path: path.write_bytes(b"text"),
        {},
        r"a\.txt\.gz: not a whole \.gz file",
    ),
    "truncated parquet": (
        "parquet",
        "a.parquet",
        write_truncated_parquet,
        {},
        r"a\.parquet: not a whole Parquet file .*; write or copy it again",
    ),
    "broken parquet pages": ("parquet", "a.parquet", write_truncated_pages, {}, r"not a whole Parquet file"),
    "missing column": (
        "parquet",
        "a.parquet",
        lambda path: pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path),
        {},
        r"no column 'text'; columns present: body",
    ),
    "column without text": (
        "parquet",
        "a.parquet",
        lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path),
        {},
        r"column 'text' holds int64, not strings",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    kind, file, write, settings, message = BAD_INPUT[name]
    write(tmp_path / file)
    with pytest.raises(StackError, match=message) as error:
        read(kind, tmp_path / file, **settings)
    assert "\n" not in str(error.value)
