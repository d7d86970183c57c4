"""Boxes of arrays: what one device holds, what one piece of a file holds, and what they share."""

from collections.abc import Iterator

import jax
from jax.sharding import Sharding

Box = tuple[tuple[int, int], ...]
"""First index and the one after the last, of every axis."""


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box that an index of slices takes of an array."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, list[jax.Device]]:
    """The boxes of an array, each with the devices that hold it, in the order of their numbers."""
    holders: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        assert index is not None
        holders.setdefault(box_of(index, shape), []).append(device)
    return {box: sorted(devices, key=lambda device: device.id) for box, devices in holders.items()}


def size(box: Box) -> int:
    """Elements in it."""
    count = 1
    for start, stop in box:
        count *= stop - start
    return count


def split(box: Box, limit: int) -> Iterator[Box]:
    """Parts of at most so many elements, each contiguous within the box."""
    if size(box) <= limit:
        yield box
        return
    axis = next(number for number, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[axis]
    middle = (start + stop) // 2
    for part in ((start, middle), (middle, stop)):
        yield from split((*box[:axis], part, *box[axis + 1 :]), limit)


def overlap(one: Box, other: Box) -> Box | None:
    """What both have; None where that is nothing."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The index of a box in an array that holds an outer one."""
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, outer, strict=True))


def rows(box: Box, outer: Box) -> tuple[int, int, int]:
    """The range of elements, in the outer box's own order, that holds an inner one, and their axis.

    Whole rows of the first axis that has more than one: what is contiguous.

    Returns:
        The first element, the one after the last, and the axis whose rows they are.
    """
    axis = next((number for number, (low, high) in enumerate(outer) if high - low > 1), 0)
    if not outer:
        return 0, 1, 0
    row = size(outer) // (outer[axis][1] - outer[axis][0])
    low = outer[axis][0]
    return (box[axis][0] - low) * row, (box[axis][1] - low) * row, axis
