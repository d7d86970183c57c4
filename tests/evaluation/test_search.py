"""What is found is nearest in float64, on any mesh; an index is kept, brought up to date and mended."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stack
from stack import ConfigError, StackError, Trainer
from stack.cli import main
from stack.config import Config, MeshConfig
from stack.data.tokenizer import ByteTokenizer
from stack.evaluation.predict import Scorer, predict
from stack.parallel import mesh as meshes
from stack.search import nearest as search
from stack.search.documents import cut
from stack.search.nearest import Approximate, Exact, nearest
from stack.search.store import DOCUMENTS, MANIFEST, TEXTS, VECTORS, Building
from stack.step import state as states

MODEL = {"kind": "encoder", "vocab_size": 257, "num_layers": 1, "embed_dim": 32, "num_heads": 2}
TREE = {
    "model": MODEL | {"max_length": 64, "dtype": "float32", "init_std": 0.3},
    "objective": {"kind": "retrieval", "widths": [8], "pooling": "mean"},
    "data": {"sequence_length": 64, "sources": [{"kind": "jsonl", "path": "pairs.jsonl", "field": None}]},
    "train": {"batch_size": 8},
}
FILES = {
    "one.md": "# Größe\n\nDer Würfel 🎲 liegt auf dem Tisch.\r\nDann fällt er.\n\n\n    Ende der Zeile\n",
    "two/deep.py": "def name(value):\n    return value + 1  # näher\n",
    "three.txt": "\ufeffone two three. four five six? seven eight nine! ten eleven twelve thirteen fourteen",
}


def trained(folder: Path, seed: int = 0, devices: int = 1, **changes: Any) -> Trainer:
    """With the parameters of a seed."""
    tree = TREE | {"name": "tiny", "output_dir": f"{folder}/runs", "seed": seed} | changes
    trainer = Trainer(Config.model_validate(tree), devices=jax.devices()[:devices])
    with meshes.use(trainer.mesh):
        trainer.state = states.init(trainer.program)
    return trainer


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, newline="")
    return str(folder)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Texts of which vectors were made."""
    texts: list[str] = []
    call = Scorer.__call__

    def record(self, some):
        texts.extend(text for given in some for text in given.record.values())
        return call(self, some)

    monkeypatch.setattr(Scorer, "__call__", record)
    return texts


@pytest.mark.parametrize(("passages", "devices"), [(1003, 8), (5, 8), (60, 1)])
def test_the_nearest_are_those_of_float64_on_any_mesh(passages, devices, monkeypatch):
    monkeypatch.setattr(search, "SCORES_BYTES", 4 * 4 * passages // devices)  # A few queries at a time.
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(passages, 12)).astype(np.float32)
    vectors[passages // 2 :] = vectors[: passages - passages // 2]  # Each twice: of equal ones the first.
    queries = draw.normal(size=(11, 12)).astype(np.float32)
    mesh = meshes.build(MeshConfig(data=devices, fsdp=1), jax.devices()[:devices])
    told = nearest(Exact(mesh, vectors), vectors, queries, 7)
    a, b = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries.astype(float), vectors.astype(float))
    )
    cosines = (a[:, None] * b).sum(-1)
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(told.numbers, expected)
    np.testing.assert_allclose(told.scores, np.take_along_axis(cosines, expected, 1), rtol=1e-12)


