"""The contract holds for attention in blocks: every layout gives what XLA's attention gives on one device."""

import sys

import pytest

from stack.doctor.numerics import LIMIT, ONE_DEVICE, cells, compute, config_of, errors
from stack.kernels.attention import xla_chunked

CELLS = {cell.name: cell for cell in cells()}


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt", "fsdp zero 3 + tensor sequence parallel"), ("t5", "data + tensor")],
)
def test_a_layout_with_attention_in_blocks_is_one_device_without(monkeypatch, family, name):
    whole = compute(ONE_DEVICE, family)

    def in_blocks(*asked):
        return config_of(*asked).replace("kernels.attention=xla_chunked")

    monkeypatch.setattr(sys.modules[compute.__module__], "config_of", in_blocks)
    monkeypatch.setattr(xla_chunked, "BLOCKS", {"cpu": xla_chunked.BlockSizes(8, 2**8)})
    found = errors(compute(CELLS[name], family), whole)
    assert max(found.values()) <= LIMIT, found
