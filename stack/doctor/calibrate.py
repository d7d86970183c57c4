"""A hardware file for this machine: what its devices do, as the planner reads it."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from stack.config import ConfigError
from stack.config.paths import check_writable, expand
from stack.doctor.timing import Measurement, Product, Transfer, measure
from stack.hardware.chip import Hardware, Precision, load, lookup


def run(path: str | Path | None = None) -> Iterator[str]:
    """`stack doctor --calibrate [FILE]`: measures the devices here and tells, a line at a time.

    Args:
      path: where the hardware file goes, `.yaml`; None: nowhere.

    Raises:
      ConfigError: the file exists, or is not named `.yaml` or `.yml`, or its folder does not exist.
    """
    target = None if path is None else _checked(expand(path))
    devices = jax.local_devices()
    yield f"measuring {len(devices)} x {devices[0].device_kind}, about half a minute"
    measurement = measure(devices)
    yield from lines(measurement)
    if target is not None:
        write(measurement, target)
        yield f"written to {target}; plan with --hardware {target}"


def fit_products(products: Sequence[Product], peaks: Mapping[Precision, float]) -> tuple[float, float]:
    """`Efficiency.matmul` and `matmul_half`: least squares of the relative error of the times.

    A product takes its FLOPs over the peak, over matmul, times 1 + half (1 / inner + 1 / columns).

    Args:
      products: with at least two weights of different width.
      peaks: FLOP/s by precision.
    """
    over_peak = np.array([peaks[product.precision] / product.rate for product in products])
    narrowness = np.array([1 / product.inner + 1 / product.columns for product in products])
    # No product is faster than the peak: what is fitted is by how much it is slower.
    extra, slope = _fit(np.ones_like(narrowness), narrowness, over_peak - 1, weights=1 / over_peak)
    return 1 / (1 + extra), max(slope / (1 + extra), 1.0)


def fit_transfers(transfers: Sequence[Transfer]) -> tuple[float, float]:
    """Bytes per second one way, and seconds per hop: least squares of the relative error of the times."""
    seconds = np.array([transfer.seconds for transfer in transfers])
    traffic = np.array([transfer.traffic for transfer in transfers])
    hops = np.array([float(transfer.hops) for transfer in transfers])
    per_byte, per_hop = _fit(traffic, hops, seconds, weights=1 / seconds)
    fastest = float(np.max(traffic / seconds))
    return (1 / per_byte if per_byte else fastest), max(per_hop, 1e-9)


def _fit(
    first: np.ndarray, second: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """The shares of first and second in target, neither negative, by weighted least squares."""
    columns = np.stack([first, second], axis=1) * weights[:, None]
    scale = np.linalg.norm(columns, axis=0)
    columns = columns / scale
    wanted = target * weights
    best, least = (0.0, 0.0), math.inf
    for used in ([0, 1], [0], [1]):
        shares = np.zeros(2)
        shares[used] = np.linalg.lstsq(columns[:, used], wanted)[0]
        error = float(np.square(columns @ shares - wanted).sum())
        if (shares >= 0).all() and error < least:
            best, least = (float(shares[0] / scale[0]), float(shares[1] / scale[1])), error
    return best


def hardware(measurement: Measurement, name: str) -> Hardware:
    """A chip with the efficiencies measured, of its printed peaks where it has them.

    Of a device without (a CPU, a chip Stack does not know), the peaks are the best products measured,
    and the bandwidths those measured. What cannot be measured here is that of `stand_in`.
    """
    standard, known = stand_in(measurement), lookup(measurement.device_kind) is not None
    chip = standard if known else _unprinted(measurement, standard)
    trained = measurement.products[0].precision
    # Printed peaks are reached to different shares: that of the precision of training counts.
    fitted = [one for one in measurement.products if not known or one.precision == trained]
    matmul, half = fit_products(fitted, chip.peak_flops)
    measured = {
        "matmul": matmul,
        "matmul_half": half,
        "attention": _attention_share(measurement, chip),
        "memory": min(measurement.memory_bandwidth / chip.memory_bandwidth, 1.0) if known else 1.0,
        "launch_seconds": measurement.launch_seconds,
    }
    if measurement.transfers:
        bandwidth, latency = fit_transfers(measurement.transfers)
        measured["link"] = min(bandwidth / chip.domain_bandwidth, 1.0) if known else 1.0
        chip = dataclasses.replace(chip, domain_latency=_rounded(latency))
    efficiency = {field: _rounded(value) for field, value in measured.items()}
    return dataclasses.replace(
        chip,
        name=name,
        title=f"{standard.title}, measured" if known else f"{measurement.device_kind}, measured",
        efficiency=dataclasses.replace(chip.efficiency, **efficiency),
        source=f"stack doctor --calibrate on {measurement.title}, JAX {jax.__version__}",
    )


def stand_in(measurement: Measurement) -> Hardware:
    """The chip that gives what is not measured: the same, or one like it."""
    like = {"cpu": "cpu", "tpu": "tpu-v5e"}.get(measurement.platform, "a100-pcie")
    return lookup(measurement.device_kind) or load(like)


def _unprinted(measurement: Measurement, standard: Hardware) -> Hardware:
    """A device whose figures nobody prints: its peaks are the best it did."""
    best: dict[Precision, float] = {}
    for product in measurement.products:
        best[product.precision] = max(best.get(product.precision, 0.0), _rounded(product.rate))
    bandwidth = standard.domain_bandwidth
    if measurement.transfers:
        bandwidth = fit_transfers(measurement.transfers)[0]
    return dataclasses.replace(
        standard,
        aliases=(),
        device_kinds=() if measurement.platform == "cpu" else (measurement.device_kind,),
        peak_flops=best,
        memory_bytes=_rounded(measurement.memory_bytes),
        memory_bandwidth=_rounded(measurement.memory_bandwidth),
        domain_size=measurement.devices,
        domain_bandwidth=_rounded(bandwidth),
        power_watts=None,
        price_per_hour=None,
        compute_capability=measurement.compute_capability,
        compile_target=None,
    )


def _attention_share(measurement: Measurement, chip: Hardware) -> float:
    """Of the 16-bit peak; the traffic of scores that are written is the memory's, 16 bytes each."""
    attention = measurement.attention
    seconds = attention.seconds
    if not attention.fused:
        seconds -= attention.heads * attention.length**2 * 16 / measurement.memory_bandwidth
    least = attention.flops / chip.peak_flops[attention.precision]
    return least / max(seconds, least)