def test_hits_are_the_text_at_their_place_in_the_order_of_the_models_vectors(trainer, tmp_path):
    path = write(tmp_path / "texts", FILES)
    index = stack.Index.build(trainer, path, passage_tokens=24, overlap=6)
    for width in (32, 8):
        index = stack.Index.build(trainer, path, passage_tokens=24, overlap=6, width=width)
        (hits,) = index.search("Würfel", top=1000)
        assert len(hits) == len(index) > 8
        for hit in hits:
            text = FILES[hit.file].removeprefix("\ufeff")
            assert hit.text == text[hit.start : hit.end] == hit.text.strip()
            assert hit.line == text.count("\n", 0, hit.start) + 1
        run = trainer.program, trainer.trained, ByteTokenizer()
        (query,) = (each["query_vector"][:width] for each in predict(*run, [{"query": "Würfel"}]))
        answers = predict(*run, [{"passage": hit.text} for hit in hits])
        made = [np.array(each["passage_vector"][:width]) for each in answers]
        cosines = [one @ query / np.linalg.norm(one) / np.linalg.norm(query) for one in made]
        np.testing.assert_allclose([hit.score for hit in hits], cosines, atol=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_only_what_has_changed_is_embedded_anew(trainer, tmp_path, embedded):
    path, kept = write(tmp_path / "texts", FILES), str(tmp_path / "index")
    options: dict[str, Any] = {"passage_tokens": 24, "overlap": 6}
    number = len(stack.Index.build(trainer, path, folder=kept, **options))
    assert len(embedded) == number
    embedded.clear()
    stack.Index.build(trainer, path, folder=kept, **options)
    assert embedded == []
    write(tmp_path / "texts", {"new.md": "Neues.", "two/deep.py": "other = 1\n"})
    (tmp_path / "texts" / "three.txt").unlink()
    (tmp_path / "texts" / "one.md").rename(tmp_path / "texts" / "moved.md")
    index = stack.Index.build(trainer, path, folder=kept, **options)
    assert sorted(embedded) == ["Neues.", "other = 1"]
    assert {hit.file for hit in index.search("x", top=99)[0]} == {"moved.md", "new.md", "two/deep.py"}
    fresh = stack.Index.build(trainer, path, folder=str(tmp_path / "fresh"), **options)
    np.testing.assert_allclose(index.stored.vectors, fresh.stored.vectors, atol=1e-6)
    assert [each.passages for each in index.stored.entries] == [
        each.passages for each in fresh.stored.entries
    ]
    np.testing.assert_array_equal(np.load(tmp_path / "index" / VECTORS), index.stored.vectors)


def test_an_index_of_other_weights_is_not_used(trainer, tmp_path, embedded):
    path, kept, told = write(tmp_path / "texts", FILES), str(tmp_path / "index"), []
    first = stack.Index.build(trainer, path, folder=kept)
    before = first.stored.vectors.copy()
    embedded.clear()
    second = stack.Index.build(trained(tmp_path, seed=1), path, folder=kept, tell=told.append)
    assert len(embedded) == len(second)
    assert "with other weights; it is built anew" in told[0]
    assert abs(before - second.stored.vectors).max() > 0.1


@pytest.mark.parametrize("damage", [*(VECTORS, TEXTS, DOCUMENTS, MANIFEST), "cut", "gone"])
def test_what_is_damaged_is_named_and_built_anew(trainer, tmp_path, embedded, damage):
    path, kept, told = write(tmp_path / "texts", FILES), tmp_path / "index", []
    expected = stack.Index.build(trainer, path, folder=str(kept)).search("Würfel", top=9)
    name = damage if (kept / damage).exists() else VECTORS
    if damage == "gone":
        (kept / name).unlink()
    else:
        data = bytearray((kept / name).read_bytes())
        data[-3] ^= 1
        (kept / name).write_bytes(data[:-1] if damage == "cut" else data)
    embedded.clear()
    index = stack.Index.build(trainer, path, folder=str(kept), tell=told.append)
    (line,) = told
    assert name in line
    assert "damaged" in line
    # The last document alone, where its vectors or text are what is damaged.
    assert {*embedded} < {hit.text for hit in expected[0]} or damage not in (VECTORS, TEXTS)
    assert embedded
    for hit, before in zip(index.search("Würfel", top=9)[0], expected[0], strict=True):
        assert (hit.file, hit.text) == (before.file, before.text)
        assert hit.score == pytest.approx(before.score, abs=1e-6)
    embedded.clear()
    stack.Index.build(trainer, path, folder=str(kept), tell=told.append)
    assert (embedded, len(told)) == ([], 1)


def test_a_build_that_was_interrupted_goes_on(trainer, tmp_path, embedded, monkeypatch):
    texts = [f"text number {number}" for number in range(6)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    add = Building.add

    def interrupted(self, *document):
        if len(self.entries) == 4:
            raise KeyboardInterrupt
        add(self, *document)

    with monkeypatch.context() as patch:
        patch.setattr(Building, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stack.Index.build(trainer, str(file), folder=str(tmp_path / "index"))
    with (tmp_path / "index.building" / VECTORS).open("r+b") as cut:
        cut.truncate(cut.seek(0, 2) - 1)  # The last one was not written as a whole.
    embedded.clear()
    index = stack.Index.build(trainer, str(file), folder=str(tmp_path / "index"))
    assert embedded == texts[3:]
    fresh = stack.Index.build(trainer, str(file), folder=str(tmp_path / "fresh"))
    np.testing.assert_allclose(index.stored.vectors, fresh.stored.vectors, atol=1e-6)
    assert not (tmp_path / "index.building").exists()


def test_records_are_documents_with_their_names(trainer, tmp_path):
    file, told = tmp_path / "texts.jsonl", []
    records = [{"text": "eins 😀 zwei\ndrei", "id": "a"}, {"text": " "}, {"text": "vier", "id": 7}]
    file.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    (hits,) = stack.Index.build(trainer, str(file), tell=told.append).search("eins", top=5)
    lines = {(hit.id, hit.line, hit.start, hit.end, hit.text) for hit in hits}
    assert lines == {("a", 1, 0, 16, "eins 😀 zwei\ndrei"), (7, 5, 0, 4, "vier")}
    assert told == ["left out  1 records of texts.jsonl, without text"]


def test_another_run_orders_what_was_found(trainer, tmp_path):
    index = stack.Index.build(trainer, write(tmp_path / "texts", FILES), passage_tokens=24)
    second = trained(tmp_path, objective={"kind": "reranking"}, data=TREE["data"] | {"sequence_length": 40})
    (first,), (hits,) = (index.search("Würfel", top=6, rerank=other) for other in (None, second))
    assert {hit.text for hit in hits} == {hit.text for hit in first}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    short = [hit for hit in hits if len(hit.text.encode()) < 28]
    record = {"query": "Würfel", "passages": [hit.text for hit in short[:1]]}
    (answer,) = predict(second.program, second.trained, ByteTokenizer(), [record])
    assert short[0].score == pytest.approx(answer["scores"][0], abs=1e-5)


def test_a_graph_of_neighbours_finds_nearly_all(tmp_path):
    pytest.importorskip("faiss").omp_set_num_threads(1)
    told: list[str] = []
    vectors = search.normalized(np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32))
    queries, file = vectors[:50] + 0.1, tmp_path / "hnsw-16.faiss"
    mesh = meshes.build(MeshConfig(), jax.devices()[:1])
    expected = nearest(Exact(mesh, vectors), vectors, queries, 10).numbers
    for change in (None, "kept", "damaged"):
        if change == "damaged":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        before = file.stat().st_mtime_ns if file.exists() else None
        found = nearest(Approximate(vectors, file, told.append), vectors, queries, 10).numbers
        recall = np.mean(
            [len({*a} & {*b}) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
        )
        assert recall > 0.98
        assert (file.stat().st_mtime_ns == before) == (change == "kept")
    assert told == [f"{file} is damaged; it is built anew"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"width": 9}, "--width 9 is neither the whole, 32, nor one of objective.widths (8)"),
        (
            {"passage_tokens": 63},
            "--passage 63: a passage has 16 to 62 tokens, which fit data",
        ),
        ({"passage_tokens": 20, "overlap": 11}, "--overlap 11: passages of 20 tokens share 0 to 10"),
        ({"path": "gone"}, "gone: there is no such folder or file; give the path of one"),
        ({"path": "gone.jsonl"}, "gone.jsonl: there is no such file"),
        ({"files": {"a.bin": "x"}}, "no file in it is a text by its name"),
        ({"files": {"a.md": " \n"}}, "no text is in it"),
        (
            {"path": "a.jsonl", "files": {"a.jsonl": '{"text": "x"}\n{"body": 1}'}},
            ":2: no field 'text'",
        ),
        ({"path": "a.jsonl", "files": {"a.jsonl": '{"text": "x", "id": []}'}}, ":1: its id is a list"),
        ({"folder": "."}, "is no folder of an index: it holds a.md; give a new one"),
        (
            {"objective": {"kind": "classification", "labels": ["a", "b"]}},
            "search takes one of",
        ),
    ],
)
def test_what_cannot_be_searched_is_told(trainer, tmp_path, options, told):
    write(tmp_path, options.pop("files", {"a.md": "text"}))
    path = str(tmp_path / options.pop("path", ""))
    if "objective" in options:
        trainer = trained(tmp_path / "other", objective=options.pop("objective"))
    if "folder" in options:
        options["folder"] = str(tmp_path / options["folder"])
    with pytest.raises(StackError, match=re.escape(told)):
        stack.Index.build(trainer, path, **options)


