"""The job is one to Azure ML's own loader, and its nodes train together."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nodes
import pytest
import yaml
from tiny_runs import config as tiny

from stack.config import Config, ConfigError, parse
from stack.launch.azureml import render
from stack.launch.job import job

RUN = Config().replace("train.batch_size=32", "name=Llama3_8b")
STORAGE = "azureml://datastores/workspaceblobstore/paths/stack"


def rendered(config: Config = RUN, count: int = 2, gpus: int | None = None, **options: Any) -> str:
    options = {"image": "ghcr.io/lab/stack:1", "compute": "gpus", "storage": STORAGE} | options
    return render(job(config, count, gpus), **options)


def run_command(text: str, folder: Path, variables: dict[str, str], log: Path) -> subprocess.Popen[str]:
    """A node: the command in a shell, its output a folder."""
    command = yaml.safe_load(text)["command"].replace("${{outputs.shared}}", str(folder))
    return nodes.start(["bash", "-c", command], variables, folder.parent, log)


def test_the_command_holds_the_whole_config():
    command = yaml.safe_load(rendered())["command"]
    assert parse(command.split("END_OF_CONFIG'\n")[1].split("END_OF_CONFIG\n")[0]) == RUN
    assert "#" not in command.split("\n")[0]
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_one_process_is_started_on_each_of_several_nodes():
    spec = yaml.safe_load(rendered(count=4))
    assert spec["resources"]["instance_count"] == 4
    assert spec["distribution"] == {"type": "pytorch", "process_count_per_instance": 1}
    alone = yaml.safe_load(rendered(count=1))
    assert "distribution" not in alone
    assert "JAX_" not in alone["command"]


def test_an_environment_of_the_workspace_is_named_as_it_is():
    assert yaml.safe_load(rendered(image="azureml:stack:3"))["environment"] == "azureml:stack:3"


def test_a_config_that_azure_would_fill_in_is_refused():
    with pytest.raises(ConfigError, match="which Azure ML would fill in"):
        rendered(RUN.replace("sample.prompt=${{a}}"))


LOAD = """
import sys
from azure.ai.ml import load_job

job = load_job(sys.argv[1])
assert job.outputs["shared"].mode == "rw_mount"
print(type(job).__name__, job.resources["instance_count"], getattr(job.distribution, "type", None))
"""


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("azure") is None or importlib.util.find_spec("azure.ai.ml") is None,
    reason="needs Azure ML's loader: uv run --group azure pytest -m full tests/launch/test_azureml.py",
)
def test_the_loader_of_azure_ml_takes_it_and_sees_a_field_that_is_misspelt(tmp_path):
    def load(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "job.yaml").write_text(text)
        # In a process of its own: it warns, of itself.
        command = [sys.executable, "-c", LOAD, str(tmp_path / "job.yaml")]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""}
        )

    for text, told in (
        (rendered(), "Command 2 PyTorch"),
        (rendered(count=1, image="azureml:stack:3"), "Command 1 None"),
    ):
        done = load(text)
        assert (done.returncode, done.stdout.strip().lower()) == (0, told.lower()), done.stderr
    wrong = load(rendered().replace("process_count_per_instance", "processes_per_instance"))
    assert wrong.returncode == 1
    assert "processes_per_instance" in wrong.stderr


@pytest.mark.full
def test_two_nodes_train_together(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    text = rendered(tiny(tmp_path, "two", *nodes.OVERRIDES), 2, nodes.DEVICES)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "6105", "WORLD_SIZE": "2"}
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    started = [
        run_command(text, shared, meet | {"RANK": str(rank), "NODE_RANK": str(rank)}, log)
        for rank, log in enumerate(logs)
    ]
    assert nodes.wait(started) == [0, 0], [log.read_text() for log in logs]
    assert "devices   4 x cpu" in logs[0].read_text()
    assert nodes.steps(shared / "runs" / "Two_nodes") > 12
    assert (shared / ".cache" / "stack" / "data").is_dir(), "its home is shared"
