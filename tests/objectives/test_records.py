"""Records: what answers is predicted and nothing else, as transformers has it; others are told."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.config import Config, ConfigError, StackError
from stack.data import open_data
from stack.data.records import Record
from stack.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from stack.inference.text import encode_prompts
from stack.objectives import build
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import eval_step

SAYS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOLDEN = json.loads(Path(__file__).parents[1].joinpath("goldens", "chat.json").read_text("utf-8"))


def config(folder: object = "nowhere", *, length: int = 64, kind: str = "completion", **changes) -> Config:
    tree = {
        "model": {"vocab_size": 512, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "dtype": "float32"},
        "objective": {"kind": kind, **changes.pop("objective", {})},
        "data": {
            "sources": [{"kind": "jsonl", "path": f"{folder}/rows.jsonl", "field": None}],
            "sequence_length": length,
            "heldout_fraction": 0.0,
            "cache_dir": f"{folder}/cache",
            "shuffle": False,
            **changes.pop("data", {}),
        },
        "train": {"batch_size": 2},
        **changes,
    }
    return Config(**tree)


def encoder(kind: str = "completion", tokenizer=None, **changes) -> Any:
    return build(config(kind=kind, **changes)).examples(tokenizer or ByteTokenizer()).encoder


def encode(record: object, place: str = "here:1", **changes) -> Any:
    made = encoder(**changes)([Record.at(json.dumps(record), place)])[0]
    return made[0] if made else None


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """Of each of the golden's templates."""
    made = {}
    for each in GOLDEN["conversations"]:
        folder = tmp_path_factory.mktemp(each["name"])
        (folder / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
        marks = {name: each[name] for name in ("bos_token", "eos_token")}
        (folder / "tokenizer_config.json").write_text(json.dumps(marks | {"chat_template": each["template"]}))
        made[each["name"]] = load_tokenizer(str(folder / "tokenizer.json"))
    return made


@given(st.text(), st.text().filter(str.strip))
def test_what_completes_and_the_end_are_marked(prompt, completion):
    if not (prompt + completion).isprintable():
        prompt, completion = "", "ab"
    record = encode({"prompt": prompt, "completion": completion}, length=1000)
    text = ByteTokenizer().decode(record.tokens)
    assert text == prompt + completion
    written = len(completion.encode())
    np.testing.assert_array_equal(record.marks, [0] * (1 + len(prompt.encode())) + [1] * (written + 1))


@pytest.mark.parametrize("number", range(len(GOLDEN["conversations"])))
def test_a_conversation_is_that_of_transformers(chat_tokenizer, number):
    golden = GOLDEN["conversations"][number]
    tokenizer = chat_tokenizer[golden["name"]]
    record = encode({"messages": golden["messages"]}, kind="chat", tokenizer=tokenizer, length=256)
    ids, said = golden["ids"], golden["said"]
    if ids[0] == tokenizer.bos:  # Which every document of ours begins with.
        ids, said = ids[1:], said[1:]
    if ids[-1] == tokenizer.eos:  # And ends with.
        ids, said = ids[:-1], said[:-1]
    assert record.tokens.tolist() == ids
    assert record.marks.tolist() == [0, *said, golden["said"][-1]]
    objective = build(config(kind="chat"))
    (asked,) = encode_prompts(tokenizer, [golden["messages"][0]["content"]], objective)
    start = [] if golden["ask"].startswith(golden["bos_token"]) else [tokenizer.bos]
    assert asked == [*start, *tokenizer.encode_batch([golden["ask"]], marks=True)[0]]


def test_a_template_stays_with_its_tokenizer(chat_tokenizer, tmp_path):
    before = chat_tokenizer["turns"]
    before.save(tmp_path)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).chat_template == before.chat_template


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twelve records of one to twelve words, as rows."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [{"prompt": "p" * n, "completion": "c" * (13 - n)} for n in range(1, 13)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = config(folder)
    objective = build(settings)
    return settings, objective, open_data(settings, examples=objective.examples, show_progress=False)


