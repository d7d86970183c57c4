"""ArrayRecord files give their records' texts, whole and in parts, or what is wrong with them is named."""

import json
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from stack.config import SourceConfig
from stack.config.errors import ConfigError, StackError
from stack.data import array_records, parts
from stack.data.files import source_files
from stack.data.parts import Range, cut
from stack.data.sources import read_documents
from stack.data.tokenizer import ByteTokenizer

TEXTS = [f"zwölf {number} " * (number % 9) for number in range(300)]
WANT = [text for text in TEXTS if text]


def write(path: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def source(path: Path, field: str | None = "text") -> SourceConfig:
    return SourceConfig(kind="arrayrecord", path=str(path), field=field)


def test_records_are_objects_with_a_field_or_the_texts_themselves(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.array_record", [text.encode() for text in TEXTS])
    objects = [{"meta": {"text": text}} for text in TEXTS]
    inside = write(tmp_path / "inside.array_record", [json.dumps(one).encode() for one in objects])
    assert list(read_documents(source(bare, None))) == WANT
    assert list(read_documents(source(inside, "meta.text"))) == WANT


def test_a_folder_of_shards_is_read_in_order(tmp_path: Path) -> None:
    for number in (1, 0, 10):
        name = f"c4-train.array_record-{number:05}-of-00011"
        write(tmp_path / name, [f"shard {number}".encode()])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert list(read_documents(source(tmp_path, None))) == ["shard 0", "shard 1", "shard 10"]
    assert len(source_files(source(tmp_path))) == 3


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_parts_are_read_where_they_are_tokenized_and_hold_all_in_order(tmp_path, monkeypatch, size) -> None:
    monkeypatch.setattr(parts, "_BYTES", size)
    monkeypatch.setattr(array_records, "_AT_ONCE", 7)
    whole = source(write(tmp_path / "a.array_record", [text.encode() for text in TEXTS]), None)
    some = list(cut(whole, ByteTokenizer(), 0))
    assert all(isinstance(part, Range) for part in some)
    assert [text for part in some for text in part.read()[0]] == WANT
    assert sum(part.read()[1] for part in some) == len(TEXTS) - len(WANT)
    assert (len(some) > 2) == (size < 1 << 20)
    assert some[-1].name.endswith(f"to {len(TEXTS)}")


BAD_FILES = {
    "no text": (
        [b"ok", b"\xff"],
        None,
        r"a\.array_record: record 1 \(from 0\): the byte at offset 0 is not utf-8",
    ),
    "no JSON": ([b'{"text": "ok"}', b"ok"], "text", r"record 1 \(from 0\): not JSON at column 1"),
    "no field": ([b'{"body": "ok"}'], "text", r"record 0 \(from 0\): no field 'text'; fields present: body"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_record_is_named_by_its_number(tmp_path, name) -> None:
    records, field, message = BAD_FILES[name]
    path = write(tmp_path / "a.array_record", records)
    with pytest.raises(StackError, match=message) as error:
        list(read_documents(source(path, field)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 1000, 65536 + 100])
def test_a_file_that_is_not_whole_is_named(tmp_path, size) -> None:
    path = write(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StackError, match=r"a\.array_record: not a whole ArrayRecord file \(") as error:
        list(read_documents(source(path, None)))
    assert "\n" not in str(error.value)
    with pytest.raises(StackError, match="not a whole ArrayRecord file"):
        list(cut(source(path, None), ByteTokenizer(), 0))


def test_a_damaged_record_is_not_read_as_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(StackError, match="not a whole ArrayRecord file"):
        list(read_documents(source(path, None)))


def test_columns_of_text_have_a_name() -> None:
    words = "a source of kind parquet needs a field; null is for jsonl, arrayrecord, hf"
    with pytest.raises(ConfigError, match=words):
        SourceConfig(kind="parquet", path="a", field=None)
