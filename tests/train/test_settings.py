"""What a run is compiled with is told at its start, and kept beside it and in its checkpoints."""

import json
from typing import Any

from tiny_runs import trainer

from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.watch.announce import introduction
from stack.train.watch.listeners import Listener

OPTION = "xla_cpu_enable_fast_math"


class Start(Listener):
    """Keeps what a run says of itself."""

    def on_start(self, info: dict[str, Any]) -> None:
        self.info = info


def test_a_run_tells_and_keeps_its_settings(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    start = Start()
    asked = (f"runtime.compiler_options.{OPTION}=false", "train.steps=1")
    made = trainer(tmp_path, "run", *asked, listeners=[start])
    made.fit(progress=False)
    lines = [
        "NCCL_DEBUG=WARN (environment)",
        "xla_backend_optimization_level=0 (XLA_FLAGS)",
        f"{OPTION}=false (runtime.compiler_options)",
    ]
    assert start.info["settings"] == lines
    assert "\n          ".join(lines) in introduction(start.info).plain
    kept = json.loads((made.folder / "settings.json").read_text())
    assert [(one["name"], one["value"], one["by"]) for one in kept] == [
        ("NCCL_DEBUG", "WARN", "environment"),
        ("xla_backend_optimization_level", "0", "XLA_FLAGS"),
        (OPTION, False, "runtime.compiler_options"),
    ]
    with Checkpoints(made.ledger.store) as checkpoints:
        assert checkpoints.extra(1)["settings"] == kept
