"""The largest model of a family that fits, found by compiling it and the next."""

import dataclasses
import json
from itertools import pairwise

import jax
import largest as module
import pytest
from largest import (
    METHODS,
    Largest,
    Use,
    against_naive_tensor,
    boundary,
    config,
    largest,
)

from stack.config import ConfigError, StackError
from stack.hardware import chip as chips
from stack.planner.compiled.compile import has_plugin
from stack.planner.formula.memory import memory
from stack.planner.formula.shapes import num_parameters
from stack.planner.formula.workload import from_config
from stack.step import program as programs

PLAIN, OFFLOAD = METHODS[0], METHODS[6]
GB = 1e9


@pytest.fixture(scope="module")
def by_formula() -> Largest:
    return largest("v100-32gb", 8, length=256, memory_bytes=3 * GB, methods=[PLAIN, OFFLOAD])


def test_each_member_of_the_family_is_a_little_larger():
    numbers = [number for first in (60, 150, 288) for number in range(first, first + 12)]
    sizes = {number: num_parameters(module.member(number, 1024)) for number in numbers}
    assert list(sizes.values()) == sorted(sizes.values())
    steps = [sizes[after] / sizes[before] for before, after in pairwise(numbers) if after == before + 1]
    assert min(steps) > 1
    assert max(steps) < 1.06
    thirteen = module.member(117, 2048)
    assert (thirteen.num_layers, thirteen.embed_dim, thirteen.num_heads) == (40, 5120, 40)
    assert num_parameters(thirteen) == pytest.approx(13e9, rel=0.02)


def test_its_parameters_are_counted_as_the_trainer_counts_them():
    small = config(4, PLAIN, 1, 256)
    assert num_parameters(small.model) == programs.build(small, jax.devices()[:1]).num_parameters


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_is_a_config_the_trainer_takes_on_the_same_mesh(method):
    program = programs.build(config(7, method, 8, 256))
    assert program.mesh.size == 8
    assert (program.config.mesh.zero, program.config.train.remat) == (method.zero, method.remat)
    assert program.mesh.shape["data" if method.zero == 0 else "fsdp"] == 8
    assert program.config.train.offload_optimizer == method.offload_optimizer
    assert program.config.train.offload_activations == method.offload_activations


@pytest.mark.parametrize(("share", "offset"), [(0.6, 0.0), (1.0, 0.0), (1.3, 0.0), (0.8, 20.0)])
@pytest.mark.parametrize(("limit", "best"), [(100.0, 9), (99.9, 8), (1.0, 0), (0.5, -1)])
def test_the_boundary_is_measured_on_both_sides_whatever_the_formula_says(limit, best, share, offset):
    numbers = []

    def measure(number: int) -> Use:
        numbers.append(number)
        return Use(device=(number + 1.0) ** 2, host=0.0)

    def formula(number: int) -> Use:
        return Use(device=share * (number + 1.0) ** 2 + offset, host=0.0)

    result, uses = boundary(limit, formula, measure)
    assert result == best
    assert uses[best + 1].device > limit
    assert best < 0 or uses[best].device <= limit
    assert len(numbers) == len(set(numbers)) <= 4


@pytest.mark.full
def test_a_chip_the_compiler_does_not_know_is_by_formula_and_says_so(by_formula):
    assert {row.source for row in by_formula.rows} == {"formula"}
    assert module.lines(by_formula)[1].startswith("by formula (the compiler knows no NVIDIA V100")
    chip = by_formula.hardware
    for row in by_formula.rows:
        assert row.use.device <= 3 * GB < row.next_use.device
        assert row.next_parameters > row.parameters
    first = by_formula.rows[0]
    number = next(n for n in range(300) if module.member(n, 256) == first.model)
    assert first.use.device == memory(from_config(config(number, PLAIN, 8, 256), 8, chip)).total


@pytest.mark.full
def test_ratios_are_to_the_first_method(by_formula):
    plain, offload = by_formula.rows
    assert by_formula.ratio(plain) == 1
    assert by_formula.ratio(offload) == offload.parameters / plain.parameters > 3
    assert plain.use.host == 0
    assert offload.use.host == pytest.approx(offload.parameters * 8 / 8, rel=0.01), "Adam's two, over 8"


@pytest.mark.full
def test_the_answer_is_a_table_and_json(by_formula):
    text = module.lines(by_formula)
    assert "+ optimizer offload" in text[4]
    assert text[4].count(" GB") == 3
    answer = json.loads(json.dumps(module.as_dict(by_formula)))
    assert [row["method"] for row in answer["rows"]] == [PLAIN.name, OFFLOAD.name]
    assert answer["rows"][1]["ratio"] == by_formula.ratio(by_formula.rows[1])
    assert answer["rows"][0]["memory_source"] == "formula"


def test_matrices_split_over_nodes_are_predicted_slower():
    chip = chips.load("h100")
    speed = against_naive_tensor(chip, 20, 64)
    assert speed.naive is not None
    assert speed.zero is not None
    assert (speed.naive.tensor, speed.naive.devices, speed.naive.zero) == (64, 64, 0)
    assert speed.zero.devices == 64
    assert speed.zero.tensor <= chip.domain_size
    assert speed.zero.zero > 0
    assert speed.naive.tokens == speed.zero.tokens
    assert speed.ratio is not None
    assert speed.ratio > 1
    slow = dataclasses.replace(chip, network_bandwidth=chip.network_bandwidth / 10)
    slower = against_naive_tensor(slow, 20, 64)
    assert slower.ratio is not None
    assert slower.ratio > 1.5 * speed.ratio, "what crosses the nodes costs it more"


def test_where_nothing_fits_there_is_no_ratio():
    tiny = dataclasses.replace(chips.load("v100-32gb"), memory_bytes=4 * GB)
    speed = against_naive_tensor(tiny, 124, 128)
    assert (speed.naive, speed.zero, speed.ratio) == (None, None, None)


@pytest.mark.parametrize(
    ("chip", "memory_bytes", "error", "message"),
    [
        ("h1000", None, ConfigError, "h1000"),
        ("v100-32gb", 1 * GB, StackError, r"^plain data parallelism: not even \d+ M parameters fit in 1 GB"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_line(chip, memory_bytes, error, message):
    with pytest.raises(error, match=message):
        largest(chip, 8, length=256, memory_bytes=memory_bytes, methods=[PLAIN])


@pytest.mark.full
@pytest.mark.skipif(not has_plugin(), reason="compiling for GPUs needs the extra plan")
def test_compiled_sizes_fit_and_the_next_do_not():
    progress = []
    result = largest("h100", 8, length=512, memory_bytes=4 * GB, methods=[OFFLOAD], progress=progress.append)
    (row,) = result.rows
    assert row.source == "compiled"
    assert row.use.device <= 4 * GB < row.next_use.device
    assert row.use.host == pytest.approx(row.parameters * 8 / 8, rel=0.01)
    assert 2 <= len(progress) <= 5
