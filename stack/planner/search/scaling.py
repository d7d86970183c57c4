"""How a run scales with devices: strong (the same batch) and weak (the same batch on each device)."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

from stack.config import Config, ConfigError, StackError
from stack.config.paths import expand
from stack.hardware.chip import Hardware
from stack.planner.search.layouts import describe
from stack.planner.search.search import RUNNABLE, Candidate, rank, release_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One number of devices."""

    devices: int
    batch: Fraction
    """Rows per step over all devices; not a whole number where the devices are too few for it."""
    candidate: Candidate | None
    """The fastest layout that fits, of the axes that the trainer runs."""
    obstacle: str | None
    """Why there is none."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of each device."""
        return None if self.candidate is None else self.candidate.tokens_per_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Both curves of a config on a chip."""

    config: Config
    hardware: Hardware
    strong: tuple[Point, ...]
    """The config's global batch on every number of devices."""
    weak: tuple[Point, ...]
    """The batch grows with the devices."""


def counts(text: str) -> list[int]:
    """Numbers of devices from `8..10240`: doubled from the first, and the last.

    Raises:
      ConfigError: it is not two numbers, the smaller first.
    """
    first, dots, last = text.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigError(f"devices={text}: expected a range such as 8..1024, the smaller number first")
    numbers, end = [int(first)], int(last)
    while numbers[-1] * 2 < end:
        numbers.append(numbers[-1] * 2)
    return numbers if numbers[-1] == end else [*numbers, end]


def scaling(config: Config, *, hardware: Hardware, devices: Sequence[int]) -> Scaling:
    """The fastest layout that fits on each number of devices, of the axes that the trainer runs.

    Args:
      config: its batch is that of the strong curve. The weak one keeps the batch it has on each device
        of its target, or, without a target, on each of the fewest devices.
      hardware: the chip and its links.
      devices: how many, ascending.
    """
    rows = config.train.batch_size
    reference = config.target.devices if config.target else devices[0]
    start = release_layout(config, hardware)

    def point(number: int, batch: Fraction) -> Point:
        try:
            if batch.denominator > 1:
                raise ConfigError(f"{batch} rows are no whole number")
            work = dataclasses.replace(start, batch=int(batch))
            candidates = rank(work, hardware=hardware, devices=number, space=RUNNABLE)
        except ConfigError as error:
            return Point(devices=number, batch=batch, candidate=None, obstacle=str(error))
        return Point(devices=number, batch=batch, candidate=candidates[0], obstacle=None)

    return Scaling(
        config=config,
        hardware=hardware,
        strong=tuple(point(number, Fraction(rows)) for number in devices),
        weak=tuple(point(number, Fraction(rows * number, reference)) for number in devices),
    )


def efficiencies(points: Sequence[Point]) -> list[float | None]:
    """Tokens per second of each device against those of the fewest devices that have a layout."""
    speeds = [point.tokens_per_second for point in points]
    first = next((speed for speed in speeds if speed), None)
    return [speed / first if speed and first else None for speed in speeds]


def mfu(scaling: Scaling, point: Point) -> tuple[float, float] | None:
    """Model FLOPs utilisation, full and causal; None without a layout or a peak."""
    if point.candidate is None:
        return None
    peak = scaling.hardware.peak_flops.get(point.candidate.work.precision)
    if peak is None:
        return None
    work = point.candidate.work
    rate = point.candidate.tokens_per_second / peak
    return (
        rate * work.flops_per_token("full"),
        rate * work.flops_per_token("causal"),
    )


def lines(curves: Scaling) -> list[str]:
    """Both curves as tables."""
    config, hardware = curves.config, curves.hardware
    rows = f"rows of {config.data.sequence_length:,} tokens"
    text = [f"{config.name} on {hardware.title}, {rows}; what fits is by formula"]
    if why := next((why for point in curves.strong if (why := _obstacle_to_running(point))), None):
        text.append(f"modelled only: {why}")
    for title, points in _titled_curves(curves):
        text += ["", title, _HEADING]
        for point, efficiency in zip(points, efficiencies(points), strict=True):
            text.append(_row(curves, point, efficiency))
    return text


