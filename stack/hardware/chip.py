"""Chips as data: one YAML file each in `stack/hardware/chips`.

Peaks are dense (vendors print twice as much "with sparsity") and at the maximum boost clock; no
program reaches them: the best matrix products get about 80 % of them on H100 and H200. What programs
do get, per generation of chips, is in `generations.yaml`. Sources are beside the figures.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from stack.config import ConfigError
from stack.config.document import read_file
from stack.config.explain import dotted, explain, nearest
from stack.config.located import Keys, Located, Place, merge
from stack.config.paths import expand

Precision = Literal["float32", "tensorfloat32", "float16", "bfloat16", "float8"]
Platform = Literal["cpu", "gpu", "rocm", "tpu"]
type _Text = Annotated[str, Field(strict=True, min_length=1)]
type _Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
type _Fraction = Annotated[float, Field(strict=True, gt=0, le=1)]
type _Count = Annotated[int, Field(strict=True, gt=0)]

_FOLDER = Path(str(files("stack.hardware"))) / "chips"
_GENERATIONS = _FOLDER / "generations.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What programs get of the printed figures; the same for every model.

    A product with a weight [k, n] takes its FLOPs over peak x matmul / (1 + matmul_half (1/k + 1/n)), or
    the time to read and write its operands if that is longer.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    matmul: _Fraction
    """Of the peak of the precision, in the limit of large matrix products."""
    matmul_half: _Positive
    """Half of that is lost to what surrounds a product when 1/k + 1/n is one over this."""
    attention: _Fraction
    """Of the 16-bit peak, in fused attention."""
    memory: _Fraction
    """Of the memory bandwidth, in streaming kernels."""
    link: _Fraction
    """Of the one-way bandwidth of the links, in large collectives."""
    overlap: Annotated[float, Field(strict=True, ge=0, le=1)]
    """Share of a collective's time that costs nothing where arithmetic runs beside it; the rest is
    what it takes from that arithmetic, and imperfect schedules."""
    launch_seconds: _Positive
    """To start a kernel, or between two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of accelerator, one JAX device, and the links between them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: _Text
    """As it is asked for: that of its file."""
    title: _Text
    """Name in print."""
    aliases: tuple[_Text, ...] = ()
    """Other names it is asked for by."""
    generation: _Text
    """Its efficiencies are those of this generation, where its file gives none."""
    device_kinds: tuple[str, ...] = ()
    """What `jax.Device.device_kind` calls it."""
    peak_flops: Annotated[Mapping[Precision, _Positive], Field(min_length=1)]
    """Dense FLOP/s of matrix products by precision of the operands; what the chip lacks is absent."""
    memory_bytes: _Positive
    """Device memory in bytes, 1 GB = 1e9, as printed by the vendor. What a driver reports is up to 7 %
    more: room for its own context and the communication library."""
    memory_bandwidth: _Positive
    """Bytes per second."""
    domain_size: _Count
    """Chips joined by the fast links."""
    domain_bandwidth: _Positive
    """Bytes per second one way from one chip to others of its domain, over all its fast links."""
    network_bandwidth: _Positive
    """Bytes per second one way between domains: that of a node over its chips."""
    domain_latency: _Positive
    """Seconds per hop within a domain."""
    network_latency: _Positive
    """Seconds per hop between domains."""
    host_bandwidth: _Positive = 25e9
    """Bytes per second one way to the host's memory: PCIe 4 x16 gets about this."""
    power_watts: _Positive | None = None
    """Of the board at full load, without its share of the server; None: not published."""
    price_per_hour: _Positive | None = None
    """Of one chip, in the user's currency; None: not given."""
    compute_capability: _Positive | None = None
    """NVIDIA's number for what a chip can do, 9.0 for H100; None: another maker's."""
    compile_target: _Text | None = None
    """The file of `stack/hardware/targets` it is compiled for; None: the compiler knows no such chip."""
    efficiency: Efficiency
    """What programs get of these figures."""
    source: _Text
    """Where most of the figures are printed; the file has that of each."""

    @property
    def platform(self) -> Platform:
        """What JAX calls its kind of device; `gpu` is NVIDIA's."""
        if self.compute_capability is not None:
            return "gpu"
        return "cpu" if self.generation == "cpu" else "tpu" if self.generation == "tpu" else "rocm"


