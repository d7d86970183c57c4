"""The collectives of a compiled program: what moves, between whom, how often, and which line wants it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

_BITS = {
    "pred": 8,
    "s8": 8,
    "u8": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "s32": 32,
    "u32": 32,
    "f64": 64,
    "s64": 64,
}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?(\S+) = (.+?) ({_KINDS})(-start)?\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_CALLEE = re.compile(r"(?:calls|body|condition|to_apply|called_computations)=\{?%([^\s,}]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ABOUT = re.compile(r'op_name="[^"]*about_(\d+)(?:_of_(\d+))?_times/while"')
_CARRY = re.compile(r"%[^\s,()]+#(\d+)|get-tuple-element\([^)]*\), index=(\d+)")
_DEFINITION = re.compile(r"^\s+(?:ROOT )?%(\S+) = ")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_ENTRY = re.compile(r"^(\d+) (.+)$")
_KERNEL = re.compile(r'custom_call_target="([^"]+)"|"kind":"(__triton[^"]*)"')
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of the program of one device."""

    kind: str
    """`all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`."""
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    """Dtype and shape of each result."""
    axes: tuple[str, ...]
    """The mesh axes it goes over; empty where the members are not told."""
    group_size: int
    """Devices that take part together."""
    times: int
    """Runs per step: trip counts of the loops around it, multiplied."""
    name: str
    """Of the operation in the traced program."""
    source: str = ""
    """The line that wants it, as `stack/layers/linear.py:37`; empty where the compiler made it up."""

    @property
    def elements(self) -> int:
        """Elements of the larger side: what is gathered to, reduced, or scattered from."""
        results = sum(math.prod(shape) for _, shape in self.arrays)
        return results * (self.group_size if self.kind == "reduce-scatter" else 1)

    @property
    def bytes(self) -> int:
        """Bytes of the larger side, once."""
        results = sum(math.prod(shape) * _BITS.get(dtype, 32) // 8 for dtype, shape in self.arrays)
        return results * (self.group_size if self.kind == "reduce-scatter" else 1)


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective in the scheduled HLO text of one device.

    Args:
      hlo: `compiled.as_text()`.
      mesh: the mesh axes and their sizes, in order; device n is at place n of it.
    """
    times, lines = runs(hlo), sources(hlo)
    operations, computation = [], ""
    for line in hlo.splitlines():
        if heading := _COMPUTATION.match(line):
            computation = heading[2]
        elif (match := _INSTRUCTION.match(line)) and times[computation]:
            _, result, kind, start, rest = match.groups()
            group = _first_group(rest)
            name = re.search(r'op_name="([^"]*)"', rest)
            frame = _FRAME.search(rest)
            operations.append(
                Collective(
                    kind=kind,
                    arrays=_arrays(_results(result) if start else result),
                    axes=_axes(group, mesh),
                    group_size=len(group),
                    times=times[computation],
                    name=name[1] if name else "",
                    source=lines.get(int(frame[1]), "") if frame else "",
                )
            )
    return operations


def bytes_between_nodes(operations: Iterable[Collective], mesh: Mapping[str, int], node: int) -> float:
    """Bytes per step that come into one node from the others, at the least.

    Of n nodes, a gather brings a node what the other n - 1 have, once, however many of its devices want it;
    a scatter brings one sum from each of them of what stays there; a sum that all have is both.

    Args:
      operations: of the program of one device; every group of one crosses nodes as that of device 0 does.
      mesh: the mesh axes and their sizes, in order; device n is at place n of it.
      node: devices of a node, which are neighbours.
    """
    devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    total = 0.0
    for one in operations:
        group = devices[tuple(slice(None) if axis in one.axes else 0 for axis in mesh)].reshape(-1)
        nodes = len(set((group // node).tolist()))
        members = len(group) // nodes  # In one node.
        ways = {"all-reduce": 2, "all-to-all": members, "collective-permute": nodes / (nodes - 1 or 1)}
        crossing = one.bytes * (nodes - 1) / nodes * ways.get(one.kind, 1)
        total += crossing * one.times * node / members
    return total


def kernels(hlo: str) -> dict[str, int]:
    """Kernels that are not XLA's own, by name, and how often each runs in one step.

    Custom calls (cuDNN, cuBLAS, Mosaic) by their target; Triton's by what XLA uses it for.
    """
    counts: Counter[str] = Counter()
    times, computation = runs(hlo), ""
    for line in hlo.splitlines():
        if heading := _COMPUTATION.match(line):
            computation = heading[2]
        elif times[computation] and "-done(" not in line and (kernel := _KERNEL.search(line)):
            counts[kernel[1] or kernel[2]] += times[computation]
    return dict(counts.most_common())


def sources(hlo: str) -> dict[int, str]:
    """File and line of each stack frame of a program's text: Stack's own or the user's innermost one.

    Frames in installed libraries are passed over for their callers.
    """
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in hlo.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables[line] = {}
        elif entry := _ENTRY.match(line):
            table[int(entry[1])] = entry[2]
        elif line.startswith(("%", "ENTRY")):
            break
    names = {number: text.strip('"') for number, text in tables.get("FileNames", {}).items()}
    places: dict[int, str | None] = {}
    for number, text in tables.get("FileLocations", {}).items():
        fields = _fields(text)
        places[number] = _own_line(names[fields["file_name_id"]], fields["line"])
    frames = {number: _fields(text) for number, text in tables.get("StackFrames", {}).items()}
    # The number of the parent is printed one too high in some versions; the first frame has none.
    shift = frames[1]["parent_frame_id"] if 1 in frames else 0
    owners: dict[int, str] = {}
    for number, frame in frames.items():  # Callers come before what they call.
        parent = owners.get(frame["parent_frame_id"] - shift, "")
        owners[number] = places[frame["file_location_id"]] or parent
    return {number: place for number, place in owners.items() if place}


def _fields(text: str) -> dict[str, int]:
    fields = {"parent_frame_id": 0, "line": 0}
    return fields | {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


def _own_line(file: str, line: int) -> str | None:
    path = Path(file)
    if path.is_relative_to(_PACKAGE):
        return f"{path.relative_to(_PACKAGE.parent)}:{line}"
    library = {"site-packages", "dist-packages"} & set(path.parts)
    return None if library or file.startswith("<") else f"{file}:{line}"


def runs(hlo: str) -> dict[str, int]:
    """How often each computation of a program's text runs in one step."""
    callers: dict[str, list[tuple[str, Fraction]]] = defaultdict(list)
    definitions = {match[1]: line for line in hlo.splitlines() if (match := _DEFINITION.match(line))}
    entry, computation = "", ""
    for line in hlo.splitlines():
        if heading := _COMPUTATION.match(line):
            computation = heading[2]
            entry = computation if heading[1] else entry
        elif computation:
            trips = _trips(line, hlo, definitions) if " while(" in line else Fraction(1)
            for callee in _CALLEE.findall(line):
                callers[callee].append((computation, trips))
    counts: dict[str, Fraction] = {entry: Fraction(1)}

    def count(name: str) -> Fraction:
        if name not in counts:
            counts[name] = sum((count(caller) * trips for caller, trips in callers[name]), Fraction(0))
        return counts[name]

    return defaultdict(int, {name: round(count(name)) for name in [*callers, entry]})


def _trips(line: str, hlo: str, definitions: Mapping[str, str]) -> Fraction:
    """Trips of a loop that counts by one: as the compiler notes, or from where it starts and ends.

    A loop as long as data say has a name that says about how often: `about_9_times`, or `about_8_of_33_times`
    of one that runs once in some of its turns.
    """
    if count := _TRIPS.search(line):
        return Fraction(int(count[1]))
    if count := _ABOUT.search(line):
        return Fraction(int(count[1]), int(count[2] or 1))
    operand, condition = re.search(r" while\(%([^)]+)\)", line), re.search(r"condition=%([^\s,]+)", line)
    if operand and condition:
        test = _text(condition[1], hlo)
        indices = dict.fromkeys(int(a or b) for a, b in _CARRY.findall(test))
        test += "".join(_text(callee, hlo) for callee in _CALLEE.findall(test))
        entries = re.findall(r"%([^\s,)]+)", definitions[operand[1]].split(" tuple(")[-1])
        bounds = [int(bound) for bound in re.findall(r" s32\[\] constant\((\d+)\)", test)]
        bounds += [n for index in indices if (n := _constant(entries[index], definitions)) is not None]
        if len(bounds) == 2:
            return Fraction(abs(bounds[0] - bounds[1]))
    raise ValueError(f"the compiled program has a loop of unknown length: {line.strip()[:80]}")


def _text(computation: str, hlo: str) -> str:
    start = hlo.index(f"\n%{computation} (")
    return hlo[start : hlo.index("\n}", start)]


def _constant(name: str, definitions: Mapping[str, str]) -> int | None:
    """The value of an integer that is a constant, or a copy of one."""
    while copy := re.search(r" copy\(%([^)]+)\)", definitions[name]):
        name = copy[1]
    value = re.search(r" constant\((\d+)\)", definitions[name])
    return int(value[1]) if value else None


def _results(type_text: str) -> str:
    """The results in the type of an asynchronous start, ((operands), results, ...)."""
    depth = 0
    for i, character in enumerate(type_text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 1:
            return type_text[i:]
    return type_text


def _arrays(type_text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(type_text)
        if dtype in _BITS
    )


def _first_group(text: str) -> list[int]:
    """The device numbers of the group that device 0 is in, from any of HLO's three notations."""
    if explicit := re.search(r"replica_groups=\{\{([0-9,]+)\}", text):
        return [int(number) for number in explicit[1].split(",")]
    if tiles := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text):
        groups, sizes, order = (_numbers(part) for part in tiles.groups())
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        return devices.transpose(order or range(len(sizes))).reshape(groups)[0].tolist()
    if names := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", names[1])}
        over = set(re.findall(r"'([^']+)'", names[2]))
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        index = tuple(slice(None) if axis in over else 0 for axis in sizes)
        return devices[index].reshape(-1).tolist()
    if pairs := re.search(r"source_target_pairs=\{\{([0-9]+),([0-9]+)\}", text):
        return [int(pairs[1]), int(pairs[2])]
    return []


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    if not group:
        return ()
    places = np.unravel_index(np.array(group), tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)
