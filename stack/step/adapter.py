"""Which matrices of a model have adapters, and which parameters are trained beside those."""

from collections.abc import Collection, Mapping

from stack.config import AdapterConfig, ConfigError
from stack.layers.adapter import NAMES, Adapter
from stack.step.groups import matching

Path = tuple[str, ...]
"""The way to a parameter in their tree."""


def is_of_adapter(name: str | Path) -> bool:
    """Whether a parameter, by its dotted name or its path, is an adapter's."""
    return (name.rpartition(".")[2] if isinstance(name, str) else name[-1]) in NAMES


def is_of_task(name: str) -> bool:
    """Whether a module or a parameter, by its dotted name, is of a task's head."""
    return name.partition(".")[0] == "task"


def choose(config: AdapterConfig, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Adapter]:
    """The adapters of a model, by the path of what each is added to, as `layers.mlp.up`.

    Args:
      config: the options.
      sizes: inputs and outputs of every matrix that may have one.

    Raises:
      ConfigError: a pattern that fits none of them, one that two targets name, or a rank that no sum of a
        matrix can have.
    """
    adapters: dict[str, Adapter] = {}
    owners: dict[str, int] = {}
    for number, target in enumerate(config.targets):
        here = f"adapter.targets.{number}"
        adapter = Adapter(rank=target.rank, alpha=target.alpha, has_magnitude=config.kind == "dora")
        some = [name for one in target.modules for name in matching(one, sizes, field=f"{here}.modules")]
        for name in dict.fromkeys(some):
            if name in owners:
                raise ConfigError(
                    f"{here}.modules: {name} is in adapter.targets.{owners[name]} too; leave one out"
                )
            if target.rank > min(sizes[name]):
                inputs, outputs = sizes[name]
                raise ConfigError(
                    f"{here}.rank={target.rank} is more than {name} can have, which is {inputs} x {outputs};"
                    f" set it to {min(sizes[name])} or less"
                )
            owners[name], adapters[name] = number, adapter
    return adapters


def frozen(config: AdapterConfig, names: Collection[str]) -> set[str]:
    """The parameters, of those with these dotted names, that an adapter leaves as they are.

    The head of a task is trained in any case.

    Raises:
      ConfigError: a pattern of `adapter.train` that fits none.
    """
    base = [name for name in names if not is_of_adapter(name)]
    trained = {name for one in config.train for name in matching(one, base, field="adapter.train")}
    return {name for name in base if not is_of_task(name)} - trained
