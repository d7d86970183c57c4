"""Whether the instances of a run fit its batch and its mesh: told without any device."""

import math

from stack.config.errors import ConfigError
from stack.config.tree import Config


def num_instances(config: Config, data: int) -> int:
    """Of a config on a mesh with so many ways over `data`; 1 where none train apart."""
    if not config.average.apart:
        return 1
    return config.average.instances or data


def num_here(config: Config, data: int) -> int:
    """Of those, how many are in this run."""
    return 1 if config.average.folder is not None else num_instances(config, data)


def check_instances(config: Config, sizes: dict[str, int]) -> None:
    """Refuses instances that cannot lie on a mesh, or share a batch evenly.

    Raises:
      ConfigError: naming the field, and the nearest value that works.
    """
    if not config.average.apart:
        return
    data, number = sizes["data"], num_instances(config, sizes["data"])
    where = f"average.every={config.average.every}"
    if config.average.every == 1:
        where = f"average.outer={config.average.outer}"
    if config.mesh.second_shard:
        raise ConfigError(
            "mesh.second_shard splits parameters over mesh.data, where each instance has its own;"
            " set second_shard=false"
        )
    tasks = getattr(config.objective, "tasks", ())
    if "retrieval" in (config.objective.kind, *(task.objective.kind for task in tasks)):
        raise ConfigError(
            f"{where}: objective.kind=retrieval compares all rows of a batch; instances part them; leave"
            " average out"
        )
    if number == 1:
        raise ConfigError(
            f"{where}: mesh.data=1 makes one instance, and there is nothing to average; set"
            " average.instances, or mesh.data, or leave average out"
        )
    if config.average.folder is not None:
        data *= number  # Each has such a mesh.
    if number % data and data % number:
        best = max(size for size in range(1, number + 1) if data % size == 0 or size % data == 0)
        raise ConfigError(
            f"average.instances={number} and mesh.data={data}: neither divides the other; set"
            f" average.instances={best}"
        )
    layers = min(config.model.num_layers, getattr(config.model, "decoder_layers", config.model.num_layers))
    if config.average.fragments > layers:
        raise ConfigError(
            f"average.fragments={config.average.fragments}: each takes one of {layers} layers at least; set"
            f" it to {layers}"
        )
    train = config.train
    ways = max(1, data // number) * sizes["fsdp"]
    least = number * ways * train.accumulation
    if train.batch_size % least:
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not split over {number} instances of {ways} ways x"
            f" {train.accumulation} micro-batch{'es' * (train.accumulation > 1)}; set it to"
            f" {max(1, round(train.batch_size / least)) * least}"
        )


def with_instances(config: Config, data: int) -> Config:
    """The same with the number of instances written out, so that a run keeps them on another mesh."""
    number = num_instances(config, data)
    return config if number == 1 else config.replace(f"average.instances={number}")


def instance_config(config: Config, data: int) -> Config:
    """What one instance of a run is: a plain run on its part of the batch and of the mesh."""
    number, here = num_instances(config, data), num_here(config, data)
    return config.model_copy(
        update={
            "average": type(config.average)(),
            "train": config.train.model_copy(update={"batch_size": config.train.batch_size // number}),
            "mesh": config.mesh.model_copy(update={"data": data // math.gcd(here, data)}),
        }
    )
