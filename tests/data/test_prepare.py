"""Data is prepared before a run: cut into parts that others may read, the same bytes whoever tokenizes it."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from array_record.python.array_record_module import ArrayRecordWriter

from stack.cli import main
from stack.config import DataConfig, SourceConfig
from stack.config.errors import StackError
from stack.data import parts
from stack.data.parts import Range, Texts, cut
from stack.data.sources import has_length, read_documents
from stack.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from stack.parallel import cluster

TEXTS = ["one\r\n", "", "zwölf <|endoftext|> ", *(f"{number} " * number for number in range(1, 60)), "end"]


def write_sources(folder: Path) -> dict[str, SourceConfig]:
    """The same texts in files of every kind."""
    (folder / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "text" / f"{number:03}.txt").write_bytes(text.encode())
    with gzip.open(folder / "text" / "100.txt.gz", "wb") as file:
        file.write(b"packed " * 50)
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text("\ufeff" + records + '{"text": null}\n\n{"text": "no newline after it"}')
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [*TEXTS, None]}), folder / "a.parquet", row_group_size=7
    )
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return {
        "text": SourceConfig(kind="text", path=str(folder / "text")),
        "code": SourceConfig(kind="code", path=str(folder / "text"), include=("*.txt",), max_characters=100),
        "arrayrecord": SourceConfig(kind="arrayrecord", path=str(folder / "a.array_record"), field=None),
        "jsonl": SourceConfig(kind="jsonl", path=str(folder / "a.jsonl")),
        "parquet": SourceConfig(kind="parquet", path=str(folder / "a.parquet")),
        "limited": SourceConfig(kind="jsonl", path=str(folder / "a.jsonl"), max_bytes=500),
        "synthetic": SourceConfig(kind="synthetic", max_bytes=10_000),
    }


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 1 << 20])
def test_parts_hold_the_documents_of_a_source_in_order_however_it_is_cut(tmp_path, monkeypatch, size) -> None:
    monkeypatch.setattr(parts, "_BYTES", size)
    for kind, source in write_sources(tmp_path).items():
        some = list(cut(source, ByteTokenizer(), 0))
        documents = [text for part in some for text in part.read()[0] if has_length(source, text)]
        assert documents == list(read_documents(source)), kind
        left_out = {"text": 0, "code": 1, "jsonl": 2, "parquet": 2, "arrayrecord": 1, "limited": 1}
        assert sum(part.read()[1] for part in some) == left_out.get(kind, 0)
        if size <= 100 and kind in ("jsonl", "parquet", "arrayrecord"):
            assert sum(isinstance(part, Range) for part in some) > 5, kind
        if size == 100 and kind == "text":
            assert {type(part) for part in some} == {Range, Texts}, "small files together, others read here"


def test_what_cannot_be_read_from_its_middle_is_read_where_it_is_cut(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "_BYTES", 100)
    sources = write_sources(tmp_path)
    (tmp_path / "utf16.jsonl").write_bytes(('{"text": "a"}\n' * 20).encode("utf-16"))
    wide = SourceConfig(kind="jsonl", path=str(tmp_path / "utf16.jsonl"), encoding="utf-16")
    for source in (sources["limited"], sources["synthetic"], wide):
        assert all(isinstance(part, Texts) for part in cut(source, ByteTokenizer(), 0))
    monkeypatch.setattr(parts, "_LARGE_GROUP", 10)
    assert all(isinstance(part, Texts) for part in cut(sources["parquet"], ByteTokenizer(), 0))


def test_a_broken_line_within_a_range_is_told_with_its_number(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "_BYTES", 50)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n' * 30 + "{\n" + '{"text": "a"}\n' * 30)
    source = SourceConfig(kind="jsonl", path=str(file))
    with pytest.raises(StackError, match=r"a\.jsonl:31: not JSON at column 2:"):
        [part.read() for part in cut(source, ByteTokenizer(), 0)]


def test_a_file_that_is_not_the_one_that_was_cut_is_named_with_the_machine(tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    (part,) = cut(SourceConfig(kind="text", path=str(file)), ByteTokenizer(), 0)
    file.write_text("other")
    with pytest.raises(StackError, match=r"a\.txt: \S+ has another file of that name \(5 and not 3 bytes"):
        part.read()
    file.unlink()
    with pytest.raises(
        StackError, match=r"a\.txt: \S+ cannot read it: No such file or directory; put sources"
    ):
        part.read()


def test_a_tokenizer_that_was_sent_elsewhere_takes_special_tokens_in_a_text_as_text(tmp_path) -> None:
    data = DataConfig(sources=(SourceConfig(kind="synthetic", max_bytes=20_000),))
    train_bpe(data, 300, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    sent = pickle.loads(pickle.dumps(tokenizer))
    texts = ["a <|endoftext|> b"]
    np.testing.assert_array_equal(sent.encode_batch(texts)[0], tokenizer.encode_batch(texts)[0])
    assert tokenizer.eos not in sent.encode_batch(texts)[0]


def double(number: int) -> int:
    return 2 * number


def test_a_machine_with_another_stack_is_named_and_not_worked_with() -> None:
    pickled = pickle.dumps(double), pickle.dumps(4)
    assert cluster.work(cluster.identity(), *pickled) == (None, 8)
    told, value = cluster.work(cluster.identity() | {"code of stack": "0123"}, *pickled)
    assert value is None
    assert f"has {cluster.identity()['code of stack']} as code of stack, not 0123; install one" in str(told)


@pytest.mark.parametrize(
    ("address", "status", "told"),
    [
        ("here", 2, "'here' is no address of Ray; give auto, local, HOST:PORT or ray://HOST:PORT"),
        ("127.0.0.1:1", 1, "no Ray cluster at 127.0.0.1:1: Connection refused; start one with `ray start"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(capsys, config_file, address, status, told) -> None:
    assert main(["data", "prepare", str(config_file), "--ray", address]) == status
    assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.fixture
def config_file(tmp_path) -> Path:
    """A config of all kinds of sources."""
    sources = [
        source.model_dump(mode="json", exclude_defaults=True) for source in write_sources(tmp_path).values()
    ]
    tree = {
        "model": {"vocab_size": 300, "max_length": 32, "num_layers": 1, "embed_dim": 8, "num_heads": 1},
        "data": {"sources": sources, "sequence_length": 32, "cache_dir": str(tmp_path / "cache")},
        "train": {"batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def test_what_is_prepared_is_told_and_is_what_a_run_reads_and_needs_no_jax(config_file) -> None:
    code = "import sys; from stack.cli import main; main(sys.argv[1:]); print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, "data", "prepare", str(config_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert ": 63 documents, " in lines[0]
    assert lines[7].startswith("rows      ")
    assert "note      data.sources: " in done.stdout
    for line in lines[:7]:
        assert Path(line.rpartition("; ")[2]).is_dir()

    from stack.config import load
    from stack.data import open_data

    before = {path: path.stat().st_mtime_ns for path in config_file.with_name("cache").rglob("*.bin")}
    assert f"{open_data(load(config_file)).train.num_rows:,} to train on" in lines[7]
    after = {path: path.stat().st_mtime_ns for path in config_file.with_name("cache").rglob("*.bin")}
    assert before == after


def files(folder: Path) -> dict[str, bytes]:
    """What a cache holds, but for notes on when files changed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.full
