"""The tables know what a word and its neighbours tell of a hidden one, at the places of the evaluation."""

import itertools
import math

import jax
import numpy as np
import pytest

from stack import Trainer
from stack.config import Config, MaskedWordsConfig, dump, parse
from stack.config.errors import ConfigError
from stack.data.loader import heldout_batches, heldout_rows
from stack.data.tokenizer import ByteTokenizer
from stack.evaluation.tables import Hidden, Tables, adjacent, look, score_tables
from stack.objectives.masked_words import FIELDS, MaskedExamples
from stack.train.watch.listeners import Listener

MASK, SIZE = 257, 361


def examples(**options) -> MaskedExamples:
    return MaskedExamples(MaskedWordsConfig(**options), ByteTokenizer(), mask=MASK)


def tables(text, **options) -> Tables:
    return Tables([(text, np.stack([text[:-1], text[1:]], axis=1))], SIZE, examples(**options))


def hidden(text, shown=MASK) -> Hidden:
    """Every word of a text but the ends, each hidden by itself."""
    middle = text[1:-1]
    return Hidden(word=middle, shown=np.full_like(middle, shown), left=text[:-2], right=text[2:])


def mean(scores, name, count):
    loss, accuracy = scores[name] / count
    return loss, accuracy


def chain(draw, transitions, length):
    state, states = 0, []
    cumulative = transitions.cumsum(axis=1)
    for number in draw.random(length):
        state = int(np.searchsorted(cumulative[state], number))
        states.append(min(state, len(transitions) - 1))
    return np.array(states, np.int32)


def test_of_a_chain_the_pairs_tell_what_the_chain_tells() -> None:
    """The entropy of a state between its neighbours, and of a state by itself, of the true probabilities."""
    draw = np.random.default_rng(0)
    transitions = draw.dirichlet(np.full(5, 0.4), 5)
    stationary = np.linalg.matrix_power(transitions, 1000)[0]
    path = stationary[:, None, None] * transitions[:, :, None] * transitions[None]  # [before, word, after]
    between = -(path * np.log(path / path.sum(axis=1, keepdims=True))).sum()
    likeliest = path.max(axis=1).sum()
    train, text = chain(draw, transitions, 60_000), chain(draw, transitions, 20_000)
    scores = tables(train).score(hidden(text))
    count = len(text) - 2
    loss, accuracy = mean(scores, "bigram", count)
    assert loss == pytest.approx(between, rel=0.02)
    assert accuracy == pytest.approx(likeliest, rel=0.02)
    loss, accuracy = mean(scores, "unigram", count)
    assert loss == pytest.approx(-(stationary * np.log(stationary)).sum(), rel=0.02)
    assert accuracy == pytest.approx(stationary.max(), rel=0.02)


def test_a_neighbour_that_is_not_known_tells_nothing() -> None:
    text = np.tile(np.arange(97, 105, dtype=np.int32), 500)
    table, alone = tables(text), hidden(text)
    unknown = np.full_like(alone.left, -1)
    both = mean(table.score(alone), "bigram", len(alone.word))
    assert both == pytest.approx((0, 1), abs=0.02)
    for change in ({"left": unknown}, {"right": unknown}):
        one = Hidden(**{**vars(alone), **change})
        assert mean(table.score(one), "bigram", len(one.word)) == pytest.approx((0, 1), abs=0.1)
    none = Hidden(**{**vars(alone), "left": unknown, "right": unknown})
    loss, _ = mean(table.score(none), "bigram", len(none.word))
    assert loss == pytest.approx(mean(table.score(none), "unigram", len(none.word))[0])
    assert loss == pytest.approx(math.log(8), rel=0.05)  # By one more of each word.


def test_a_word_that_is_shown_is_itself_as_often_as_the_objective_says() -> None:
    """Of what is not masked half is the word itself and half a random one of 256."""
    text = np.random.default_rng(0).integers(0, 256, 6000).astype(np.int32)
    table = tables(text)
    shown = Hidden(**{**vars(hidden(text)), "shown": text[1:-1]})
    loss, accuracy = mean(table.score(shown), "unigram", len(shown.word))
    assert accuracy == 1
    assert loss == pytest.approx(-math.log((0.1 + 0.1 / 256) / 0.2), rel=0.02)
    masked_only = tables(text, mask_rate=1.0, random_rate=0.0)
    assert mean(masked_only.score(hidden(text)), "unigram", 5998)[0] == pytest.approx(math.log(256), rel=0.02)


def test_words_and_pairs_that_were_never_seen_have_a_finite_cost() -> None:
    table = tables(np.tile(np.array([1, 2], np.int32), 50))
    text = np.array([1, 2, 9, 200, 7, 1, 3, 256], np.int32)
    losses = [mean(table.score(hidden(text)), name, 6)[0] for name in ("unigram", "bigram")]
    assert all(2 < loss < 20 for loss in losses)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trainer:
    return Trainer(tiny(tmp_path_factory.mktemp("tables"), "run"), devices=jax.devices()[:1])