def write(measurement: Measurement, path: Path) -> Hardware:
    """Writes the file that `load` reads and `--hardware` takes, and returns the chip it describes."""
    chip, standard = hardware(measurement, path.stem), stand_in(measurement)
    known = lookup(measurement.device_kind) is not None
    text = [f"# Written by {chip.source}."]
    if known:
        text += [f"base: {standard.name}", f"title: {json.dumps(chip.title)}"]
        text += [f"domain_latency: {_figure(chip.domain_latency)} # seconds"] if measurement.transfers else []
    else:
        text += _figures(measurement, chip, standard)
    text.append(f"efficiency: # of the {'printed figures' if known else 'figures above'}")
    measured = _measured_fields(measurement)
    for field, value in dataclasses.asdict(chip.efficiency).items():
        note = "" if field in measured else f" # not measured: that of {standard.name}"
        text.append(f"  {field}: {_figure(value)}{note}")
    text.append(f"source: {json.dumps(chip.source)}")
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return load(path)


def _figures(measurement: Measurement, chip: Hardware, standard: Hardware) -> list[str]:
    """The fields of a device whose figures nobody prints."""
    taken = f"# not measured: that of {standard.name}"
    fitted = "# seconds, fitted to the collectives" if measurement.transfers else taken
    linked = "# bytes/s one way, fitted to the collectives" if measurement.transfers else taken
    capability = measurement.compute_capability
    return [
        f"title: {json.dumps(chip.title)}",
        f"generation: {chip.generation}",
        f"device_kinds: {json.dumps(list(chip.device_kinds))}",
        "peak_flops: # FLOP/s of one device: no peak is printed, these are the best products measured",
        *(f"  {precision}: {_figure(rate)}" for precision, rate in chip.peak_flops.items()),
        f"memory_bytes: {_figure(chip.memory_bytes)} # what the device may use",
        f"memory_bandwidth: {_figure(chip.memory_bandwidth)} # bytes/s, measured",
        f"domain_size: {chip.domain_size} # devices measured together",
        f"domain_bandwidth: {_figure(chip.domain_bandwidth)} {linked}",
        f"domain_latency: {_figure(chip.domain_latency)} {fitted}",
        f"network_bandwidth: {_figure(chip.network_bandwidth)} {taken}",
        f"network_latency: {_figure(chip.network_latency)} {taken}",
        f"host_bandwidth: {_figure(chip.host_bandwidth)} {taken}",
        *([f"compute_capability: {capability}"] if capability else []),
    ]