def as_dict(curves: Scaling) -> dict[str, Any]:
    """Both curves for JSON; seconds, bytes, fractions."""
    return {
        "hardware": curves.hardware.name,
        "strong": _point_dicts(curves, curves.strong),
        "weak": _point_dicts(curves, curves.weak),
    }


def plot(curves: Scaling, path: str | os.PathLike[str]) -> Path:
    """Draws the speed of all devices together and the efficiency of each over their number.

    Args:
      curves: both.
      path: `.html` is a page of its own; another suffix is a picture by Matplotlib. Where that is not
        installed, the page is written instead, under the same name with `.html`.

    Returns:
      The file that was written.

    Raises:
      StackError: no point has a layout, or the file cannot be written.
    """
    path = expand(path)
    if not any(point.candidate for _, points in _titled_curves(curves) for point in points):
        raise StackError("there is nothing to plot: no number of devices has a layout that runs and fits")
    try:
        if path.suffix != ".html":
            try:
                _picture(curves, path)
                return path
            except ModuleNotFoundError:
                path = path.with_suffix(".html")
        path.write_text(_page(curves), encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a suffix Matplotlib does not know.
        raise StackError(f"cannot write the plot to {path}: {error}") from error
    return path


_HEADING = "  devices     batch       step  tokens/s each  MFU full/causal  against the fewest  layout"


def _titled_curves(curves: Scaling) -> tuple[tuple[str, tuple[Point, ...]], ...]:
    return (
        ("strong: the same batch", curves.strong),
        ("weak: the same batch on each device", curves.weak),
    )


def _row(curves: Scaling, point: Point, efficiency: float | None) -> str:
    start = f"{point.devices:>9,} {_whole(point.batch):>9}"
    if point.candidate is None:
        return f"{start}  {point.obstacle}"
    share = mfu(curves, point)
    percentages = f"{share[0]:.1%} / {share[1]:.1%}" if share else "no peak"
    seconds, speed = point.candidate.time.total, point.candidate.tokens_per_second
    return (
        f"{start} {f'{seconds:.4g} s':>10} {speed:>14,.0f} {percentages:>16}  {_bar(efficiency)}"
        f"  {describe(point.candidate.work)}"
    )


def _bar(share: float | None) -> str:
    """A share drawn, and in numbers; more than all is drawn as all."""
    drawn = "#" * round(10 * min(share or 0.0, 1.0))
    return f"{drawn:10} {share or 0.0:6.1%}"


def _obstacle_to_running(point: Point) -> str | None:
    return point.candidate.work.why_modelled() if point.candidate else None


def _whole(batch: Fraction) -> str:
    return f"{int(batch):,}" if batch.denominator == 1 else f"{float(batch):.2f}"


def _point_dicts(curves: Scaling, points: Sequence[Point]) -> list[dict[str, Any]]:
    dicts = []
    for point, efficiency in zip(points, efficiencies(points), strict=True):
        one: dict[str, Any] = {"devices": point.devices, "batch": float(point.batch)}
        if point.candidate is None:
            dicts.append(one | {"obstacle": point.obstacle})
            continue
        share = mfu(curves, point)
        one |= {
            "layout": describe(point.candidate.work),
            "why_modelled": _obstacle_to_running(point),
            "step_seconds": point.candidate.time.total,
            "tokens_per_second_per_device": point.candidate.tokens_per_second,
            "mfu_full": share and share[0],
            "mfu_causal": share and share[1],
            "efficiency": efficiency,
            "memory_bytes": point.candidate.memory.total,
        }
        dicts.append(one)
    return dicts


def _curves(curves: Scaling) -> list[tuple[str, list[int], list[float], list[float]]]:
    """Name, devices, tokens per second of all devices together, efficiency; of points with a layout."""
    result = []
    for name, points in (("strong", curves.strong), ("weak", curves.weak)):
        rows = [
            (point.devices, point.devices * speed, efficiency)
            for point, efficiency in zip(points, efficiencies(points), strict=True)
            if (speed := point.tokens_per_second) and efficiency
        ]
        if rows:
            devices, speeds, shares = (list(column) for column in zip(*rows, strict=True))
            result.append((name, devices, speeds, shares))
    return result


def _title(curves: Scaling) -> str:
    return f"{curves.config.name} on {curves.hardware.title}, planned"


def _picture(curves: Scaling, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for (name, devices, speeds, shares), style in zip(_curves(curves), ("o-", "s-"), strict=False):
        line = speed.plot(devices, speeds, style, label=f"{name} scaling", markersize=4)[0]
        ideal = [speeds[0] * number / devices[0] for number in devices]
        speed.plot(devices, ideal, ":", color=line.get_color(), linewidth=1)
        share.plot(devices, [100 * value for value in shares], style, label=f"{name} scaling", markersize=4)
    speed.set(xscale="log", yscale="log", xlabel="devices", ylabel="tokens/s of all devices (dotted: linear)")
    share.set(xscale="log", xlabel="devices", ylabel="tokens/s of each, % of the fewest", ylim=(0, None))
    numbers = _tick_numbers(number for _, devices, _, _ in _curves(curves) for number in devices)
    for axes in (speed, share):
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers], rotation=45, ha="right")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(_title(curves), fontsize=11)
    figure.savefig(path, dpi=150)


