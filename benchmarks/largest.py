"""The largest model that fits, by what is done about memory, as the announcement of ZeRO has it.

    uv run python benchmarks/largest.py --hardware h100 --devices 8 [--json]

Models are of one family, GPT-2's blocks with heads of 128: `heads` layers of width 128 x heads, or one or
two layers more. That is the aspect of GPT-3's 6.7B, 13B and 175B (arXiv 2005.14165, table 2.1), and each
member is larger than the one before by a share of about 1 / heads.

Beside it, the predicted speed of splitting matrices inside nodes only, with ZeRO between them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

from stack.config import Config, DataConfig, DecoderConfig, MeshConfig, StackError, TrainConfig
from stack.hardware import chip as chips
from stack.hardware.chip import Hardware
from stack.models.flops import train_flops_per_token
from stack.parallel.mesh import without_cache
from stack.planner.compiled import compile as compiling
from stack.planner.formula.memory import memory
from stack.planner.formula.result import Memory
from stack.planner.formula.shapes import num_parameters
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload, from_config
from stack.planner.search.layouts import describe, divisors

HEAD_WIDTH = 128
VOCAB_SIZE = 50_257
"""GPT-2's."""

SPEED_BATCH, SPEED_LENGTH = 512, 1024
"""T-NLG's rows and tokens of a row."""
SPEED_SIZES = ((20, 64), (124, 128))
"""Layers of width 8,192, and chips, which are also the heads: 17 and 100 billion parameters."""

