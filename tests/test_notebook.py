"""The notebook runs from top to bottom, and is kept without what it printed."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
OVERRIDES = (
    "data.sources.0.max_bytes=400000 data.heldout_fraction=0.2 data.sequence_length=32 "
    "model.num_layers=1 model.scan_unroll=1 model.embed_dim=32 model.mlp_dim=64 model.num_heads=2 "
    "train.steps=20 train.batch_size=4 optimizer.schedule.warmup_steps=5 "
    "eval.every=10 eval.batch_size=64 eval.baselines=false sample.length=8"
)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_what_notebook_and_pages_import_is_there() -> None:
    pages = [NOTEBOOK, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    imports = {
        line for page in pages for line in re.findall(r"from stack[.\w]* import [\w, ]+", page.read_text())
    }
    assert len(imports) >= 4
    for line in imports:
        if "harness" not in line or find_spec("lm_eval"):  # It needs an extra; `.ci/run` has it in a step.
            exec(line, {})


@pytest.mark.full
def test_the_notebook_runs(tmp_path, monkeypatch) -> None:
    places = f"output_dir={tmp_path}/runs data.cache_dir={tmp_path}/cache"
    monkeypatch.setenv("STACK_OVERRIDES", f"{OVERRIDES} {places}")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    told = "".join(output.get("text", "") for output in outputs)
    assert "model.num_layer is not a field; did you mean model.num_layers?" in told
    assert "17,177,045,760 parameters" in told
    assert "step 5: loss " in told
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