def names() -> tuple[str, ...]:
    """The chips that come with Stack, as `load` knows them."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml") if path != _GENERATIONS))


def load(name_or_path: str | Path) -> Hardware:
    """A chip that comes with Stack, or one of the user's own.

    Args:
      name_or_path: a name or an alias, in any case (`h100`, `A100-80GB`), or a YAML file with the
        fields of `Hardware`, save its name, which is the file's. `base: h100` in it (or the path of
        another such file) gives the fields it leaves out.

    Raises:
      ConfigError: there is no such chip or file, or what is wrong in the file, with its line.
    """
    name = str(name_or_path)
    if path := _find_file(name):
        return _chip(path.stem)
    path = expand(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _build(path)
    raise _unknown(name)


def lookup(device_kind: str) -> Hardware | None:
    """The chip of a `jax.Device.device_kind`; None if it is not among them, as a CPU never is."""
    if device_kind == "cpu":  # All the files need not be read to know that.
        return None
    # Matched whole: "... MIG 3g.40gb" is a part of a chip and has not its peak.
    return next((chip for chip in _chips().values() if device_kind in chip.device_kinds), None)


def generations() -> dict[str, Efficiency]:
    """The efficiencies of each generation of chips."""
    read = _generation_file().plain()["generations"]
    return {name: Efficiency(**constants) for name, constants in read.items()}


def ranges() -> dict[str, tuple[float, float]]:
    """What each efficiency can physically be, lowest and highest."""
    return {name: (low, high) for name, (low, high) in _generation_file().plain()["ranges"].items()}


@cache
def _generation_file() -> Located:
    return read_file(_GENERATIONS)


@cache
def _chips() -> dict[str, Hardware]:
    """All chips that come with Stack, by name."""
    return {name: _chip(name) for name in names()}


@cache
def _chip(name: str) -> Hardware:
    return _build(_FOLDER / f"{name}.yaml")


def _find_file(name: str) -> Path | None:
    """The file of a chip of Stack's; None where the name is that of a file."""
    if name.casefold() in names():
        return _FOLDER / f"{name.casefold()}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        return None
    for chip in _chips().values():
        if name.casefold() in chip.aliases:
            return _FOLDER / f"{chip.name}.yaml"
    return None


def _base(name: str) -> Path | None:
    """The file of a `base:`; one without a suffix can only be a chip of Stack's."""
    path = _find_file(name)
    if path is None and not Path(name).suffix:
        raise _unknown(name)
    return path


def _unknown(name: str) -> ConfigError:
    aliases = [alias for chip in _chips().values() for alias in chip.aliases]
    close = nearest(name.casefold(), [*names(), *aliases])
    return ConfigError(
        f"hardware {name!r} is unknown{f'; did you mean {close}?' if close else ''}; there are "
        f"{', '.join(names())}, or give a YAML file (stack doctor --calibrate FILE writes one)"
    )


def _build(path: Path) -> Hardware:
    own = read_file(path, named=_base)
    located = merge(_defaults(path, own), own)
    try:
        return TypeAdapter(Hardware).validate_python(located.plain())
    except ValidationError as error:
        raise ConfigError(_explain(error, located)) from None


def _defaults(path: Path, own: Located) -> Located:
    """What a file may leave out: its name, and the efficiencies of its generation."""
    place = Place(text=str(path))
    fields = {"name": Located(value=path.stem, place=place)}
    generation = own.find(("generation",))
    if generation and (constants := _generation_file().find(("generations", generation.value))):
        fields["efficiency"] = constants
    return Located(value=fields, place=place)


def _explain(error: ValidationError, located: Located) -> str:
    """One error in one line: the place, the field, the remedy. A name misspelt comes before one missing."""
    errors = sorted(error.errors(include_url=False), key=lambda one: not _misspelt(one))
    path, kind = tuple(key for key in errors[0]["loc"] if key != "[key]"), errors[0]["type"]
    name, where = dotted(path), located.nearest_place(path).text
    if _misspelt(errors[0]):
        fields = _fields(path[:-1])
        close = nearest(str(path[-1]), fields)
        remedy = f"did you mean {dotted((*path[:-1], close))}?" if close else f"there are {', '.join(fields)}"
        return f"{where}: {name} is not a field; {remedy}"
    if kind == "missing" and path[0] == "efficiency":
        return f"{where}: {name} is missing; give it, or as generation one of {', '.join(generations())}"
    if kind == "missing":
        return f"{where}: {name} is missing; give it, or `base:` another chip, such as h100"
    if kind == "too_short":
        return f"{where}: {name} is empty; give one of {', '.join(_fields(path))}"
    return explain(error, cast("type[BaseModel]", Hardware), located)


def _misspelt(error: ErrorDetails) -> bool:
    return error["type"] == "unexpected_keyword_argument" or "[key]" in error["loc"]


def _fields(path: Keys) -> list[str]:
    """Names of what may stand under a path."""
    if path == ("peak_flops",):
        return list(get_args(Precision))
    owner = Efficiency if path == ("efficiency",) else Hardware
    return [field.name for field in dataclasses.fields(owner)]
