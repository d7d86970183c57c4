"""Likelihoods are those of the model's scores in float64, of every token once, on every mesh."""

import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.cli import main
from stack.config import Config, StackError
from stack.data.tokenizer import ByteTokenizer
from stack.evaluation.likelihood import Continuation, likelihoods, windows
from stack.evaluation.texts import last_words, word_perplexity
from stack.inference.generate import generate
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states

TREE = {
    "model": {
        "vocab_size": 261,
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "max_length": 48,
        "init_std": 0.3,
        "dtype": "float32",
    },
    "data": {"sequence_length": 40},
    "train": {"batch_size": 8},
    "objective": {"logits_bytes": 8 * 261 * 4},
}
ONE = {"data": 1, "fsdp": 1}
TOKENS = np.random.default_rng(0).integers(0, 256, 60).tolist()
ASKED = [
    Continuation(TOKENS[:3], TOKENS[3:5]),
    Continuation(TOKENS[:1], TOKENS[1:40]),
    Continuation(TOKENS[:50], TOKENS[50:60]),  # More context than fits.
    Continuation(TOKENS[:20], TOKENS[20:21]),
]


def made(mesh: dict | None = None, devices: int = 1, **changes: Any) -> tuple[Any, Any]:
    tree = TREE | {"mesh": mesh or ONE} | changes
    program = programs.build(Config.model_validate(tree), jax.devices()[:devices])
    with meshes.use(program.mesh):
        return program, states.init_params(program)


@pytest.fixture(scope="module")
def one() -> tuple[Any, Any]:
    return made()


def scores(program, params, tokens) -> np.ndarray:
    """Log-probabilities of the next word, [length, vocab] float64, of one row without padding."""
    row = np.asarray([tokens], np.int32)
    batch = {"tokens": row, "segments": np.ones_like(row), "positions": np.arange(len(tokens))[None]}
    with meshes.use(program.mesh):
        model = program.merge(params)
        output = model({name: jax.numpy.asarray(each) for name, each in batch.items()}, program.execution())
    hidden, table = np.asarray(output.hidden, np.float64)[0], np.asarray(output.table, np.float64)
    raw = (hidden @ table.T)[:, : program.config.model.vocab_size]
    highest = raw.max(-1, keepdims=True)
    return raw - highest - np.log(np.exp(raw - highest).sum(-1, keepdims=True))


def test_a_likelihood_is_that_of_the_scores_in_float64(one):
    program, params = one
    for (context, tokens), told in zip(ASKED, likelihoods(program, params, ASKED), strict=True):
        whole = [*context, *tokens][-49:]
        log = scores(program, params, whole[:-1])[-len(tokens) :]
        assert told.nll == pytest.approx(-log[np.arange(len(tokens)), tokens].sum(), rel=1e-5)
        assert told.is_greedy == (log.argmax(-1) == tokens).all()


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2, "zero": 3},
        pytest.param({"data": 1, "fsdp": 4, "tensor": 2, "zero": 1}, marks=pytest.mark.full),
    ],
)
def test_every_mesh_tells_the_same(one, mesh):
    program, params = one
    expected = likelihoods(program, params, ASKED)
    program, params = made(mesh, 8)
    told = likelihoods(program, params, ASKED)
    np.testing.assert_allclose([each.nll for each in told], [each.nll for each in expected], rtol=1e-5)
    assert [each.is_greedy for each in told] == [each.is_greedy for each in expected]


def test_what_a_model_writes_at_temperature_0_is_greedy(one):
    program, params = one
    (written,) = generate(program, params, [TOKENS[:5]], length=6)
    right, wrong = (
        Continuation(TOKENS[:5], written),
        Continuation(TOKENS[:5], [*written[:-1], written[-1] ^ 1]),
    )
    assert [each.is_greedy for each in likelihoods(program, params, [right, wrong])] == [True, False]


