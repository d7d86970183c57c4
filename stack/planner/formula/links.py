"""Seconds that data takes over the links of a chip."""

import math

from stack.hardware.chip import Hardware


def ring_seconds(size: float, members: int, stride: int, chip: Hardware) -> float:
    """An all-gather whose result has `size` bytes, or a reduce-scatter of so many.

    Args:
      size: bytes.
      members: devices that take part.
      stride: distance between them in the order of devices; those within a domain share fast links.
      chip: its links.
    """
    if members == 1:
        return 0.0
    inside = max(1, min(members, chip.domain_size // stride))
    nodes = math.ceil(members / inside)
    seconds = size * (members - 1) / members / chip.domain_bandwidth if inside > 1 else 0.0
    if nodes > 1:
        seconds = max(seconds, size * (nodes - 1) / nodes / (chip.network_bandwidth * inside))
    latency = chip.domain_latency * (inside - 1) + chip.network_latency * (nodes - 1)
    return seconds / chip.efficiency.link + latency


def exchange_seconds(size: float, members: int, stride: int, chip: Hardware) -> float:
    """An all-to-all in which every device ends with `size` bytes, each member's part of them.

    Args: as those of `ring_seconds`.
    """
    if members == 1:
        return 0.0
    inside = max(1, min(members, chip.domain_size // stride))
    seconds = size * (inside - 1) / members / chip.domain_bandwidth
    if members > inside:  # Nobody passes anything on: each part crosses by its own device's network.
        seconds = max(seconds, size * (members - inside) / members / chip.network_bandwidth)
    latency = chip.domain_latency if members == inside else chip.network_latency
    return seconds / chip.efficiency.link + latency


def send_seconds(size: float, *, inside: bool, chip: Hardware) -> float:
    """`size` bytes from one device to its neighbour, which shares fast links with it or does not."""
    bandwidth = chip.domain_bandwidth if inside else chip.network_bandwidth
    latency = chip.domain_latency if inside else chip.network_latency
    return size / (bandwidth * chip.efficiency.link) + latency
