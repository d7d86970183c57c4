"""A CPU run does not fault its temporaries in again at every step."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import numpy as np
from stack.parallel.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
np.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_five_blocks(advice):
    """Page faults of five 64 MiB blocks, allocated and freed one after the other."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, advice], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators need no advice")
def test_freed_blocks_are_used_again_without_page_faults():
    assert faults_of_five_blocks("keep") < 10
    assert faults_of_five_blocks("none") > 100
