"""The contract holds across processes, at once and one after the other."""

import numpy as np
import pytest

from stack.doctor.numerics import LIMIT, NUM_DEVICES, ONE_DEVICE, Numbers, cells, compute, errors


def compute_here(name: str) -> Numbers:
    cell = next(cell for cell in cells() if cell.name == name)
    return compute(cell, "gpt")


@pytest.mark.full
@pytest.mark.parametrize(
    ("cell", "devices"),
    [
        ("data + fsdp zero 3", NUM_DEVICES // 2),
        # Each process is a stage.
        ("stage 1f1b", 1),
    ],
)
def test_two_processes_equal_one_device(run_processes, cell, devices):
    reference = compute(ONE_DEVICE, "gpt")
    for numbers in run_processes(compute_here, cell, processes=2, devices=devices):
        for name, params in reference.params.items():
            np.testing.assert_array_equal(numbers.params[name], params, err_msg=name)
        assert max(errors(numbers, reference).values()) <= LIMIT


@pytest.mark.full
def test_a_second_process_meets_no_program_that_hangs(run_processes, tmp_path, monkeypatch):
    """As it did where the programs came from the persistent cache: see `mesh.build`."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    first, second = (
        run_processes(compute_here, "data", processes=1, devices=NUM_DEVICES)[0].loss for _ in range(2)
    )
    assert first == second