def test_what_cannot_be_looked_for_is_told(trainer, tmp_path):
    index = stack.Index.build(trainer, write(tmp_path, {"a.md": "text"}))
    with pytest.raises(ConfigError, match="--top 0: ask for one passage at least"):
        index.search("x", top=0)
    with pytest.raises(StackError, match="one of its texts is empty"):
        index.search(" ")
    with pytest.raises(StackError, match="the query: 102 tokens"):
        index.search("x" * 100)
    with pytest.raises(ConfigError, match=r"it takes one of objective.kind=reranking"):
        index.search("x", rerank=trainer)


@given(
    st.text(alphabet=st.sampled_from("ab .\n\r\t😀ß日"), max_size=300),
    st.integers(16, 40),
    st.integers(0, 8),
)
@settings(deadline=None, max_examples=60)
def test_passages_hold_all_of_a_text_but_white_space(text, tokens, overlap):
    passages = cut(text, ByteTokenizer(), tokens=tokens, overlap=overlap)
    read = np.zeros(len(text), bool)
    for start, end in passages:
        assert text[start:end] == text[start:end].strip() != ""
        assert len(text[start:end].encode()) <= tokens
        read[start:end] = True
    assert not "".join(letter for letter, is_read in zip(text, read, strict=True) if not is_read).strip()
    assert all(b[0] > a[0] and b[1] > a[1] for a, b in pairwise(passages))
    shared = [len(text[b[0] : a[1]].encode()) for a, b in pairwise(passages)]
    assert max(shared, default=0) <= overlap + 3  # A letter has up to 4 bytes.


