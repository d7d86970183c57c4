"""A run that cannot fit is refused with what does; memory that runs out is one line."""

import jax
import pytest

from stack.config import Config, StackError
from stack.planner.guard import check_memory, guard_memory, memory_line

SMALL = Config.model_validate(
    {
        "model": {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "max_length": 64, "vocab_size": 257},
        "data": {"sequence_length": 64},
        "train": {"batch_size": 16},
    }
)


def test_what_cannot_fit_is_refused_before_it_starts_with_what_fits():
    config = SMALL.replace("data.sequence_length=64", "train.batch_size=100000000")
    with pytest.raises(StackError, match=r"run needs [\d,]+ GB a device, of .* by formula; set train\.accum"):
        check_memory(config, jax.devices()[:1])
    check_memory(SMALL, jax.devices()[:1])


def test_a_device_without_memory_left_is_one_line_with_a_remedy():
    with (
        pytest.raises(StackError, match=r"run: a device has no memory left; planned .* of .*; set train\."),
        guard_memory(SMALL.replace("train.batch_size=64"), jax.devices()[:1]),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")
    with pytest.raises(jax.errors.JaxRuntimeError), guard_memory(SMALL, jax.devices()[:1]):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_what_a_run_holds_is_said_of_a_machine_whose_time_is_not_planned():
    told = memory_line(SMALL, jax.devices()[:1])
    assert told is not None
    assert told.startswith("about ")
    assert " MB of " in told
    assert memory_line(SMALL.replace("train.batch_size=64"), jax.devices()[:1]) != told
