"""Stages work side by side: where layers only sleep, a step takes as long as its table says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_a_step_takes_the_ticks_of_its_table():
    """1F1B took twice as long: its stages waited for each other where each sent what goes onward."""
    command = [sys.executable, "benchmarks/pipelines.py", "--wait", "0.05", "--layers", "2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert {one["schedule"] for one in found} == {"gpipe", "1f1b", "interleaved", "zero_bubble"}
    assert {one["schedule"]: one for one in found if one["of_the_table"] < 0.7} == {}