@given(st.integers(1, 200), st.integers(1, 30), st.data())
def test_each_token_is_scored_once_after_those_before_it(number, length, data):
    stride = data.draw(st.integers(1, length))
    tokens = list(range(number))
    parts = list(windows(tokens, length=length, stride=stride))
    assert [token for part in parts for token in part.tokens] == tokens[1:]
    for part in parts:
        row = [*part.context, *part.tokens]
        assert row == list(range(row[0], row[-1] + 1)), "one run of the text"
        assert len(row) <= length + 1
        assert row[0] == 0 or len(part.context) >= length - stride + 1


@settings(max_examples=5, deadline=None)
@given(st.lists(st.sampled_from(["a", "be", "see", "größe"]), min_size=1, max_size=40))
def test_word_perplexity_is_of_all_tokens_over_words(one, tmp_path_factory, words):
    program, params = one
    text = " ".join(words)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    told = word_perplexity(program, params, ByteTokenizer(), str(path))
    tokens = [256, *text.encode()]
    nll = sum(each.nll for each in likelihoods(program, params, list(windows(tokens, length=40, stride=20))))
    assert (told["words"], told["tokens"]) == (len(words), len(text.encode()))
    assert told["word_perplexity"] == pytest.approx(math.exp(min(nll / len(words), 700)))
    assert told["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()))


def test_the_last_word_is_what_follows_the_last_space(one, tmp_path):
    program, params = one
    path = tmp_path / "passages.jsonl"
    path.write_text('{"text": "one two  three "}\n\n{"text": "größer als"}\n')
    told = last_words(program, params, ByteTokenizer(), str(path))
    asked = [
        Continuation([256, *b"one two"], list(b"  three")),
        Continuation([256, *"größer".encode()], list(b" als")),
    ]
    expected = likelihoods(program, params, asked)
    assert told["passages"] == 2
    assert told["last_word_accuracy"] == sum(each.is_greedy for each in expected) / 2
    nll = sum(each.nll for each in expected) / 2
    assert told["last_word_perplexity"] == pytest.approx(math.exp(nll))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "one"}\n', "passages.jsonl:1: a passage of fewer than two words"),
        ('{"text": "a b"}\n{"body": "a b"}\n', "passages.jsonl:2: no field 'text'"),
        ('{"text": "a b"}\n{', "passages.jsonl:2: not JSON"),
        ("[1]", "passages.jsonl:1: a JSON list"),
        ("", "holds no passage"),
        (b"\xff", "passages.jsonl: the byte at offset 0 is not utf-8"),
        (None, "passages.jsonl: there is no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_line(one, tmp_path, content, words):
    path = tmp_path / "passages.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    program, params = one
    with pytest.raises(StackError, match=re.escape(words)):
        last_words(program, params, ByteTokenizer(), str(path))


def test_what_cannot_be_scored_is_told(one):
    program, params = one
    for asked in (Continuation([], [1]), Continuation([1], []), Continuation([1], [1] * 49)):
        with pytest.raises(StackError, match=r"continuation 0 has .* it takes 1 to 48"):
            likelihoods(program, params, [asked])
    encoder = TREE["model"] | {"kind": "encoder"}
    program, params = made(model=encoder, objective={"kind": "masked_words"})
    with pytest.raises(StackError, match="likelihoods are of decoders"):
        likelihoods(program, params, ASKED)


def test_a_run_is_evaluated_on_files_of_ones_own(tmp_path, capsys):
    from tiny_runs import run

    run(tmp_path, "tiny")
    (tmp_path / "text.txt").write_text("def one(two):\n    return three\n")
    (tmp_path / "lines.txt").write_text("one two three\nfour five\n")
    folder = str(tmp_path / "runs" / "tiny")
    options = ["--words", str(tmp_path / "text.txt"), "--last-words", str(tmp_path / "lines.txt")]
    assert main(["eval", folder, *options]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (told["words"], told["passages"]) == ("4", "2")
    assert float(told["word_perplexity"]) > float(told["token_perplexity"]) > 1
    assert "loss" not in told, "the held-out text was not asked for"