def test_rows_hold_every_record_once_and_predict_what_is_marked(rows):
    _, objective, data = rows
    numbers = np.arange(-1, data.train.num_rows)
    draws = np.zeros((len(numbers), 3), np.int64)
    batch = data.train.examples.read(data.train, numbers, draws, objective.fields)
    assert (batch["labels"][0] == -1).all(), "a row of padding"
    texts = []
    for row in range(1, len(numbers)):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            tokens, labels = batch["tokens"][row][here], batch["labels"][row][here]
            prompt = int((labels == -1).sum())
            assert tokens[0] == 256
            assert set(tokens[1 : prompt + 1].tolist()) == {ord("p")}
            assert labels[prompt:].tolist() == [*[ord("c")] * (13 - prompt), 256]
            texts.append(prompt)
    assert sorted(texts) == list(range(1, 13))


def test_the_loss_is_that_of_the_marked_tokens(rows):
    settings, objective, data = rows
    program = programs.build(settings, jax.devices()[:1])
    with meshes.use(program.mesh):
        params = states.init_params(program)
        numbers = np.array([0, -1])
        draws = np.zeros((2, 3), np.int64)
        batch = dict(data.train.examples.read(data.train, numbers, draws, objective.fields))
        batch["example"] = np.arange(2, dtype=np.int32)
        model = program.merge(params)
        output = model({name: jax.numpy.asarray(value) for name, value in batch.items()}, program.execution())
        sums, _ = jax.jit(partial(eval_step, program))(params, batch)
    scores = np.asarray(output.hidden, np.float64) @ np.asarray(output.table, np.float64).T
    scores = scores[..., : settings.model.vocab_size]
    log_sum = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    labels = batch["labels"]
    places = labels >= 0
    expected = (
        log_sum[places] - np.take_along_axis(scores, labels.clip(0)[..., None], -1)[..., 0][places]
    ).sum()
    assert float(sums["tokens"]) == places.sum()
    np.testing.assert_allclose(float(sums["nll"]), expected, rtol=1e-5)


def test_long_records_are_refused_left_out_or_cut():
    record = {"prompt": "a" * 6, "completion": "b" * 6}
    assert len(encode(record, length=13).tokens) == 12
    with pytest.raises(StackError, match=r"here:1: 12 tokens, .* has room for 11; .* objective.too_long"):
        encode(record, length=12)
    assert encode(record, length=12, objective={"too_long": "leave_out"}) is None
    cut = encode(record, length=12, objective={"too_long": "cut"})
    assert cut.tokens.tolist() == list(b"aaaaaabbbbb")
    assert cut.marks.tolist() == [0] * 7 + [1] * 5 + [0]
    assert encode(record, length=6, objective={"too_long": "cut"}) is None, "nothing of it is predicted"


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        ("completion", {"completion": "b"}, ["here:1", "fields present: completion; set objective.prompt"]),
        ("completion", {"prompt": "a", "completion": " "}, ["here:1", "empty"]),
        ("completion", {"prompt": 3, "completion": "b"}, ["here:1", "'prompt'", "int"]),
        ("chat", {"text": "a"}, ["here:1", "'messages'", "fields present: text", "objective.messages"]),
        ("chat", {"messages": []}, ["here:1", "an empty list", "objective.messages"]),
        ("chat", {"messages": None}, ["here:1", "NoneType", "objective.messages"]),
        (
            "chat",
            SAYS | {"messages": [{**SAYS["messages"][0], "calls": [{"name": "<|turn|>"}]}]},
            ["<|turn|>"],
        ),
        ("chat", {"messages": [{"role": "user", "content": "\ud83d"}]}, ["message 0", "surrogate"]),
        ("chat", {"messages": [{"role": "user"}]}, ["here:1", "message 0", "content"]),
        (
            "chat",
            {"messages": [{"role": "user", "content": "a"}]},
            ["here:1", "no message of role assistant"],
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": "a<|end|>"}, {"role": "assistant", "content": "b"}]},
            ["here:1: message 0", "'<|end|>'", "remove it"],
        ),
    ],
)
def test_a_record_that_cannot_be_read_is_told_with_its_place(chat_tokenizer, kind, record, words):
    with pytest.raises(StackError) as told:
        encode(record, kind=kind, tokenizer=chat_tokenizer["turns"])
    for word in words:
        assert word in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        (None, ConfigError, ["no chat template", "chat_template.jinja"]),
        ("{% if %}", ConfigError, ["line 1"]),
        ("{{ messages[9].content }}", StackError, ["here:1", "template fails"]),
        ("{{ raise_exception('never') }}", StackError, ["here:1", "never"]),
        ("{{ messages | length }}{{ messages[0].content }}", StackError, ["here:1", "another way"]),
        ("{{ ''.__class__.__mro__ }}", StackError, ["here:1", "template fails"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", StackError, ["here:1", "template fails"]),
        ("{{ messages | length | dictsort }}", StackError, ["here:1", "template fails"]),
        ("{% set x = 'a' * 10000000000000 %}", StackError, ["here:1", "template fails: MemoryError"]),
    ],
)
def test_a_template_that_fails_is_told(chat_tokenizer, tmp_path, template, error, words):
    chat_tokenizer["turns"].save(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(error) as told:
        encode(conversation, kind="chat", tokenizer=load_tokenizer(str(tmp_path / "tokenizer.json")))
    for word in words:
        assert word in str(told.value)


def test_a_broken_line_is_told_with_its_number(tmp_path):
    lines = [json.dumps({"prompt": "a", "completion": "b"})] * 3 + ['{"prompt": "a"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings = config(tmp_path)
    with pytest.raises(StackError, match=r"rows\.jsonl:4: no field 'completion'"):
        open_data(settings, examples=build(settings).examples, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "causal"}, ["data.sources.0.field=null", "name the field"]),
        (
            {"data": {"sources": [{"kind": "jsonl", "path": "x", "field": None, "min_characters": 2}]}},
            ["data.sources.0", "min_characters", "remove them"],
        ),
        ({"data": {"sources": [{"kind": "python"}]}}, ["data.sources.0", "jsonl or arrayrecord or hf"]),
        ({"data": {"sources": [{"kind": "jsonl", "path": "x"}]}}, ["data.sources.0", "field=null"]),
    ],
)
def test_objectives_and_sources_must_agree(changes, words):
    with pytest.raises(ConfigError) as told:
        config(**changes)
    for word in words:
        assert word in str(told.value)


