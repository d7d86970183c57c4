"""Whether a config can be run in a pipeline: told without any device."""

from stack.config.errors import ConfigError
from stack.config.tree import Config


def check_pipeline(config: Config, stages: int) -> None:
    """Refuses what no pipeline of so many stages can do.

    Raises:
      ConfigError: naming the field, and the nearest value that works.
    """
    if stages == 1:
        return
    mesh, where = config.mesh, f"mesh.stage={stages}"
    if mesh.zero != 1:
        reason = {
            0: "leaves all parameters whole on every stage",
            2: "scatters the gradient of each micro-batch, where a pipeline adds them up first",
            3: "gathers each layer again for every micro-batch, as many times a step as there are of them",
        }[mesh.zero]
        raise ConfigError(f"mesh.zero={mesh.zero} {reason}: with {where} set mesh.zero=1")
    _check_parts(config, stages)
    unread = {
        "adapter": config.adapter is not None,
        "optimizer.frozen": bool(config.optimizer.frozen),
        "kernels.matmul=fp8": config.kernels.matmul == "fp8",
        "train.offload_activations": config.train.offload_activations,
        "objective.kind=retrieval": compares_rows(config),
    }
    for name, is_set in unread.items():
        if is_set:
            raise ConfigError(f"{name} has no pipeline yet: set mesh.stage=1, or leave {name} out")


def _check_parts(config: Config, stages: int) -> None:
    """Every part of the model has a layer, and the parts are as the schedule wants them."""
    mesh, model, micros = config.mesh, config.model, config.train.accumulation
    stacks = {"model.num_layers": model.num_layers}
    if model.shape == "encoder_decoder":
        stacks["model.num_decoder_layers"] = model.decoder_layers
    name, least = min(stacks.items(), key=lambda item: item[1])
    if stages > least:
        raise ConfigError(
            f"mesh.stage={stages}: there are {least} layers ({name}), and each stage needs one; set"
            f" mesh.stage={least}"
        )
    parts = stages * mesh.virtual_stages
    uneven = next((name for name, layers in stacks.items() if layers % parts), None)
    if mesh.virtual_stages > 1 and uneven:
        fits = [
            parts
            for parts in range(1, mesh.virtual_stages + 1)
            if all(layers % (stages * parts) == 0 for layers in stacks.values())
        ]
        remedy = f"mesh.virtual_stages={fits[-1] if fits else 1}"
        raise ConfigError(
            f"mesh.virtual_stages={mesh.virtual_stages}: {stages} stages of as many parts each do not divide"
            f" {uneven}={stacks[uneven]}; set {remedy}"
        )
    if mesh.schedule == "interleaved" and micros % stages:
        nearest = max(stages, round(micros / stages) * stages)
        raise ConfigError(
            f"mesh.schedule=interleaved goes round in groups of {stages} micro-batches, which do not divide"
            f" train.accumulation={micros}; set it to {nearest}, or take mesh.schedule=1f1b"
        )


def compares_rows(config: Config) -> bool:
    """Whether the loss of a row depends on the other rows of a batch."""
    tasks = getattr(config.objective, "tasks", ())
    return "retrieval" in (config.objective.kind, *(task.objective.kind for task in tasks))