def test_pairs_are_of_one_text(run) -> None:
    train = run.data.train
    rows = train.read(np.arange(train.num_rows), [f for f in FIELDS if f.name in ("tokens", "segments")])
    words, pairs = [], []
    for tokens, segments in zip(rows["tokens"], rows["segments"], strict=True):
        for text in range(1, segments.max() + 1):
            some = tokens[segments == text].tolist()
            words += some
            pairs += itertools.pairwise(some)
    here, beside = (np.concatenate(parts) for parts in zip(*adjacent(train), strict=True))
    assert sorted(here.tolist()) == sorted(words)
    assert sorted(map(tuple, beside.tolist())) == sorted(pairs)


def test_what_is_beside_a_hidden_word_is_of_its_text_and_not_hidden() -> None:
    batch = {
        "tokens": np.array([[5, MASK, 7, 8, MASK, MASK]]),
        "segments": np.array([[1, 1, 1, 2, 2, 3]]),
        "masked": np.array([[1, 2, 4, 5, 0]]),
        "labels": np.array([[6, 9, 4, 3, -1]]),
    }
    seen = look(batch, MASK)
    assert seen.word.tolist() == [6, 9, 4, 3]
    assert seen.shown.tolist() == [MASK, 7, MASK, MASK]
    assert seen.left.tolist() == [5, -1, 8, -1]
    assert seen.right.tolist() == [7, -1, -1, -1]


def tiny(folder, name, *overrides) -> Config:
    return Config.model_validate(
        {
            "name": name,
            "output_dir": str(folder),
            "model": {"kind": "encoder", "vocab_size": 361, "max_length": 32, "num_layers": 1}
            | {"embed_dim": 16, "num_heads": 2, "dtype": "float32"},
            "objective": {"kind": "masked_words"},
            "data": {"sources": [{"kind": "synthetic", "max_bytes": 20_000}], "sequence_length": 32}
            | {"heldout_fraction": 0.1, "cache_dir": str(folder / "cache")},
            "train": {"steps": 1, "batch_size": 8},
            "optimizer": {"schedule": {"warmup_steps": 0}},
            "eval": {"baselines": True},
        }
    ).replace(*overrides)


class Summary(Listener):
    def on_end(self, summary) -> None:
        self.summary = summary


def test_they_are_asked_what_the_model_is_asked(run) -> None:
    """The very arrays of the evaluation's batches, every hidden word once."""
    held = run.data.heldout
    make, number = heldout_batches(held, fields=FIELDS, batch_size=8, layout=run.program.layout)
    assert number > 1
    for batch in range(number):
        rows = np.arange(8 * batch, min(8 * batch + 8, held.num_rows))
        here, theirs = heldout_rows(held, FIELDS, rows), make(batch)
        for name in ("tokens", "labels", "masked", "segments"):
            np.testing.assert_array_equal(np.asarray(theirs[name])[: len(rows)], here[name])
    scores = score_tables(run.config, run.data)
    assert 1 < scores["bigram"].loss < scores["unigram"].loss < math.log(256)
    assert scores["bigram"].accuracy >= scores["unigram"].accuracy
    some = score_tables(run.config.replace("eval.batches=1"), run.data)["bigram"].loss
    assert some != scores["bigram"].loss
    assert some == pytest.approx(scores["bigram"].loss, rel=0.2)


@pytest.mark.full
def test_they_stand_beside_the_loss_of_the_same_hidden_words(tmp_path) -> None:
    """A model of one step is no better than a table."""
    listener = Summary()
    trainer = Trainer(tiny(tmp_path, "run"), devices=jax.devices()[:1], listeners=[listener])
    trainer.fit(progress=False)
    told = listener.summary
    assert told["unigram_loss"] < told["loss"]
    rows = dict(told["rows"])
    for name, score in score_tables(trainer.config, trainer.data).items():
        assert told[f"{name}_loss"] == score.loss
        assert rows[name] == f"{score.loss:.4f} nats per token, {score.accuracy:.1%} right, to compare"


def test_an_objective_without_them_refuses_them() -> None:
    tree = {
        "model": {"vocab_size": 361},
        "objective": {"kind": "fill_in_middle"},
        "eval": {"baselines": True},
    }
    told = (
        r"baselines=true: objective\.kind=fill_in_middle has none; remove it, or set .* to causal or masked_w"
    )
    with pytest.raises(ConfigError, match=told):
        Config(**tree)


def test_the_older_name_of_the_field_is_read(tmp_path) -> None:
    for text, value in (("eval: {trigram: true}", True), ("eval: {trigram: false}", False)):
        assert parse(text).eval.baselines is value
        assert "trigram" not in dump(parse(text))
    assert parse("eval: {baselines: true}", ["eval.trigram=false"]).eval.baselines is False
    assert tiny(tmp_path, "run").replace("eval.trigram=false").eval.baselines is False
    with pytest.raises(ConfigError, match=r"eval\.baselines.*3"):
        parse("eval: {trigram: 3}")
