"""What XLA makes of all that is no matrix product: kernels, bytes, and the most that others could win.

    uv run python benchmarks/fusions.py configs/llama3_8b.yaml --hardware h200 --devices 8 [key=value ...]

Needs the extra `plan`. Compiles the training step for GPUs that are not here and reads its scheduled HLO.
Each kernel that is neither a product, attention nor a collective counts with the bytes that it reads and
writes, under the first of `PARTS` whose source any of its arithmetic has. Milliseconds are these bytes at
the memory bandwidth that the planner takes programs to get; shares are of the step that it predicts: what a
kernel would win whose work vanished without a trace into the products beside it, so more than any wins.
Below the table: the kernels of each part, most bytes first, then the products and how many there are.
"""

import argparse
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from stack import load
from stack.hardware import chip as chips
from stack.planner.compiled.collectives import runs, sources
from stack.planner.compiled.compile import compile_step, devices
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config

PARTS = {
    "norm": r"layers/norm",
    "rotary": r"layers/rotary",
    "activation": r"layers/mlp",
    "loss": r"linear_cross_entropy|objectives/",
    "optimizer": r"step/(optimizer|groups|guard|step)",
    "embedding": r"layers/embedding",
    "attention mask": r"kernels/attention",
    "residual": r"models/block",
    "bias": r"layers/linear",
    "weights cast, gradients added": r"parallel/zero",
    "kept for the backward pass": r"models/stack",
}
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "f32": 32, "s32": 32, "u32": 32, "f64": 64}
PRODUCT = re.compile(r" dot\(|__cublas|__cudnn|__triton_gemm")
HEADING = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z\-]+)\((.*)$")
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes into its first operand, and which operand holds what is written."""
FILLS = {"parameter", "constant", "broadcast", "copy", "bitcast"}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a program's text."""

    root: bool
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What runs on its own."""

    part: str
    """A key of `PARTS`, `product`, `copies and zeros` or `other`."""
    type: str
    """Of its result."""
    moved: int
    """Bytes read and written, once."""
    times: int
    """Runs per step."""


def computations(hlo: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of each computation, by name."""
    found: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        if heading := HEADING.match(line):
            body = found[heading[1]] = {}
        elif match := INSTRUCTION.match(line):
            root, name, type_text, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([^\s,()]+)", rest.split("), ")[0]))
            body[name] = Instruction(
                root=bool(root), name=name, type=type_text, opcode=opcode, operands=operands, text=line
            )
    return found


def size(type_text: str) -> int:
    """Bytes of all arrays of a type."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * BITS[dtype] // 8
        for dtype, shape in re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", type_text)
        if dtype in BITS
    )


def moved_by_fusion(body: dict[str, Instruction]) -> int:
    """Bytes that a fused computation reads and writes: of what it slices or updates, that part alone."""
    total = 0
    for instruction in body.values():
        if instruction.opcode == "parameter":
            total += _read(instruction, body)
        if instruction.root:
            total += sum(_written(result, body) for result in _results(instruction, body))
    return total


def _read(array: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes that are read of a parameter of a fusion, through its bitcasts."""
    total = 0
    for user in body.values():
        if array.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total = max(total, _read(user, body))
        elif user.opcode in SLICES:
            total += size(user.type)
        elif user.opcode not in UPDATES or user.operands[0] != array.name:
            return size(array.type)
    return min(total, size(array.type))


def _results(root: Instruction, body: dict[str, Instruction]) -> list[Instruction]:
    return [body[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(result: Instruction, body: dict[str, Instruction]) -> int:
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    if (place := UPDATES.get(result.opcode)) is not None:
        result = body[result.operands[place]]
    return size(result.type)


def kernels(hlo: str) -> Iterator[Kernel]:
    """All kernels of a step but collectives, with what they move and how often they run."""
    bodies, times, lines = computations(hlo), runs(hlo), sources(hlo)
    fused = set(re.findall(r"calls=%([^\s,}]+)", hlo)) | set(re.findall(r"to_apply=%([^\s,}]+)", hlo))
    for computation, body in bodies.items():
        if computation in fused or not times[computation]:
            continue
        for instruction in body.values():
            if instruction.opcode in ("fusion", "fusion-start"):
                called = re.search(r"calls=%([^\s,}]+)", instruction.text)
                assert called is not None
                inner = bodies[called[1]]
                text = instruction.text + "".join(each.text for each in inner.values())
                opcodes = {each.opcode for each in inner.values()}
                moved, result = moved_by_fusion(inner), next(i.type for i in inner.values() if i.root)
            elif instruction.opcode in ("custom-call", "copy", "copy-start"):
                read = (body[name].type for name in instruction.operands if name in body)
                text, result = instruction.text, instruction.type.split("}, ")[0]
                moved, opcodes = size(result) + sum(map(size, read)), {instruction.opcode}
            else:
                continue
            if re.search(r"all-reduce|all-gather|reduce-scatter", text.split("metadata=")[0]):
                continue
            frames = (lines.get(int(frame), "") for frame in re.findall(r"stack_frame_id=(\d+)", text))
            part = "product" if PRODUCT.search(text) else part_of(" ".join(frames))
            if opcodes <= FILLS:
                part = "copies and zeros"
            yield Kernel(
                part=part,
                type=re.sub(r"\{[^}]*\}", "", result),
                moved=moved,
                times=times[computation],
            )


def part_of(files: str) -> str:
    """The first part whose source is among those of a kernel."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, files)), "other")


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument(
        "--hlo", type=Path, help="keep the program's text in this file, or read it from there"
    )
    arguments = parser.parse_intermixed_args()

    config, chip = load(arguments.config, arguments.overrides), chips.load(arguments.hardware)
    if chip.compile_target is None:
        parser.error(f"{chip.title} cannot be compiled for without one")
    if arguments.hlo and arguments.hlo.exists():
        hlo = arguments.hlo.read_text()
    else:
        hlo = compile_step(config, devices(chip.compile_target, arguments.devices)).as_text() or ""
        if arguments.hlo:
            arguments.hlo.write_text(hlo)
    step = step_time(from_config(config, arguments.devices, chip), chip).total
    rate = chip.memory_bandwidth * chip.efficiency.memory
    print(f"{config.name} on {arguments.devices} {chip.title}: {step:.4g} s a step, by the planner")
    print(f"{'part':32} {'kernels':>8} {'GB':>9} {'ms':>9} {'of step':>8}")
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels(hlo):
        groups[kernel.part].append(kernel)
    products = groups.pop("product")
    ordered = sorted(groups.items(), key=lambda item: -sum(each.moved * each.times for each in item[1]))
    for part, members in ordered:
        total, number = sum(each.moved * each.times for each in members), sum(each.times for each in members)
        seconds = total / rate
        print(f"{part:32} {number:8} {total / 1e9:9.2f} {1e3 * seconds:9.2f} {seconds / step:8.2%}")
    for part, members in ordered:
        print(f"\n{part}")
        largest: Counter[tuple[int, str]] = Counter()
        for each in members:
            largest[each.moved, each.type[:80]] += each.times
        for (moved, kind), number in sorted(largest.items(), key=lambda item: -item[0][0] * item[1])[:8]:
            print(f"  {number:6} x {moved / 1e6:9.2f} MB -> {kind}")
    print("\nproducts and attention")
    shapes: Counter[str] = Counter()
    for each in products:
        shapes[each.type[:80]] += each.times
    for kind, number in shapes.most_common():
        print(f"  {number:6} x {kind}")


if __name__ == "__main__":
    main()
