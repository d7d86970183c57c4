"""Preferences on every layout: loss and gradients of one device, of pairs that no device has all of."""

from collections.abc import Sequence
from functools import cache
from statistics import mean

import numpy as np
import pytest

from stack.data.fields import Field
from stack.doctor.numerics import (
    BFLOAT16_RATIO,
    LIMIT,
    ONE_DEVICE,
    STEP,
    Family,
    Numbers,
    cells,
    compute,
    distance,
    errors,
)

LENGTH, BATCH, ANSWERS, WORDS = 16, 16, 8, 101
OVERRIDES = (
    "init_from=somewhere",
    "data.sources=[{kind: jsonl, path: somewhere, field: null}]",
    # Several chunks, of 8 tokens and of more.
    "objective={kind: preference, beta: 0.5, label_smoothing: 0.1, z_loss: 0, logits_bytes: 3328}",
)
EVERYDAY = {"gpt": "fsdp zero 3 + tensor sequence parallel", "llama": "fsdp zero 1 + accumulation"}
PAIRS = {"data + fsdp zero 3", "tensor + accumulation", *EVERYDAY.values()}
PARTS = {"data", "fsdp zero 1", "fsdp zero 2", "fsdp zero 3", "tensor"}
CELLS = {cell.name: cell for cell in cells() if cell.name in PARTS | PAIRS}


def pairs(fields: Sequence[Field]) -> dict[str, np.ndarray]:
    """Rows of none to four pairs, of uneven numbers of labels."""
    random = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {
        field.name: np.full(
            (BATCH, {"length": LENGTH, "answers": ANSWERS}[field.axes[1]]), field.padding, field.dtype
        )
        for field in fields
        if len(field.axes) > 1
    }
    batch["example"] = np.arange(BATCH, dtype=np.int32)
    for row in range(BATCH):
        number = 2 * (row % 5)
        if not number:
            continue
        spare = random.multinomial(max(0, LENGTH - 2 * number - row % 2), np.full(number, 1 / number))
        lengths = 2 + spare * (row != 7)
        filled = int(lengths.sum())
        places = np.concatenate([np.arange(length) for length in lengths])
        labels = random.integers(0, WORDS, filled)
        labels[(places == 0) & (random.random(filled) < 0.6)] = -1
        batch["tokens"][row, :filled] = random.integers(0, WORDS, filled)
        batch["labels"][row, :filled] = labels
        batch["segments"][row, :filled] = np.repeat(np.arange(1, number + 1), lengths)
        batch["positions"][row, :filled] = places
        batch["reference"][row, :number] = random.normal(-10.0, 3.0, number)
    return batch


def numbers(name: str, family: Family, dtype: str = "float32", step: int = STEP) -> Numbers:
    cell = ONE_DEVICE if name == "one device" else CELLS[name]
    return compute(cell, family, dtype, overrides=OVERRIDES, step=step, rows_of=pairs)


@cache
def one_device(family: Family, dtype: str = "float32", step: int = STEP) -> Numbers:
    return numbers("one device", family, dtype, step)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=[] if EVERYDAY[family] == name else [pytest.mark.full])
        for family in EVERYDAY
        for name in CELLS
        if family == "gpt" or EVERYDAY[family] == name
    ],
)
def test_loss_and_gradients_equal_one_device(name: str, family: Family):
    expected = one_device(family)
    wrong = {
        leaf: error for leaf, error in errors(numbers(name, family), expected).items() if not error <= LIMIT
    }
    assert not wrong


@pytest.mark.full
@pytest.mark.parametrize("name", ["data + fsdp zero 3", "tensor + accumulation"])
def test_bfloat16_gradients_are_as_good_as_on_one_device(name: str):
    steps = range(STEP, STEP + 3)
    error = mean(
        distance(one_device("gpt", "bfloat16", step), one_device("gpt", step=step)) for step in steps
    )
    assert error < 0.05
    assert distance(numbers(name, "gpt", "bfloat16"), one_device("gpt")) <= BFLOAT16_RATIO * error