def test_what_a_cluster_prepares_is_bit_for_bit_what_one_host_does_though_a_worker_is_killed(
    tmp_path, config_file
) -> None:
    from local_ray import STACK, pids_of
    from local_ray import cluster as local_cluster

    texts = [Path(json.__file__).read_text() * 10, "<|endoftext|>", "zwölf", *TEXTS]
    (tmp_path / "large.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 60))
    data = DataConfig(sources=(SourceConfig(kind="jsonl", path=str(tmp_path / "large.jsonl")),))
    train_bpe(data, 300, tmp_path / "tokenizer.json")
    tree = yaml.safe_load(config_file.read_text())
    tree["data"]["tokenizer"] = str(tmp_path / "tokenizer.json")
    tree["data"]["sources"].append({"kind": "jsonl", "path": str(tmp_path / "large.jsonl")})
    saved = datasets.Dataset.from_dict({"meta": [{"text": text} for text in texts]})
    saved.save_to_disk(str(tmp_path / "saved"))
    tree["data"]["sources"].append({"kind": "hf", "path": str(tmp_path / "saved"), "field": "meta.text"})
    config_file.write_text(yaml.safe_dump(tree))

    def command(name: str, *options: str) -> list[str]:
        return [*STACK, "data", "prepare", str(config_file), f"data.cache_dir={tmp_path / name}", *options]

    # Of these alone, as a source that only repeats others is refused.
    unique = [
        "data.deduplicate=near",
        f"data.sources=[{{kind: jsonl, path: {tmp_path}/twice.jsonl}}, {{kind: synthetic}}]",
    ]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    subprocess.run(command("one"), check=True, capture_output=True)
    done = subprocess.run(command("one", *unique), check=True, capture_output=True, text=True)
    assert "equal or nearly equal to others are left out" in done.stdout
    with local_cluster() as (address, environment):
        process = subprocess.Popen(
            command("ray", "--ray", address), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while process.poll() is None and not (working := pids_of("ray::call")):
            time.sleep(0.02)
        os.kill(working[0], signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == 0, error
        subprocess.run(
            command("ray", "--ray", address, *unique), env=environment, check=True, capture_output=True
        )

        # Of a source that fails there, the place is told.
        with (tmp_path / "large.jsonl").open("a") as file:
            file.write("{\n")
        broken = subprocess.run(
            command("broken", "--ray", address), env=environment, capture_output=True, text=True
        )
        assert broken.returncode == 1
        assert broken.stderr.startswith(f"error: {tmp_path}/large.jsonl:{60 * len(texts) + 1}: not JSON")
        assert broken.stderr.count("\n") == 1
    assert files(tmp_path / "ray") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) > 11 * 10
