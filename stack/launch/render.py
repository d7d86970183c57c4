"""Jobs by the name of their platform."""

from pathlib import Path
from typing import Any

from stack.config import Config, ConfigError
from stack.config.paths import check_writable, expand
from stack.launch import azureml, kubernetes, slurm
from stack.launch.job import job

_TARGETS = {
    "kubernetes": (kubernetes.render, "kubectl apply -f"),
    "azureml": (azureml.render, "az ml job create --file"),
    "slurm": (slurm.render, "sbatch"),
}


def render(
    target: str, config: Config, *, nodes: int | None = None, gpus: int | None = None, **options: Any
) -> str:
    """What a platform starts a run by.

    Args:
        target: `kubernetes`, `azureml` or `slurm`.
        config: of the run; all of it is written into the job.
        nodes: how many; None: as many as the devices of `config.target` or of its mesh take.
        gpus: on each node; None: 8, or all the devices where they are fewer.
        **options: of the platform: see `render` of its module.

    Raises:
        ConfigError: there is no such platform, or what the config or the platform cannot do.
    """
    if target not in _TARGETS:
        raise ConfigError(f"there is no platform {target!r}; give one of {', '.join(_TARGETS)}")
    write, _ = _TARGETS[target]
    return write(job(config, nodes, gpus), **options)


def write(text: str, target: str, name: str) -> str:
    """Writes a job to a file; how it is submitted.

    Raises:
        StackError: the file cannot be written.
    """
    path = expand(name)
    check_writable(path)
    Path(path).write_text(text, "utf-8")
    return f"{_TARGETS[target][1]} {name}"
