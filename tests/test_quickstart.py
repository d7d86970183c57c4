"""The first command of the README does what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stack.train.watch.metrics import read_history

ROOT = Path(__file__).parents[1]


@pytest.mark.full
def test_the_quickstart_beats_a_trigram_model_and_writes(tmp_path):
    command = [sys.executable, "-m", "stack", "train", "configs/quickstart.yaml", f"output_dir={tmp_path}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    said = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    heldout, trigram = (float(said[name].split()[1]) for name in ("held-out", "trigram"))
    assert heldout < trigram
    assert "def " in said["sample"]
    records = read_history(tmp_path / "quickstart")
    assert [record["step"] for record in records if record["kind"] == "heldout"] == [200, 400]
    assert sorted(path.name for path in (tmp_path / "quickstart" / "checkpoints").iterdir()) == ["200", "400"]
