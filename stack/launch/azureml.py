"""A run as a command job of Azure ML: one process on each node, with all its GPUs.

Azure ML tells the processes of a job where to meet in PyTorch's variables, which are handed on as JAX's.
"""

from typing import Any

from stack.config import ConfigError, dump
from stack.launch import documents
from stack.launch.job import Job, check_shared, check_text

_SCHEMA = "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json"
_END = "END_OF_CONFIG"


def render(job: Job, *, image: str, compute: str, storage: str) -> str:
    """A command job, whole: the config is in its command, and nothing else is uploaded.

    Args:
        job: the run and its size.
        image: a container that holds Stack, as `stack` on its path; or `azureml:NAME:VERSION`, an
            environment of the workspace.
        compute: the name of a cluster, whose machines have the GPUs.
        storage: a folder of a datastore, `azureml://datastores/NAME/paths/FOLDER`, that all nodes mount.

    Raises:
        ConfigError: what Azure ML does not take, by name.
    """
    check_shared(job.config, None)
    check_text("--image", image, r"[\w.:/@-]+", "the name of an image, or azureml:NAME:VERSION")
    check_text("--compute", compute, r"(azureml:)?[A-Za-z][A-Za-z0-9-]*", "the name of a cluster")
    folder = "a folder as azureml://datastores/NAME/paths/FOLDER"
    check_text("--storage", storage, r"azureml://[\w./-]+", folder)
    config = dump(job.config)
    if "${{" in config:
        raise ConfigError("the config holds ${{, which Azure ML would fill in; remove it")
    spec: dict[str, Any] = {
        "$schema": _SCHEMA,
        "type": "command",
        "display_name": job.config.name,
        "experiment_name": "stack",
        "compute": compute if compute.startswith("azureml:") else f"azureml:{compute}",
        "environment": image if image.startswith("azureml:") else {"image": image},
        "resources": {"instance_count": job.nodes, "shm_size": "16g"},
        "outputs": {"shared": {"type": "uri_folder", "mode": "rw_mount", "path": storage}},
        "command": _command(config, together=job.nodes > 1),
    }
    if job.nodes > 1:
        spec["distribution"] = {"type": "pytorch", "process_count_per_instance": 1}
    return documents.write([spec])


def _command(config: str, *, together: bool) -> str:
    meet = [
        'export JAX_COORDINATOR_ADDRESS="$MASTER_ADDR:$MASTER_PORT"',
        'export JAX_NUM_PROCESSES="$WORLD_SIZE" JAX_PROCESS_ID="$RANK"',
    ]
    lines = [
        "set -e",
        "config=$(mktemp)",
        f"cat >\"$config\" <<'{_END}'",
        config.rstrip("\n"),
        _END,
        'cd "${{outputs.shared}}"',
        'export HOME="$PWD"',
        *(meet if together else []),
        # In the place of the shell: signals reach it.
        'exec stack train "$config"',
    ]
    return "\n".join(lines) + "\n"