Source = Literal["compiled", "formula"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What is done about memory."""

    name: str
    zero: Literal[0, 1, 2, 3]
    remat: Literal["none", "full"] = "none"
    offload_optimizer: bool = False
    offload_activations: bool = False


METHODS = (
    Method(name="plain data parallelism", zero=0),
    Method(name="the same, full remat", zero=0, remat="full"),
    Method(name="ZeRO 1", zero=1),
    Method(name="ZeRO 2", zero=2),
    Method(name="ZeRO 3", zero=3),
    Method(name="ZeRO 3, full remat", zero=3, remat="full"),
    Method(name="+ optimizer offload", zero=3, remat="full", offload_optimizer=True),
    Method(
        name="+ activation offload",
        zero=3,
        remat="full",
        offload_optimizer=True,
        offload_activations=True,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """Bytes per device of one step."""

    device: float
    """The step's and the reserve of the runtime."""
    host: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The largest member of the family that fits, and the next, which does not."""

    method: Method
    model: DecoderConfig
    parameters: int
    """Without the padding of the vocabulary."""
    use: Use
    next_parameters: int
    next_use: Use
    source: Source
    """Where both uses are from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Matrices split over all chips, across nodes, against split in nodes and ZeRO between them.

    Both as fast as memory allows: the micro-batch, remat and, with ZeRO, the stage and the ways in a
    node are the fastest that fit; sequence parallelism is left out of both.
    """

    parameters: int
    devices: int
    batch: int
    """Rows per step, the same for both."""
    naive: Workload | None
    """None: nothing fits."""
    naive_seconds: float
    zero: Workload | None
    zero_seconds: float
    flops: float
    """Of a step, per device, attention over whole rows, without what is computed again."""

    @property
    def ratio(self) -> float | None:
        """How many times faster; None: there is nothing to compare with."""
        return None if self.naive is None or self.zero is None else self.naive_seconds / self.zero_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest:
    """The answer of `stack plan --largest`."""

    hardware: Hardware
    devices: int
    length: int
    memory_bytes: float
    """Of each device."""
    rows: tuple[Row, ...]
    speeds: tuple[Speed, ...]
    note: str = ""
    """Why memory is by formula, where it is."""

    def ratio(self, row: Row) -> float:
        """Parameters of a row over those of the first."""
        return row.parameters / self.rows[0].parameters


def largest(
    hardware: str,
    devices: int,
    *,
    length: int = 2048,
    memory_bytes: float | None = None,
    methods: Iterable[Method] = METHODS,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Largest:
    """The largest model that fits on each device of a mesh, method by method, one row a device.

    Every size that is reported, and the next that does not fit, is compiled for the chip; the formula
    only says where to look. Two or three compilations a method, about 10 CPU seconds each.

    Args:
      hardware: a chip, as `stack.hardware.chip.load` takes it.
      devices: how many; parameters are split over all of them, and rows.
      length: tokens of a row.
      memory_bytes: of each device; None: the chip's.
      methods: the first is what others are compared with.
      compiled: False takes the formula's word for it, which a chip the compiler does not know always gets.
      progress: told of each compilation.

    Raises:
      ConfigError: the chip is not known.
      StackError: not even the smallest member of the family fits.
    """
    chip = chips.load(hardware)
    limit = chip.memory_bytes if memory_bytes is None else memory_bytes
    note = _why_formula(chip) if compiled else "asked for without compiling"

    def row(method: Method) -> Row:
        def formula(number: int) -> Use:
            need = _formula(config(number, method, devices, length), devices, chip)
            return Use(device=need.total, host=need.host)

        def measure(number: int) -> Use:
            progress(f"compiling {method.name}: {_billions(num_parameters(member(number, length)))}")
            return _compiled_use(config(number, method, devices, length), devices, chip)

        best, uses = boundary(limit, formula, formula if note else measure)
        if best < 0:
            raise StackError(
                f"{method.name}: not even {num_parameters(member(0, length)) / 1e6:.0f} M parameters fit in "
                f"{limit / 1e9:.3g} GB; give a larger memory or shorter rows"
            )
        return Row(
            method=method,
            model=member(best, length),
            parameters=num_parameters(member(best, length)),
            use=uses[best],
            next_parameters=num_parameters(member(best + 1, length)),
            next_use=uses[best + 1],
            source="formula" if note else "compiled",
        )

    return Largest(
        hardware=chip,
        devices=devices,
        length=length,
        memory_bytes=limit,
        rows=tuple(row(method) for method in methods),
        speeds=tuple(against_naive_tensor(chip, *size) for size in SPEED_SIZES),
        note=note,
    )


def member(number: int, length: int) -> DecoderConfig:
    """One of the family, from 0: three of every width."""
    heads, more = number // 3 + 1, number % 3
    return DecoderConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=heads + more,
        embed_dim=HEAD_WIDTH * heads,
        num_heads=heads,
        max_length=length,
    )


def config(number: int, method: Method, devices: int, length: int) -> Config:
    """A member of the family, trained by a method with one row a device."""
    mesh = MeshConfig(data=devices, fsdp=1, zero=0) if method.zero == 0 else MeshConfig(zero=method.zero)
    return Config(
        model=member(number, length),
        data=DataConfig(sequence_length=length, packed=False),
        mesh=mesh,
        train=TrainConfig(
            batch_size=devices,
            remat=method.remat,
            offload_optimizer=method.offload_optimizer,
            offload_activations=method.offload_activations,
        ),
    )


def boundary(
    limit: float, formula: Callable[[int], Use], measure: Callable[[int], Use]
) -> tuple[int, dict[int, Use]]:
    """The largest number whose measured use is within the limit while the next one's is not.

    Args:
      limit: bytes.
      formula: grows with the number; says where to measure, corrected by the last two measurements.
      measure: dear.

    Returns:
      The number, -1 if 0 is over the limit; and what was measured, of it and the next at least.
    """
    uses: dict[int, Use] = {}
    low, high = -1, None
    slope, at = 1.0, (0.0, 0.0)  # Of what is measured over what the formula says, and where it starts.

    def fits(number: int) -> bool:
        return at[1] + slope * (formula(number).device - at[0]) <= limit

    while high is None or high - low > 1:
        number = max(low + 1, _last(fits))
        if high is not None:
            number = min(number, high - 1)
        uses[number] = measure(number)
        here = (formula(number).device, uses[number].device)
        slope = min(2.0, max(0.5, (here[1] - at[1]) / (here[0] - at[0])))
        at = here
        if uses[number].device <= limit:
            low = number
        else:
            high = number
    return low, uses


def _last(holds: Callable[[int], bool]) -> int:
    """The last number from 0 for which something holds, that then ceases for good; -1: for none."""
    low, high = -1, 0
    while holds(high):
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _why_formula(chip: Hardware) -> str:
    if chip.compile_target is None:
        return f"the compiler knows no {chip.title}"
    return "" if compiling.has_plugin() else compiling.MISSING_PLUGIN


def _formula(config: Config, devices: int, chip: Hardware) -> Memory:
    return memory(from_config(config, devices, chip))


def _compiled_use(config: Config, devices: int, chip: Hardware) -> Use:
    """What the compiled step takes; the runtime's reserve, which no compiler sees, is the formula's."""
    assert chip.compile_target is not None
    with compiling.capture_stderr(), without_cache():
        compiled = compiling.compile_step(config, compiling.devices(chip.compile_target, devices))
    stats: Any = compiled.memory_analysis()

    def size_of(where: str) -> int:
        sizes = {name: getattr(stats, f"{where}{name}_size_in_bytes") for name in _SIZES}
        return sum(sizes.values()) - 2 * sizes["alias"]

    return Use(device=size_of("") + _formula(config, devices, chip).reserve, host=size_of("host_"))


_SIZES = ("argument", "output", "temp", "alias")


def against_naive_tensor(chip: Hardware, num_layers: int, devices: int) -> Speed:
    """Two ways to lay a model over many chips, by the formulas of memory and time."""
    model = DecoderConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=num_layers,
        embed_dim=8192,
        num_heads=devices,
        max_length=SPEED_LENGTH,
    )
    start = from_config(
        Config(
            model=model,
            data=DataConfig(sequence_length=SPEED_LENGTH, packed=False),
            train=TrainConfig(batch_size=SPEED_BATCH),
        ),
        1,
        chip,
    )
    in_node = [ways for ways in divisors(devices) if 1 < ways <= chip.domain_size]
    naive = _fastest(chip, [dataclasses.replace(start, tensor=devices, zero=0)])
    zero = _fastest(
        chip,
        [
            dataclasses.replace(start, tensor=ways, fsdp=devices // ways, zero=stage)
            for ways in in_node
            for stage in (1, 2, 3)
        ],
    )
    return Speed(
        parameters=num_parameters(model),
        devices=devices,
        batch=SPEED_BATCH,
        naive=naive,
        naive_seconds=step_time(naive, chip).total if naive else float("inf"),
        zero=zero,
        zero_seconds=step_time(zero, chip).total if zero else float("inf"),
        flops=train_flops_per_token(model, SPEED_LENGTH, "full") * start.tokens / devices,
    )


def _fastest(chip: Hardware, layouts: list[Workload]) -> Workload | None:
    """With the micro-batch and remat that make a step the shortest, of what fits; None: nothing does."""
    fitting = [
        work
        for layout in layouts
        for rows in divisors(layout.batch // layout.replicas)
        for remat in ("none", "save_qkv_proj", "full")
        if memory(work := dataclasses.replace(layout, micro_batch=rows, remat=remat)).total
        <= chip.memory_bytes
    ]
    return min(fitting, key=lambda work: step_time(work, chip).total, default=None)


def lines(result: Largest) -> list[str]:
    """The answer in print."""
    on = f"{result.devices:,} x {result.hardware.title} of {_gigabytes(result.memory_bytes)}"
    by = f"by formula ({result.note})" if result.note else "by compiled memory"
    return [
        f"the largest model on {on}, one row of {result.length:,} tokens a device,",
        f"{by}; the runtime's reserve is in it",
        *_table(result),
        *_ANNOUNCED_SIZE,
        "",
        "predicted speed of tensor parallelism over all nodes, and of ZeRO with it inside a node",
        *(f"  {line}" for speed in result.speeds for line in _speed_lines(speed, result.hardware)),
        "  announced in 2020: 10 times faster",
    ]


_ANNOUNCED_SIZE = (
    "  with one micro-batch a step ZeRO 2 holds what ZeRO 1 does; ratios grow with the devices",
    "  announced in 2020: 15 times larger; DeepSpeed's own post said 10 (170 B on 400 V100 against 17 B),",
    "  and 170 B over 11 B is 15.5, the likely origin",
)


def _table(result: Largest) -> list[str]:
    headings = ("", "parameters", "layers x width", "device", "host", "ratio", "next size")
    rows = [
        (
            row.method.name,
            _billions(row.parameters),
            f"{row.model.num_layers} x {row.model.embed_dim}",
            _gigabytes(row.use.device),
            _gigabytes(row.use.host) if row.use.host else "-",
            f"{result.ratio(row):.1f}x",
            f"{_billions(row.next_parameters)} needs {_gigabytes(row.next_use.device)}",
        )
        for row in result.rows
    ]
    cells = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([" ", line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells
    ]


def _speed_lines(speed: Speed, chip: Hardware) -> list[str]:
    def one(work: Workload | None, seconds: float) -> str:
        if work is None:
            return "nothing fits"
        return f"{seconds:.2f} s a step, {speed.flops / seconds / 1e12:.1f} TFLOP/s a chip ({describe(work)})"

    ratio = "" if speed.ratio is None else f": {speed.ratio:.1f} times faster"
    what = f"{_billions(speed.parameters)} on {speed.devices} x {chip.title}"
    return [
        f"{what}, {speed.batch} rows of {SPEED_LENGTH:,}{ratio}",
        f"  over nodes  {one(speed.naive, speed.naive_seconds)}",
        f"  ZeRO        {one(speed.zero, speed.zero_seconds)}",
    ]


def as_dict(result: Largest) -> dict[str, Any]:
    """The answer for JSON: bytes per device, seconds, `null` where nothing fits."""
    return {
        "hardware": result.hardware.name,
        "devices": result.devices,
        "length": result.length,
        "device_memory_bytes": result.memory_bytes,
        "note": result.note,
        "rows": [
            {
                "method": row.method.name,
                **{name: value for name, value in dataclasses.asdict(row.method).items() if name != "name"},
                "parameters": row.parameters,
                "num_layers": row.model.num_layers,
                "embed_dim": row.model.embed_dim,
                "bytes_per_device": row.use.device,
                "host_bytes": row.use.host,
                "ratio": result.ratio(row),
                "next_parameters": row.next_parameters,
                "next_bytes_per_device": row.next_use.device,
                "memory_source": row.source,
            }
            for row in result.rows
        ],
        "speeds": [
            {
                "parameters": speed.parameters,
                "devices": speed.devices,
                "batch_size": speed.batch,
                "naive": speed.naive and describe(speed.naive),
                "naive_step_seconds": speed.naive and speed.naive_seconds,
                "zero": speed.zero and describe(speed.zero),
                "zero_step_seconds": speed.zero and speed.zero_seconds,
                "ratio": speed.ratio,
            }
            for speed in result.speeds
        ],
    }


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:.2f} B"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def main() -> None:
    """Finds the largest models of a cluster and prints them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", required=True, help="a chip by name, or a YAML file of one")
    parser.add_argument("--devices", type=int, required=True, help="how many")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args()
    try:
        result = largest(
            arguments.hardware, arguments.devices, progress=lambda text: print(text, file=sys.stderr)
        )
    except StackError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(as_dict(result), indent=2) if arguments.json else "\n".join(lines(result)))


if __name__ == "__main__":
    main()