def test_passages_end_with_a_paragraph_or_a_sentence():
    text = "One two three four.\n\nFive six. Seven eight nine ten eleven"
    made = [text[start:end] for start, end in cut(text, ByteTokenizer(), tokens=30, overlap=6)]
    assert made == ["One two three four.", "Five six. Seven eight nine", "nine ten eleven"]


def test_the_command_line_shows_and_writes_hits(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "from_run", lambda *_, **__: trainer)
    path = write(tmp_path / "texts", FILES)
    command = ["search", "tiny", "--documents", path, "--index", f"{tmp_path}/index", "--top", "1"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Würfel\n\n{'x' * 99}\nfällt"))
    assert main(command) == 0
    told = capsys.readouterr()
    assert [line.split()[1] for line in told.out.splitlines() if line.startswith("query")] == [
        "Würfel",
        "fällt",
    ]
    assert len(re.findall(rf"^   1  \d\.\d{{4}}  {path}/\S+:\d+  \[\d+:\d+\]$", told.out, re.MULTILINE)) == 2
    assert "error: the query: 101 tokens" in told.err
    asked, found = tmp_path / "asked.jsonl", tmp_path / "found.jsonl"
    asked.write_text('{"query": "Würfel", "n": 1}\n{"query": "fällt"}\n')
    assert main([*command, "--queries", str(asked), "--output", str(found)]) == 0
    first, second = map(json.loads, found.read_text().splitlines())
    (hit,) = first["hits"]
    assert Path(hit["file"]).read_bytes().decode("utf-8-sig")[hit["start"] : hit["end"]] == hit["text"]
    assert (first["n"], second["query"]) == (1, "fällt")
    capsys.readouterr()
    for options, words in (
        (["--queries", str(asked)], "--queries FILE and --output FILE belong together"),
        (["--queries", str(asked), "--output", str(found)], "is there already; remove it"),
        (
            ["--query", "a", "--queries", str(asked), "--output", "b"],
            "--query and --queries: give one of them",
        ),
    ):
        assert main([*command, *options]) != 0
        assert words in capsys.readouterr().err


@pytest.mark.full
def test_every_mesh_finds_the_same(trainer, tmp_path):
    path = write(tmp_path / "texts", FILES)
    other = trained(tmp_path, devices=8, mesh={"data": 2, "fsdp": 2, "tensor": 2, "zero": 3})
    (one,), (many,) = (
        stack.Index.build(each, path, passage_tokens=24).search("Würfel", top=9) for each in (trainer, other)
    )
    assert [hit.text for hit in many] == [hit.text for hit in one]
    np.testing.assert_allclose([hit.score for hit in many], [hit.score for hit in one], atol=1e-5)