def lines(measurement: Measurement) -> list[str]:
    """What was measured and what is made of it, as tables."""
    chip, standard = hardware(measurement, "measured"), stand_in(measurement)
    text = [f"{measurement.title}, all at once; figures are of one device", ""]
    text += _table(
        ("product", "precision", "time", "TFLOP/s", "of peak"),
        [
            (
                f"[{one.rows}, {one.inner}] x [{one.inner}, {one.columns}]",
                one.precision,
                _milliseconds(one.seconds),
                f"{one.rate / 1e12:.3g}",
                f"{one.rate / chip.peak_flops[one.precision]:.0%}",
            )
            for one in measurement.products
        ],
    )
    if measurement.transfers:
        text += [
            "",
            *_table(("collective", "MiB", "time", "GB/s one way"), map(_transfer_row, measurement.transfers)),
        ]
    attention = measurement.attention
    kernel = f"{attention.precision}, {'fused' if attention.fused else 'not fused'}"
    return [
        *text,
        "",
        f"memory     {measurement.memory_bandwidth / 1e9:.4g} GB/s",
        f"attention  {attention.rate / 1e12:.3g} TFLOP/s, causal, forward, {kernel}",
        f"launch     {measurement.launch_seconds * 1e6:.3g} µs per kernel",
        "",
        *_table(("efficiency", "fitted", standard.name), _efficiency_rows(measurement, chip, standard)),
    ]


def _transfer_row(transfer: Transfer) -> tuple[str, ...]:
    rate = f"{transfer.traffic / transfer.seconds / 1e9:.3g}"
    return transfer.kind, f"{transfer.bytes / 2**20:g}", _milliseconds(transfer.seconds), rate


def _efficiency_rows(
    measurement: Measurement, chip: Hardware, standard: Hardware
) -> Iterator[tuple[str, ...]]:
    before, measured = dataclasses.asdict(standard.efficiency), _measured_fields(measurement)
    for field, value in dataclasses.asdict(chip.efficiency).items():
        yield field, f"{value:g}" if field in measured else "not measured", f"{before[field]:g}"


def _measured_fields(measurement: Measurement) -> set[str]:
    always = {"matmul", "matmul_half", "attention", "memory", "launch_seconds"}
    return always | ({"link"} if measurement.transfers else set())


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _rounded(value: float) -> float:
    """To three digits: no measurement here knows more."""
    return float(f"{value:.3g}")


def _figure(value: float) -> str:
    """As in the files of chips: 197e9, 1.9e-6."""
    if value == 0 or 1e-3 <= value < 1e3:
        return f"{value:.4g}"
    thousands = math.floor(math.log10(value) / 3)
    return f"{value / 1000.0**thousands:.4g}e{3 * thousands}"


def _checked(path: Path) -> Path:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a hardware file is named .yaml; give {path.name}.yaml")
    if path.exists():
        raise ConfigError(f"{path}: the file exists; remove it or give another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")
    check_writable(path)
    return path
