"""Every layout and every pair of layouts gives the numbers of one device."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stack.doctor.numerics import (
    BFLOAT16_RATIO,
    LIMIT,
    ONE_DEVICE,
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
    "gpt": {"fsdp zero 2"},
    "llama": {"data + fsdp zero 3", "fsdp zero 1 + accumulation"},
    "palm": {"fsdp zero 3 + tensor sequence parallel"},
    "t5": {"fsdp zero 3 + tensor sequence parallel"},
}
PAIRS = {
    "fsdp zero 1 + accumulation",
    "data + fsdp zero 3",
    "fsdp zero 3 + tensor sequence parallel",
    "tensor + accumulation",
}
"""Pairs that stand for the others where not all are run. In bfloat16 the rest repeat one of these, or a part
alone, to the digit, as they round the same sums; a family that shares its layers with another has been
through the parts and the other pairs there."""
FAMILIES: tuple[Family, ...] = ("gpt", "llama")
FEW = [cell for cell in cells() if len(cell.parts) == 1 or cell.name in PAIRS]
RUN: dict[Family, list[Cell]] = {
    "gpt": cells(),
    "llama": cells(),
    "palm": [cell for cell in cells() if cell.name in PAIRS],
    "t5": FEW,
}


def matrix():
    """Every cell for every family; what is not for every day is for the full tier."""
    return [
        pytest.param(
            cell,
            family,
            id=f"{family}: {cell.name}",
            marks=[] if everyday(cell, family) else [pytest.mark.full],
        )
        for family, some in RUN.items()
        for cell in some
    ]


def everyday(cell: Cell, family: Family) -> bool:
    return cell.name in EVERYDAY[family]


@cache
def reference(family: Family, dtype: str = "float32") -> Numbers:
    return compute(ONE_DEVICE, family, dtype)


@pytest.mark.parametrize(("cell", "family"), matrix())
def test_float32_loss_and_gradients_equal_one_device(cell, family):
    numbers, expected = compute(cell, family), reference(family)
    for name, params in expected.params.items():
        np.testing.assert_array_equal(numbers.params[name], params, err_msg=name)
    wrong = {name: error for name, error in errors(numbers, expected).items() if not error <= LIMIT}
    assert not wrong


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "cell",
    FEW,
    ids=lambda cell: cell.name,
)
def test_bfloat16_gradients_are_as_good_as_on_one_device(cell, family):
    expected = reference(family)
    one_device = distance(reference(family, "bfloat16"), expected)
    assert distance(compute(cell, family, "bfloat16"), expected) <= BFLOAT16_RATIO * one_device


def test_every_cell_is_in_a_tier():
    # The tiers are `not full` and `full`; any other mark might leave a cell out of both.
    run = {param.id for param in matrix() if {mark.name for mark in param.marks} <= {"full"}}
    assert run >= {f"{family}: {cell.name}" for family in FAMILIES for cell in cells()}
    assert {cell.name for cell in cells()} >= PAIRS.union(*EVERYDAY.values())


def test_the_matrix_holds_every_pair():
    names = {cell.name for cell in cells()}
    assert {"fsdp zero 2 + tensor sequence parallel", "data + accumulation", "tensor + accumulation"} <= names
    assert len(names) == 29


def test_the_documentation_shows_the_matrix():
    matrix = numerics().split("\n\n", 1)[1]
    assert matrix in (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