def test_a_tokenizer_is_trained_on_texts_and_not_on_records(tmp_path):
    with pytest.raises(ConfigError, match="name its field"):
        train_bpe(config(tmp_path).data, 300, tmp_path / "tokenizer.json")


def test_another_way_of_reading_is_told_by_the_fingerprint(rows):
    settings, _, data = rows
    other = settings.replace("objective.too_long=cut")
    again = open_data(other, examples=build(other).examples, show_progress=False)
    assert {name for name in again.fingerprint if again.fingerprint[name] != data.fingerprint[name]} == {
        "records"
    }


@pytest.mark.parametrize(("number", "sides"), [(2, (1, 1)), (7, (6, 1)), (40, (39, 1))])
def test_a_record_lies_on_one_side(tmp_path, number, sides):
    """Where none is held out by its hash, the last ones are, whole."""
    lines = [{"prompt": f"which {n}? ", "completion": "this " * (1 + n % 5)} for n in range(number)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = config(tmp_path, data={"heldout_fraction": 1e-9}, train={"batch_size": 1})
    objective = build(settings)
    data = open_data(settings, examples=objective.examples, show_progress=False)
    assert (data.train.num_documents, data.heldout.num_documents) == sides
    assert any("the last records are held out" in note for note in data.notes)
    for side in (data.train, data.heldout):
        for row in range(side.num_rows):
            pairs = zip(side.pieces(row), side.marks(row), strict=True)
            assert all(tokens[0] == 256 and marks[-1] == 1 and marks[0] == 0 for tokens, marks in pairs)


def test_one_record_cannot_lie_on_both_sides(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    settings = config(tmp_path, data={"heldout_fraction": 0.01}, train={"batch_size": 1})
    with pytest.raises(ConfigError, match="there is but one; add records, or set it to 0"):
        open_data(settings, examples=build(settings).examples, show_progress=False)


def test_records_that_are_all_too_long_are_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 80, "completion": "b"}))
    settings = config(tmp_path, objective={"too_long": "leave_out"}, train={"batch_size": 1})
    with pytest.raises(StackError, match=r"no record with something to predict in data\.sequence_length"):
        open_data(settings, examples=build(settings).examples, show_progress=False)
