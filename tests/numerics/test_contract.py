"""Every layout and every pair of layouts gives the numbers of one device."""

from functools import cache
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
import pytest

from stack.doctor.numerics import (
    BFLOAT16_RATIO,
    LIMIT,
    ONE_DEVICE,
    STEP,
    Cell,
    Family,
    Numbers,
    cells,
    compute,
    distance,
    errors,
    numerics,
)

EVERYDAY: dict[Family, set[str]] = {
    "gpt": {"fsdp zero 2", "fsdp zero 1 + stage 1f1b", "second shard + accumulation"},
    "llama": {"data + fsdp zero 3"},
    "palm": {"fsdp zero 3 + tensor sequence parallel"},
    "bert": {"fsdp zero 3 + tensor sequence parallel"},
    "gemma": {"fsdp zero 1 + accumulation"},
    "t5": {"fsdp zero 3 + tensor sequence parallel", "stage 1f1b"},
}
PAIRS = {
    "fsdp zero 1 + accumulation",
    "data + fsdp zero 3",
    "fsdp zero 3 + tensor sequence parallel",
    "tensor + accumulation",
    "fsdp zero 1 + stage 1f1b",
    "tensor sequence parallel + stage zero_bubble",
}
"""Pairs that stand for the others where not all are run. In bfloat16 the rest repeat one of these, or a part
alone, to the digit, as they round the same sums; a family that shares its layers with another has been
through the parts and the other pairs there."""
WHOLE: Family = "gpt"
"""The one that goes through every pair."""
TABLES = {"stage gpipe", "stage interleaved", "stage zero_bubble"}
"""Parts that differ from `stage 1f1b` in their table alone, which knows nothing of the model."""
FEW = [cell for cell in cells() if cell.name in PAIRS or (len(cell.parts) == 1 and cell.name not in TABLES)]


def matrix():
    """Every cell for one family, every part and some pairs for the others; few are for every day."""
    return [
        pytest.param(
            cell,
            family,
            id=f"{family}: {cell.name}",
            marks=[] if everyday(cell, family) else [pytest.mark.full],
        )
        for family in EVERYDAY
        for cell in cells()
        if family == WHOLE or cell in FEW
    ]


def everyday(cell: Cell, family: Family) -> bool:
    return cell.name in EVERYDAY[family]


STEPS = range(STEP, STEP + 4)


@cache
def reference(family: Family, dtype: str = "float32", step: int = STEP) -> Numbers:
    return compute(ONE_DEVICE, family, dtype, step=step)


@pytest.mark.parametrize(("cell", "family"), matrix())
def test_float32_loss_and_gradients_equal_one_device(cell, family):
    numbers, expected = compute(cell, family), reference(family)
    for name, params in expected.params.items():
        np.testing.assert_array_equal(numbers.params[name], params, err_msg=name)
    wrong = {name: error for name, error in errors(numbers, expected).items() if not error <= LIMIT}
    assert not wrong


@pytest.mark.full
@pytest.mark.parametrize(
    ("cell", "family"),
    [
        pytest.param(cell, family, id=f"{family}: {cell.name}")
        for family in EVERYDAY
        for cell in FEW
        if family == WHOLE or (cell.name in PAIRS and family != "palm")
    ],
)
def test_bfloat16_gradients_are_as_good_as_on_one_device(cell, family):
    one_device = mean(
        distance(reference(family, "bfloat16", step), reference(family, step=step)) for step in STEPS
    )
    assert distance(compute(cell, family, "bfloat16"), reference(family)) <= BFLOAT16_RATIO * one_device


def test_every_cell_is_in_a_tier():
    # The tiers are `not full` and `full`; any other mark might leave a cell out of both.
    run = {param.id for param in matrix() if {mark.name for mark in param.marks} <= {"full"}}
    assert run >= {f"{WHOLE}: {cell.name}" for cell in cells()}
    assert run >= {f"{family}: {cell.name}" for family in get_args(Family) for cell in FEW}
    assert {cell.name for cell in cells()} >= PAIRS.union(*EVERYDAY.values())


def test_the_matrix_holds_every_pair():
    names = {cell.name for cell in cells()}
    assert {"fsdp zero 2 + tensor sequence parallel", "data + accumulation", "tensor + accumulation"} <= names
    assert len(names) == 53


def test_the_documentation_shows_the_matrix():
    matrix = numerics().split("\n\n", 1)[1]
    assert matrix in (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
