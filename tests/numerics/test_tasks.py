"""Heads of tasks: every layout gives the loss and gradients of one device."""

import pytest
from task_cases import OBJECTIVES, TRUNKS, compute, config

from stack.doctor.numerics import LIMIT, errors

MESHES = {
    "data": {"data": 8},
    "fsdp zero 1": {"fsdp": 8, "zero": 1},
    "fsdp zero 3": {"fsdp": 8, "zero": 3},
    "tensor": {"fsdp": 2, "tensor": 4},
    "sequence parallel": {"data": 2, "tensor": 4, "sequence_parallel": True},
    "accumulation": {"data": 2},
}
DROPOUT = {"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1}
EVERYDAY = [
    ("classification", "encoder", "fsdp zero 3"),
    ("tagging", "encoder_decoder", "tensor"),
    ("span_answers", "encoder", "sequence parallel"),
    ("key_sentences", "decoder", "accumulation"),
]
"""Retrieval's is in tests/objectives/test_task_losses.py."""


def cells():
    """Every kind on every layout and every trunk, not all three together."""
    for number, name in enumerate(OBJECTIVES):
        for place, layout in enumerate(MESHES):
            trunk = list(TRUNKS)[(number + place) % len(TRUNKS)]
            if (name, layout) != ("retrieval", "accumulation"):
                yield name, trunk, layout
    yield from EVERYDAY


def matrix():
    """All of it; few are for every day."""
    for name, trunk, layout in dict.fromkeys(cells()):
        marks = [] if (name, trunk, layout) in EVERYDAY else [pytest.mark.full]
        yield pytest.param(name, trunk, layout, id=f"{name} {trunk} {layout}", marks=marks)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """What one device makes of each task."""
    made = {}

    def get(name: str, trunk: str):
        if (name, trunk) not in made:
            folder = tmp_path_factory.mktemp("one")
            settings = config(name, folder, trunk, model=DROPOUT)
            made[name, trunk] = folder, compute(settings)
        return made[name, trunk]

    return get


@pytest.mark.parametrize(("name", "trunk", "layout"), list(matrix()))
def test_losses_and_gradients_equal_one_device(one_device, name, trunk, layout):
    folder, expected = one_device(name, trunk)
    train = {"accumulation": 2} if layout == "accumulation" else {}
    settings = config(name, folder, trunk, model=DROPOUT, mesh=MESHES[layout], train=train)
    made = compute(settings, 2 if layout == "accumulation" else 8, expected.numbers.params)
    wrong = {
        key: error for key, error in errors(made.numbers, expected.numbers).items() if not error <= LIMIT
    }
    assert not wrong
    assert made.sums == pytest.approx(expected.sums, rel=LIMIT)
    for key, values in expected.outputs.items():
        assert made.outputs[key] == pytest.approx(values, rel=1e-4, abs=1e-5), key


def test_every_kind_is_in_a_tier_on_every_trunk_and_layout():
    some = set(cells())
    assert {(name, trunk) for name, trunk, _ in some} == {
        (name, trunk) for name in OBJECTIVES for trunk in TRUNKS
    }
    pairs = {(name, layout) for name, _, layout in some} | {("retrieval", "accumulation")}
    assert pairs == {(name, layout) for name in OBJECTIVES for layout in MESHES}
    assert {trunk for _, trunk, _ in EVERYDAY} == set(TRUNKS)
