"""Plans of instances that train apart: what is held beside them, and what the network carries."""

import pytest

from stack.config import Config
from stack.hardware import chip as chips
from stack.planner.compiled.report import compile_plan
from stack.planner.plan import plan
from stack.planner.search.search import search

LLAMA = Config.model_validate(
    {
        "model": {
            "vocab_size": 32000,
            "num_layers": 8,
            "embed_dim": 1024,
            "num_heads": 16,
            "max_length": 1024,
        },
        "data": {"sequence_length": 1024, "heldout_fraction": 0},
        "mesh": {"data": 4, "fsdp": 4},
        "train": {"batch_size": 32, "remat": "full"},
    }
)
LOCAL = ("average.every=50", "average.instances=4")
DILOCO = (*LOCAL, "average.outer=nesterov")


def planned(*overrides: str):
    return plan(LLAMA.replace(*overrides), hardware="h200", devices=16)


def test_an_average_and_its_momentum_are_shards_in_float32():
    shard = 4 * sum(part.shard(fsdp=4) for part in planned().work.parameters)
    whole = planned().memory.total
    assert planned(*LOCAL).memory.total - whole == pytest.approx(shard)
    assert planned(*DILOCO).memory.total - whole == pytest.approx(2 * shard)
    # Twice as many take turns: parameters and two moments of one more.
    turns = planned(*DILOCO, "average.instances=8").memory.total
    assert turns - planned(*DILOCO, "train.accumulation=2").memory.total >= 3 * shard


def test_the_network_carries_a_fiftieth():
    """An all-reduce of parameters every 50 steps, for one of gradients at each, both in float32."""
    every, seldom = planned().time.communication, planned(*LOCAL).time.communication
    assert seldom.keys() == {"fsdp", "average"}
    vectors = 0.005  # Which the gradient's all-reduce does not count.
    assert seldom["average"].bytes == pytest.approx(every["data"].bytes / 50, rel=vectors)
    assert seldom["average"].seconds == pytest.approx(every["data"].seconds / 50, rel=0.01)
    assert planned("average.every=10", "average.instances=2").time.communication["data"].bytes > 0


def test_a_search_keeps_the_instances():
    free = LLAMA.model_copy(update={"mesh": Config().mesh}).replace("average.every=50", "average.instances=4")
    found = search(free, hardware=chips.load("h200"), devices=16)
    assert found.best
    assert {one.work.data % 4 for one in found.best} == {0}
    assert all("average" in one.time.communication for one in found.best)


@pytest.mark.full
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_what_instances_add_is_what_they_add_compiled():
    def both(*overrides: str) -> tuple[float, float]:
        compiled = compile_plan(LLAMA.replace(*overrides), hardware="h200", devices=16, schedule=False)
        return planned(*overrides).memory.program, compiled.memory.total

    (plain, plain_compiled), (apart, apart_compiled) = both(), both(*DILOCO)
    assert apart - plain == pytest.approx(apart_compiled - plain_compiled, abs=0.05 * apart_compiled)
