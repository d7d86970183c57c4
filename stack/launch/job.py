"""A run on so many nodes, checked against its config before any platform is asked for them."""

import dataclasses
import math
import posixpath
import re

from stack.config import AXES, Config, ConfigError
from stack.config.layout import check_divides, resolve
from stack.hardware import chip as chips

_GPUS = 8  # Of a node, where nothing says how many: that of almost all that are rented.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every platform is told, each in its own words."""

    config: Config
    nodes: int
    gpus: int
    """Of each node."""


def job(config: Config, nodes: int | None = None, gpus: int | None = None) -> Job:
    """The job of a config.

    Args:
        config: of the run.
        nodes: how many; None: as many as hold the devices of `config.target`, or those the mesh names.
        gpus: on each node; None: 8, or all the devices where they are fewer.

    Raises:
        ConfigError: the config cannot train on so many GPUs, or could not go on after a restart.
    """
    check_number("--nodes", nodes, 1)
    check_number("--gpus", gpus, 1)
    _check_chip(config)
    if not config.checkpoint.resume:
        raise ConfigError(
            "checkpoint.resume=false: a job that is started again could not go on; set checkpoint.resume=true"
        )
    devices = _devices(config)
    gpus = gpus or min(_GPUS, devices or _GPUS)
    if nodes is None and (devices or gpus) % gpus:
        raise ConfigError(f"{devices} devices do not fill nodes of {gpus} GPUs; give --nodes and --gpus")
    nodes = nodes or (devices or gpus) // gpus
    if not config.mesh.auto:
        try:
            check_divides(config, resolve(config.mesh, nodes * gpus))
        except ConfigError as error:
            raise ConfigError(f"--nodes={nodes} x --gpus={gpus} = {nodes * gpus} devices: {error}") from None
    return Job(config=config, nodes=nodes, gpus=gpus)


def check_number(option: str, number: int | None, least: int, most: int = 2**31 - 1) -> None:
    """Refuses a number that is too small or too large; None is left out."""
    if number is not None and not least <= number <= most:
        raise ConfigError(f"{option} {number}: give at least {least}, and at most {most:,}")


def check_text(option: str, text: str | None, pattern: str, told: str) -> None:
    """Refuses a text with letters that a platform does not take; None is left out."""
    if text is not None and not re.fullmatch(pattern, text, re.ASCII):
        raise ConfigError(f"{option} {text!r}: give {told}")


def plain_name(text: str, *, what: str, longest: int) -> str:
    """A text as the name of a thing: small letters and digits, `-` for all else, a letter first.

    Raises:
        ConfigError: nothing of it can stay, or it is too long; with the option that gives another.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not re.match(r"[a-z]", name):
        raise ConfigError(f"name={text!r} gives no name of a {what}, which begins with a letter; set --name")
    if len(name) > longest:
        raise ConfigError(f"{name}: a {what} here has at most {longest} characters in its name; set --name")
    return name


def check_shared(config: Config, root: str | None) -> None:
    """Refuses to write where the containers of a job share nothing, and nothing stays.

    Args:
        config: of the run.
        root: the folder that they share, where they start and which is their home; None: one whose path
            only the platform knows.

    Raises:
        ConfigError: a field that names a place outside of it.
    """
    places = {
        "output_dir": config.output_dir,
        "data.cache_dir": config.data.cache_dir,
        "checkpoint.folder": config.checkpoint.folder or "",
    }
    for name, place in places.items():
        if "://" in place:
            continue
        inside = place[1:].lstrip("/") if place == "~" or place.startswith("~/") else place
        path = posixpath.normpath(posixpath.join(root or "/shared", inside))
        absolute = root is None and inside.startswith(("/", "~"))
        if absolute or inside.startswith("~") or not f"{path}/".startswith(f"{root or '/shared'}/"):
            where = root or "of the job"
            raise ConfigError(
                f"{name}={place} is not in the shared folder {where}; give a relative path, or one from ~"
            )


def _devices(config: Config) -> int | None:
    """How many the config is meant for; None if it does not say."""
    if config.target is not None:
        return config.target.devices
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    return None if config.mesh.auto or -1 in sizes else math.prod(sizes)


def _check_chip(config: Config) -> None:
    if config.target is None:
        return
    chip = chips.load(config.target.hardware)
    if chip.platform != "gpu":
        raise ConfigError(
            f"target.hardware={config.target.hardware}: jobs are written for NVIDIA GPUs, not {chip.title};"
            " change it, or set target=null"
        )
