"""Datasets of Hugging Face give the texts of a split, from a folder or from the Hub."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hub import COMMIT, hub
from local_ray import STACK

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.cache import Corpus, open_corpus
from stack.data.parts import cut
from stack.data.sources import read_documents
from stack.data.tokenizer import ByteTokenizer

TEXTS = [f"zwölf {number} " * (number % 5) for number in range(2100)]
WANT = [text for text in TEXTS if text]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No file of a test is left in the cache of the library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hugging_face"))


def source(path: Path | str, **settings: object) -> SourceConfig:
    return SourceConfig.model_validate({"kind": "hf", "path": str(path), **settings})


def save(path: Path, *, split: str | None = None) -> Path:
    records = {"text": TEXTS, "id": list(range(len(TEXTS)))}
    whole = datasets.Dataset.from_dict(records)
    (datasets.DatasetDict({split: whole}) if split else whole).save_to_disk(str(path))
    return path


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    half = len(TEXTS) // 2
    for number, some in enumerate((TEXTS[:half], TEXTS[half:])):
        name = f"train-{number:05}-of-00002.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table({"id": list(range(len(some))), "text": some}), folder / name
        )
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [0], "text": ["of the test"]}), folder / "test-00000-of-00001.parquet"
    )
    return folder


def write_jsonl(folder: Path) -> Path:
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"meta": {"text": text or None}, "id": 1}) + "\n" for text in TEXTS)
    return folder


@pytest.mark.parametrize("split", [None, "train", "validation"])
def test_what_was_saved_to_disk_is_read_where_it_lies(tmp_path, split) -> None:
    saved = source(save(tmp_path / "saved", split=split), split=split or "train")
    assert list(read_documents(saved)) == WANT
    assert list(read_documents(saved.model_copy(update={"max_bytes": 20}))) == WANT[:2]
    some = list(cut(saved, ByteTokenizer(), 0))
    assert [text for part in some for text in part.read()[0]] == WANT
    assert sum(part.read()[1] for part in some) == len(TEXTS) - len(WANT)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_files_is_read_streamed_or_not(tmp_path, streaming) -> None:
    folder = write_parquet(tmp_path / "parquet")
    assert list(read_documents(source(folder, streaming=streaming))) == WANT
    assert list(read_documents(source(folder, streaming=streaming, split="test"))) == ["of the test"]
    inside = source(write_jsonl(tmp_path / "jsonl"), streaming=streaming, field="meta.text")
    assert list(read_documents(inside)) == WANT


def test_the_corpus_is_the_same_however_it_is_read_and_known_by_its_content(tmp_path: Path) -> None:
    def opened(where: SourceConfig) -> Corpus:
        return open_corpus(where, ByteTokenizer(), tmp_path / "cache")

    folder = write_parquet(tmp_path / "parquet")
    first, streamed = opened(source(folder)), opened(source(folder, streaming=True))
    assert streamed.key == first.key, "it is found, and not read again"
    assert opened(source(save(tmp_path / "saved"))).fingerprint == first.fingerprint
    test = opened(source(folder, split="test"))
    part = opened(source(folder, split="train[:10%]"))
    assert len({first.key, test.key, part.key}) == 3
    assert len(part.num_bytes) == sum(bool(text) for text in TEXTS[:210])
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [0], "text": ["changed"]}), folder / "test-00000-of-00001.parquet"
    )
    assert opened(source(folder, split="test")).num_bytes.tolist() == [7]


def nothing(path: Path) -> None:
    """There is no such folder."""
    assert not path.exists()


def no_file(folder: Path) -> None:
    folder.mkdir()


def script(folder: Path) -> None:
    folder.mkdir()
    (folder / f"{folder.name}.py").write_text("raise SystemExit('it ran')")


BAD: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "no folder and no name": (nothing, {}, r"bad is no folder of a dataset, and no name of one"),
    "nothing in it": (no_file, {}, r"bad: .*; check path, config_name, split and revision"),
    "a program": (script, {}, r"bad: .*; check path"),
    "no such split": (write_parquet, {"split": "validation"}, r"bad: .*validation.*; check path"),
    "no such split of what was saved": (
        lambda path: save(path, split="train"),
        {"split": "validation"},
        r"bad: no split 'validation'; it has train; check path",
    ),
    "a configuration of what was saved": (
        save,
        {"config_name": "en"},
        r"bad: what was saved to disk has no configuration 'en'",
    ),
    "no such configuration": (write_parquet, {"config_name": "en"}, r"bad: .*'en'.*; check path"),
    "no such field": (
        write_parquet,
        {"field": "body"},
        r"bad: train: row 0 \(from 0\): no field 'body'; fields present: id, text; set",
    ),
    "no text": (
        write_parquet,
        {"field": "id"},
        r"bad: train: row 0 \(from 0\): field 'id' holds a int, not text",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_such_dataset_is_one_line(tmp_path, name, streaming) -> None:
    write, settings, message = BAD[name]
    write(tmp_path / "bad")
    with pytest.raises(StackError, match=message) as error:
        list(read_documents(source(tmp_path / "bad", streaming=streaming, **settings)))
    assert "\n" not in str(error.value)


def test_the_extra_is_named_where_the_library_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        StackError, match=r"need the library `datasets`; install the extra: pip install 'stack\[hf\]'"
    ):
        list(read_documents(source(tmp_path)))


@pytest.mark.full
def test_a_dataset_of_the_hub_is_known_by_its_commit_and_then_read_without_the_hub(tmp_path: Path) -> None:
    records = "".join(json.dumps({"text": text}) + "\n" for text in WANT).encode()
    (tmp_path / "run.yaml").write_text("data: {sources: [{kind: hf, path: me/some}], sequence_length: 64}\n")

    def prepare(environment: dict[str, str], cache: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        command = [
            *STACK,
            "data",
            "prepare",
            str(tmp_path / "run.yaml"),
            f"data.cache_dir={tmp_path / cache}",
        ]
        return subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True)

    with hub({"README.md": b"", "data/train.jsonl": records}, tmp_path / "home") as (environment, asked):
        kept = prepare(environment, "kept")
        assert f": {len(WANT):,} documents, " in kept.stdout, kept.stderr
        assert any("train.jsonl" in path for path in asked)
        assert asked.count("/api/datasets/me/some") == 1, "what is read is what it is known by"
        asked.clear()
        pin = f"data.sources.0.revision={COMMIT}"
        streamed = prepare(environment, "streamed", "data.sources.0.streaming=true", pin)
        assert "/api/datasets/me/some" not in asked
        assert f": {len(WANT):,} documents, " in streamed.stdout, streamed.stderr
        asked.clear()
        assert prepare(environment, "kept").returncode == 0
        asked_for = [path for path in asked if "/datasets/" in path]
        assert asked_for == ["/api/datasets/me/some"], "for its newest commit"
        none = prepare(environment, "kept", "data.sources.0.path=me/none")
        assert none.returncode == 1
        assert re.fullmatch(r"error: data\.sources: me/none: 404 .*; check path, .*\n", none.stderr)
    gone = prepare(environment, "kept")
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1
    pinned = prepare(environment, "kept", pin)
    assert pinned.stdout.splitlines()[0] == kept.stdout.splitlines()[0], pinned.stderr
    names = [{path.name for path in (tmp_path / cache).glob("tokens-*")} for cache in ("kept", "streamed")]
    assert names[0] == names[1]
