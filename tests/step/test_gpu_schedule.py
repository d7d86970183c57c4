"""When the compiled GPU step makes what is large, read from the order of its instructions.

The step is compiled for 8 H200 that are not here. What is made before its turn is held until then.
"""

import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from stack.config import (
    Config,
    DataConfig,
    DecoderConfig,
    KernelsConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from stack.parallel.mesh import without_cache
from stack.planner.compiled.compile import compile_step, devices

pytestmark = pytest.mark.usefixtures("quick_gpu_compiler")

MODEL = DecoderConfig(vocab_size=1000, num_layers=4, embed_dim=256, num_heads=8, max_length=160)


class Instruction(NamedTuple):
    """One of the step's own, not of a loop's."""

    kind: str
    shape: str
    operands: tuple[str, ...]


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    with without_cache():
        yield


@cache
def schedule(zero: int) -> dict[str, Instruction]:
    """The instructions of one step, in the order in which they start."""
    config = Config(
        model=MODEL,
        kernels=KernelsConfig(attention="xla"),
        data=DataConfig(sequence_length=160),
        mesh=MeshConfig(fsdp=8, zero=zero),
        optimizer=OptimizerConfig(schedule=ScheduleConfig(warmup_steps=1)),
        train=TrainConfig(batch_size=256, remat="full", steps=10),
    )
    text = compile_step(config, devices("h200", 8)).as_text()
    assert text
    assert "is_scheduled=true" in text
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    lines = re.findall(r"^ +(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)", entry, re.MULTILINE)
    return {
        name: Instruction(kind, shape, tuple(re.findall(r"%([\w.-]+)", operands)))
        for name, shape, kind, operands in lines
    }


def sources(name: str, order: dict[str, Instruction]) -> set[str]:
    """What an instruction is made from, and what that is."""
    seen, stack = set(), [name]
    while stack:
        for operand in order[stack.pop()].operands:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return seen


@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)]
)
def test_whole_gradients_are_scattered_one_after_another(zero):
    order = schedule(zero)
    scatters = [
        name
        for name, node in order.items()
        if node.kind == "reduce-scatter" or "reduce-scatter-start" in name
    ]
    # Six matrices of the layers, of which one call may scatter several, and two tables.
    assert len(scatters) >= 3
    for before, after in itertools.pairwise(scatters):
        done = next(
            (name for name, node in order.items() if node.kind == "async-done" and before in node.operands),
            before,
        )
        assert done in sources(after, order), f"{after} may start before {before} has ended"


@pytest.mark.full
def test_word_sums_begin_after_the_backward_pass():
    """Their zeros, of the table's size in float32, come from its result."""
    order = schedule(1)
    loops = [name for name, node in order.items() if node.kind == "while"]
    backward = [name for name in loops if f"bf16[{MODEL.num_layers}," in order[name].shape][-1]
    for rows in (MODEL.vocab_size + 24, MODEL.max_length):  # Padded words, and positions.
        zeros = f"f32[{rows + 1},{MODEL.embed_dim}]"
        [loop] = [name for name in loops if zeros in order[name].shape]
        [start] = [name for name in order[order[loop].operands[0]].operands if zeros in order[name].shape]
        assert backward in sources(start, order)
