"""The contract holds across processes: 2 of 4 devices each compute what one device does."""

import numpy as np

from stack.doctor.numerics import LIMIT, NUM_DEVICES, ONE_DEVICE, Numbers, cells, compute, errors

NAME = "data + fsdp zero 3"


def compute_here() -> Numbers:
    cell = next(cell for cell in cells() if cell.name == NAME)
    return compute(cell, "gpt")


def test_two_processes_equal_one_device(run_processes):
    reference = compute(ONE_DEVICE, "gpt")
    for numbers in run_processes(compute_here, processes=2, devices=NUM_DEVICES // 2):
        for name, params in reference.params.items():
            np.testing.assert_array_equal(numbers.params[name], params, err_msg=name)
        assert max(errors(numbers, reference).values()) <= LIMIT