def _page(curves: Scaling) -> str:
    """The same two panels and the tables as a page that needs nothing else."""
    rows = _curves(curves)
    speed = [(name, devices, speeds) for name, devices, speeds, _ in rows]
    share = [(name, devices, [100 * value for value in shares]) for name, devices, _, shares in rows]
    table = escape("\n".join(lines(curves)))
    panels = _panel("tokens/s of all devices", speed, log=True) + _panel(
        "tokens/s of each, % of the fewest", share, log=False
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(_title(curves))}</title>'
        "<style>body{font:14px sans-serif;margin:2em}svg{max-width:48%;min-width:420px}</style>"
        f"<h1>{escape(_title(curves))}</h1>{panels}<pre>{table}</pre></html>\n"
    )


def _panel(title: str, series: Sequence[tuple[str, list[int], list[float]]], *, log: bool) -> str:
    """One SVG: values over devices, which are on a logarithmic scale."""
    width, height, left, top, bottom = 480, 320, 80, 30, 50
    numbers = sorted({number for _, devices, _ in series for number in devices})
    values = [value for _, _, column in series for value in column]
    lowest, highest = (min(values) / 1.2, max(values) * 1.2) if log else (0.0, max(*values, 100.0) * 1.05)

    def across(number: int) -> float:
        first, last = math.log(numbers[0]), math.log(numbers[-1])
        return left + (math.log(number) - first) / ((last - first) or 1.0) * (width - left - 20)

    def up(value: float) -> float:
        low, high, at = map(math.log, (lowest, highest, value)) if log else (lowest, highest, value)
        return height - bottom - (at - low) / (high - low) * (height - bottom - top)

    parts = [f'<text x="{left}" y="16" font-weight="bold">{escape(title)}</text>']
    parts += [
        f'<text x="{across(number):.1f}" y="{height - bottom + 16}" font-size="10" text-anchor="end" '
        f'transform="rotate(-40 {across(number):.1f} {height - bottom + 16})">{number:,}</text>'
        for number in _tick_numbers(numbers)
    ]
    ticks = _powers(lowest, highest) if log else [20.0 * i for i in range(int(highest // 20) + 1)]
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" font-size="10" text-anchor="end">{tick:,g}</text>'
        )
    for (name, devices, column), color in zip(series, ("#1f77b4", "#ff7f0e"), strict=False):
        points = [(across(n), up(value)) for n, value in zip(devices, column, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(
            f'<text x="{x:.1f}" y="{y - 8:.1f}" fill="{color}" font-size="12" text-anchor="end">{name}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _tick_numbers(devices: Iterable[int]) -> list[int]:
    """The numbers to print below an axis; one too near the last would be printed over it."""
    *others, last = sorted(set(devices))
    return [number for number in others if number * 1.5 < last] + [last]


def _powers(lowest: float, highest: float) -> list[float]:
    """Powers of ten between two values, or the ends where there is none."""
    powers = [10.0**i for i in range(math.ceil(math.log10(lowest)), math.floor(math.log10(highest)) + 1)]
    return powers or [lowest, highest]
