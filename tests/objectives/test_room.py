"""How many places a text takes is known before it is packed, and what decides it names the rows."""

from typing import Any

import numpy as np
import pytest

from stack.config import Config, ConfigError, FillConfig, SpansConfig, StackError
from stack.data import open_data
from stack.data.tokenizer import ByteTokenizer
from stack.objectives import build


def config(kind: str, length: int = 64, **objective: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": 361, "max_length": 4096},
            "objective": {"kind": kind, **objective},
            "data": {"sequence_length": length},
        }
    )


def examples(kind: str, **options) -> Any:
    return build(config(kind, **options)).examples(ByteTokenizer())


def test_options_that_change_the_room_change_the_name_of_the_rows():
    """Rows packed with one are never read with another: the cache would give them."""
    spans = [
        examples("span_corruption", **options).packing for options in ({}, {"rate": 0.3}, {"mean_span": 1.0})
    ]
    sentences = [
        examples("sentence_removal", **options).packing for options in ({}, {"rate": 0.1}, {"shortest": 9})
    ]
    assert len({*spans, *sentences}) == 6
    assert examples("span_corruption", z_loss=0.1, label_smoothing=0.1).packing == spans[0]


def test_rows_of_other_options_are_packed_anew(tmp_path):
    """With those of a lower rate in the cache, a higher one met texts too long for its rows."""
    (tmp_path / "text.txt").write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 30_000))))
    several: tuple[dict[str, Any], ...] = ({"rate": 0.5, "mean_span": 1.0}, {}, {"mean_span": 1.0})
    for options in several:
        tree = config("span_corruption", **options).replace(
            f"data.sources=[{{kind: text, path: {tmp_path}/text.txt}}]",
            f"data.cache_dir={tmp_path}/cache",
            "train.batch_size=2",
        )
        objective = build(tree)
        train = open_data(tree, examples=objective.examples, show_progress=False).train
        draws = np.zeros((train.num_rows, 3), np.int64)
        rows = train.examples.read(train, np.arange(train.num_rows), draws, objective.fields)
        assert (rows["segments"] > 0).mean() > 0.95, options


def test_a_row_that_holds_both_parts_needs_sentinels_for_one_piece():
    """At 2,048 tokens in one row bytes have enough; read alone, a piece of that length would need more."""
    assert examples("span_corruption", length=2048).packing
    with pytest.raises(ConfigError, match=r"rows of 4096 tokens need \d+ words, .* no word '<extra_id_100>'"):
        examples("span_corruption", length=4096)


def test_sentences_leave_room_for_their_marks_alone():
    objective = build(config("sentence_removal", length=512))
    room = examples("sentence_removal", length=512).room(np.array([400]))
    assert room == 400 + 2 * (120 // 4) + 1
    assert objective.sizes == {"length": 512}


@pytest.mark.parametrize("sentinel", ["<s>", "{}{}", "{0}{}", "{}{x}", "<{}>{"])
def test_a_sentinel_without_one_place_for_a_number_is_refused(sentinel):
    with pytest.raises(ConfigError, match="in the place of the number, and no other brace"):
        SpansConfig(sentinel=sentinel)


def test_words_of_the_middle_are_three():
    with pytest.raises(ConfigError, match="must be three different words"):
        FillConfig(prefix_token="<fim_suffix>")


def test_no_label_at_all_is_no_perfect_score():
    objective = build(config("sentence_removal"))
    sums = {"nll": 0.0, "correct": 0.0, "tokens": 0.0}
    with pytest.raises(StackError, match="finds nothing to predict in the held-out rows"):
        objective.evaluate(sums, {}, tokenizer=ByteTokenizer(), num_bytes=None)
