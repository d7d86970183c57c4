"""Measuring a machine, and the hardware file made of it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from stack.config import ConfigError
from stack.doctor.calibrate import fit_products, fit_transfers, hardware, lines, run, write
from stack.doctor.timing import Attention, Measurement, Product, Sizes, Transfer, measure, repeated
from stack.hardware.chip import Hardware, load
from stack.planner.formula.links import ring_seconds
from stack.planner.formula.time import product_seconds

WEIGHTS = ((512, 512), (1024, 1024), (4096, 4096), (4096, 14336))
BYTES = (2**18, 2**20, 2**24, 2**28)


def machine(*, memory_bandwidth: float = 1e18, **constants: float) -> Hardware:
    """An H100 with these efficiencies, whose products never wait for its memory."""
    chip = load("h100")
    efficiency = dataclasses.replace(chip.efficiency, **constants)
    return dataclasses.replace(chip, memory_bandwidth=memory_bandwidth, efficiency=efficiency)


def products(chip: Hardware, noise: float = 0.0) -> list[Product]:
    """What the planner says products take, within some noise."""
    rng = np.random.default_rng(0)
    return [
        Product(
            precision="bfloat16",
            rows=8192,
            inner=inner,
            columns=columns,
            seconds=product_seconds(8192, columns, inner, "bfloat16", chip)
            * rng.uniform(1 - noise, 1 + noise),
        )
        for inner, columns in WEIGHTS
    ]


def transfers(chip: Hardware, members: int = 8) -> list[Transfer]:
    """What the planner says collectives take."""
    return [
        Transfer(
            kind=kind,
            bytes=size,
            members=members,
            seconds=ring_seconds(size, members, 1, chip) * (2 if kind == "all-reduce" else 1),
        )
        for kind in ("all-gather", "all-reduce")
        for size in BYTES
    ]


def measured(chip: Hardware, device_kind: str) -> Measurement:
    """What a machine that is as the planner says would be measured to do."""
    length, heads, width = 4096, 16, 128
    rate = chip.peak_flops["bfloat16"] * chip.efficiency.attention
    seconds = 2 * heads * length**2 * width / rate
    return Measurement(
        device_kind=device_kind,
        platform="gpu",
        compute_capability=9.0,
        devices=8,
        memory_bytes=80e9,
        products=tuple(products(chip)),
        memory_bandwidth=3350e9 * chip.efficiency.memory,
        attention=Attention(
            precision="bfloat16", length=length, heads=heads, width=width, fused=True, seconds=seconds
        ),
        launch_seconds=chip.efficiency.launch_seconds,
        transfers=tuple(transfers(chip)),
    )


@settings(deadline=None, max_examples=50)
@given(matmul=st.floats(0.3, 1.0), half=st.floats(5.0, 3000.0))
def test_the_constants_of_products_come_back_from_the_times_the_planner_gives_them(
    matmul: float, half: float
) -> None:
    chip = machine(matmul=matmul, matmul_half=half)
    assert fit_products(products(chip), chip.peak_flops) == pytest.approx((matmul, half), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(link=st.floats(0.05, 1.0), latency=st.floats(1e-7, 1e-4), members=st.integers(2, 8))
def test_the_bandwidth_and_latency_of_links_come_back_from_the_times_the_planner_gives_them(
    link: float, latency: float, members: int
) -> None:
    chip = dataclasses.replace(machine(link=link), domain_latency=latency)
    expected = (chip.domain_bandwidth * link, latency)
    assert fit_transfers(transfers(chip, members)) == pytest.approx(expected, rel=1e-4)


def test_noise_in_the_times_moves_the_constants_no_more_than_itself() -> None:
    chip = machine(matmul=0.8, matmul_half=400)
    assert fit_products(products(chip, noise=0.03), chip.peak_flops) == pytest.approx((0.8, 400), rel=0.1)


def test_products_faster_than_the_printed_peak_are_no_more_than_all_of_it() -> None:
    chip = machine(matmul=1.0, matmul_half=1.0)
    fast = [dataclasses.replace(one, seconds=one.seconds / 2) for one in products(chip)]
    assert fit_products(fast, chip.peak_flops) == (1.0, 1.0)


def test_a_known_chip_keeps_its_printed_figures_and_gets_the_efficiencies_measured(tmp_path: Path) -> None:
    chip = machine(matmul=0.78, matmul_half=321, attention=0.61, memory=0.91, link=0.83, launch_seconds=3e-6)
    chip = dataclasses.replace(chip, domain_latency=2.5e-6)
    made = measured(chip, "NVIDIA H100 80GB HBM3")
    slow = [
        dataclasses.replace(one, precision="tensorfloat32", seconds=3 * one.seconds) for one in made.products
    ]
    # Efficiencies are those of the precision of training, the first.
    made = dataclasses.replace(made, products=(*made.products, *slow))
    mine = write(made, tmp_path / "mine.yaml")
    assert mine.efficiency == chip.efficiency
    assert (mine.name, mine.domain_latency) == ("mine", 2.5e-6)
    assert mine.title == "NVIDIA H100 SXM, measured"
    changed = ("name", "title", "source", "efficiency", "domain_latency")
    printed = load("h100")
    assert mine == dataclasses.replace(printed, **{field: getattr(mine, field) for field in changed})


def test_a_chip_nobody_knows_has_the_best_it_did_for_its_peak(tmp_path: Path) -> None:
    chip = machine(matmul=0.5, matmul_half=200, link=0.8)
    made = measured(chip, "NVIDIA H300")
    mine = write(made, tmp_path / "h300.yaml")
    best = max(one.rate for one in made.products)
    assert mine.peak_flops == {"bfloat16": pytest.approx(best, rel=1e-2)}
    assert mine.memory_bandwidth == pytest.approx(made.memory_bandwidth, rel=1e-2)
    assert mine.domain_bandwidth == pytest.approx(0.8 * 450e9, rel=1e-2)
    assert (mine.device_kinds, mine.domain_size, mine.compute_capability) == (("NVIDIA H300",), 8, 9.0)
    # Efficiencies are of those: what the planner makes of them is what was measured.
    again = [product_seconds(one.rows, one.columns, one.inner, "bfloat16", mine) for one in made.products]
    assert again == pytest.approx([one.seconds for one in made.products], rel=0.1)


def test_traffic_of_scores_that_are_written_is_not_counted_against_attention() -> None:
    chip = machine(attention=0.5, memory=0.9)
    made = measured(chip, "NVIDIA H100 80GB HBM3")
    traffic = made.attention.heads * made.attention.length**2 * 16 / made.memory_bandwidth
    unfused = dataclasses.replace(made.attention, fused=False, seconds=made.attention.seconds + traffic)
    found = hardware(dataclasses.replace(made, attention=unfused), "mine")
    assert found.efficiency.attention == pytest.approx(0.5, rel=1e-2)


TINY = Sizes(
    rows=16,
    weights=((8, 8), (16, 32)),
    stream_bytes=2**12,
    attention=(16, 2, 8),
    collective_bytes=(2**12, 2**14),
    unroll=2,
    seconds=1e-3,
)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.full), 8])
def test_this_machine_is_measured_and_the_file_is_read_back(devices: int, tmp_path: Path) -> None:
    made = measure(jax.devices()[:devices], TINY)
    assert made.title == f"{devices} x cpu"
    assert len(made.products) == 4
    assert len(made.transfers) == (4 if devices > 1 else 0)
    mine = write(made, tmp_path / "mine.yaml")
    assert mine == load(tmp_path / "mine.yaml") == hardware(made, "mine")
    assert set(mine.peak_flops) == {"bfloat16", "float32"}
    assert (mine.domain_size, mine.compile_target) == (devices, None)
    text = (tmp_path / "mine.yaml").read_text()
    assert "no peak is printed, these are the best products measured" in text
    assert "network_bandwidth: 1.25e9 # not measured: that of cpu" in text
    assert ("link: 0.8 # not measured" in text) == (devices == 1)
    printed = "\n".join(lines(made))
    assert "[16, 16] x [16, 32]" in printed
    assert ("all-reduce" in printed) == (devices > 1)


def test_a_step_is_repeated_as_often_as_it_is_counted() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("device",))
    halves = repeated(mesh, lambda y, x: x + y / 2, unroll=2)(3, np.zeros(4), np.arange(4.0))
    assert halves == pytest.approx(np.arange(4.0) * sum(0.5**i for i in range(6)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.yaml", "the file exists; remove it or give another name"),
        ("mine", "a hardware file is named .yaml; give mine.yaml"),
        ("nowhere/mine.yaml", "there is no folder"),
    ],
)
def test_where_no_file_can_go_nothing_is_measured(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("title: mine\n")
    with pytest.raises(ConfigError, match=message):
        next(run(tmp_path / name))
