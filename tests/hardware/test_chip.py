"""Chips as data, and utilisation against their peaks."""

import dataclasses
from pathlib import Path

import pytest

from stack.config import ConfigError
from stack.config.model import DecoderConfig
from stack.hardware.chip import generations, load, lookup, names, ranges
from stack.models.flops import mfu, train_flops_per_token

MODEL = DecoderConfig(vocab_size=50257)
CHIPS = [load(name) for name in names()]


@pytest.mark.parametrize(
    ("device_kind", "title", "tflops", "memory_gb"),
    [
        ("NVIDIA H200", "NVIDIA H200 SXM", 989, 141),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM", 989, 80),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H100", "NVIDIA H100 SXM 96 GB HBM2e", 912, 96),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80 GB", 312, 80),
        ("NVIDIA B200", "NVIDIA B200", 2250, 180),
        ("TPU v5 lite", "TPU v5e", 197, 16),
    ],
)
def test_a_device_is_known_by_the_kind_jax_gives_it(
    device_kind: str, title: str, tflops: float, memory_gb: float
) -> None:
    chip = lookup(device_kind)
    assert chip is not None
    assert (chip.title, chip.memory_bytes) == (title, memory_gb * 1e9)
    assert chip.peak_flops["bfloat16"] == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H300", ""])
def test_what_is_not_a_whole_chip_of_the_table_is_unknown(device_kind: str) -> None:
    assert lookup(device_kind) is None


# Dense 16-bit TFLOP/s, GB, TB/s of memory, chips of a domain, GB/s one way within it and out of it.
PRINTED = {
    "v100-32gb": (125, 32, 0.9, 16, 150, 100 / 16),
    "a100-40gb": (312, 40, 1.555, 8, 300, 200 / 8),
    "a100-80gb": (312, 80, 2.039, 8, 300, 200 / 8),
    "h100": (989, 80, 3.35, 8, 450, 400 / 8),
    "h100-96gb": (912, 96, 2.4, 8, 450, 400 / 8),
    "h200": (989, 141, 4.8, 8, 450, 400 / 8),
    "b200": (2250, 180, 8.0, 8, 900, 400 / 8),
    "gb200": (2500, 186, 8.0, 72, 900, 50),
    "b300": (2250, 288, 8.0, 8, 900, 800 / 8),
    "mi300x": (1307, 192, 5.3, 8, 448, 50),
    "tpu-v5e": (197, 16, 0.819, 256, 200, 3.125),
    "tpu-v5p": (459, 95, 2.765, 6144, 600, 6.25),
    "tpu-v6e": (918, 32, 1.64, 256, 400, 12.5),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_figures_are_those_printed(name: str) -> None:
    chip = load(name)
    peak = chip.peak_flops.get("bfloat16", chip.peak_flops.get("float16"))
    assert (peak, chip.memory_bytes, chip.memory_bandwidth, chip.domain_size) == pytest.approx(
        (PRINTED[name][0] * 1e12, PRINTED[name][1] * 1e9, PRINTED[name][2] * 1e12, PRINTED[name][3])
    )
    links = (chip.domain_bandwidth / 1e9, chip.network_bandwidth / 1e9)
    assert links == pytest.approx(PRINTED[name][4:])


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("H100", "h100"),
        ("h100-80gb", "h100"),
        ("A100-80GB", "a100-80gb"),
        ("A100-40GB", "a100-40gb"),
        ("a100", "a100-80gb"),
        ("V100", "v100-32gb"),
        ("GB200", "gb200"),
        ("H100-96GB", "h100-96gb"),
        ("H100 96GB HBM2e", "h100-96gb"),
    ],
)
def test_a_chip_answers_to_its_names_in_any_case(word: str, name: str) -> None:
    assert load(word).name == name


def test_no_two_chips_share_a_kind_or_a_name() -> None:
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    answered = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
    assert len(answered) == len(set(answered))
    assert all(name == name.casefold() for name in answered)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_are_in_bytes_and_flops_per_second(chip) -> None:
    if chip.name != "cpu":
        peaks = chip.peak_flops.values()
        assert 5e12 < min(peaks) <= max(peaks) < 1e16
        assert 1e10 < chip.memory_bytes < 1e12
        assert 1e11 < chip.memory_bandwidth < 1e14
    assert chip.network_bandwidth < chip.domain_bandwidth < chip.memory_bandwidth
    assert chip.domain_latency < chip.network_latency < 1e-4
    if "float8" in chip.peak_flops:
        assert chip.peak_flops["float8"] == pytest.approx(2 * chip.peak_flops["bfloat16"], rel=0.01)


def test_volta_has_no_bfloat16() -> None:
    assert set(load("v100").peak_flops) == {"float32", "float16"}


def test_every_figure_in_every_file_has_its_source_beside_it() -> None:
    import stack.hardware.chip as module

    for name in names():
        for line in (Path(module.__file__).parent / "chips" / f"{name}.yaml").read_text().splitlines():
            field = line.partition(":")[0]
            if field in ("peak_flops", "memory_bytes", "power_watts") or field.endswith(
                ("bandwidth", "latency", "_size")
            ):
                assert " # " in line, (name, line)


def test_every_efficiency_is_shared_by_a_generation_and_physically_possible() -> None:
    limits = ranges()
    for generation, efficiency in generations().items():
        for constant, value in dataclasses.asdict(efficiency).items():
            low, high = limits[constant]
            assert low <= value <= high, (generation, constant)
    assert all(chip.efficiency == generations()[chip.generation] for chip in CHIPS)


def test_a_chip_of_the_users_own_gives_what_differs_from_a_known_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: H100-80GB\ntitle: Our H100\nnetwork_bandwidth: 6.25e9\nprice_per_hour: 2.5\n"
        "efficiency:\n  link: 0.7\n"
    )
    mine, known = load(tmp_path / "mine.yaml"), load("h100")
    expected = dataclasses.replace(
        known,
        name="mine",
        title="Our H100",
        network_bandwidth=6.25e9,
        price_per_hour=2.5,
        efficiency=dataclasses.replace(known.efficiency, link=0.7),
    )
    assert mine == expected
    (tmp_path / "rented.yaml").write_text("base: mine.yaml\nprice_per_hour: 3\n")
    rented = load(str(tmp_path / "rented.yaml"))
    assert rented == dataclasses.replace(mine, name="rented", price_per_hour=3)


EFFICIENCY = """\
efficiency:
  matmul: 0.7
  matmul_half: 300
  attention: 0.5
  memory: 0.8
  link: 0.8
  overlap: 0.5
  launch_seconds: 4e-6
"""
WHOLE = f"""\
title: A chip
generation: mine
peak_flops:
  bfloat16: 1e14
memory_bytes: 16e9
memory_bandwidth: 1e12
domain_size: 8
domain_bandwidth: 1e11
network_bandwidth: 1e10
domain_latency: 1e-6
network_latency: 4e-6
source: measured
{EFFICIENCY}"""


def test_a_chip_nobody_knows_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "new.yml").write_text(WHOLE)
    chip = load(tmp_path / "new.yml")
    assert (chip.name, chip.peak_flops, chip.efficiency.matmul_half) == ("new", {"bfloat16": 1e14}, 300)
    assert (chip.compile_target, chip.power_watts, chip.device_kinds) == (None, None, ())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_bytes: 16e9\n", "", "chip.yaml: memory_bytes is missing; give it, or `base:`"),
        ("16e9", "-16e9", "chip.yaml:5: memory_bytes=-16000000000.0 must be greater than 0"),
        ("16e9", "0", "chip.yaml:5: memory_bytes=0 must be greater than 0"),
        ("16e9", "16 GB", "chip.yaml:5: memory_bytes='16 GB' must be a number"),
        ("domain_size: 8", "domain_size: 8.5", "chip.yaml:7: domain_size=8.5 must be a whole number"),
        (
            "domain_size",
            "domain_sizes",
            "chip.yaml:7: domain_sizes is not a field; did you mean domain_size?",
        ),
        (
            "bfloat16:",
            "bfloat:",
            "chip.yaml:4: peak_flops.bfloat is not a field; did you mean peak_flops.bfloat16?",
        ),
        ("bfloat16: 1e14", "bfloat16: true", "chip.yaml:4: peak_flops.bfloat16=true must be a number"),
        ("  bfloat16: 1e14\n", "", "chip.yaml:3: peak_flops=null must be a group of fields"),
        ("peak_flops:\n  bfloat16: 1e14", "peak_flops: {}", "chip.yaml:3: peak_flops is empty; give one of"),
        ("matmul: 0.7", "matmul: 75", "efficiency.matmul=75 must be less than or equal to 1"),
        ("matmul: 0.7", "matmul: 0", "efficiency.matmul=0 must be greater than 0"),
        ("  matmul: 0.7\n", "", "chip.yaml:13: efficiency.matmul is missing"),
        (
            "matmul_half",
            "matmul_hal",
            "chip.yaml:15: efficiency.matmul_hal is not a field; did you mean efficiency.matmul_half?",
        ),
        ("efficiency:", "other:", "chip.yaml:13: other is not a field; there are name, title"),
        (EFFICIENCY, "", "chip.yaml: efficiency is missing; give it, or as generation one of "),
        ("title: A chip", "title: 7", "chip.yaml:1: title=7 must be text; put it in quotes"),
        ("title: A chip", "base: h1000", "hardware 'h1000' is unknown; did you mean h100?"),
        ("title: A chip", "base: other.yaml", "chip.yaml:1: base"),
        ("title: A chip", "base: chip.yaml", "base goes round in a circle"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in WHOLE
    (tmp_path / "chip.yaml").write_text(WHOLE.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "chip.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("h1000", "hardware 'h1000' is unknown; did you mean h100?; there are a100-40gb, "),
        ("A100-80", "did you mean a100-80gb?"),
        ("generations", "hardware 'generations' is unknown"),
        ("", "hardware '' is unknown; there are"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_hardware_nobody_knows_is_refused_with_the_nearest_name(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(word)
    assert message in str(error.value)


def test_utilisation_is_model_flops_over_the_named_peak() -> None:
    # The rate at which the causal convention fills half of an H200.
    rate = 989e12 / 2 / train_flops_per_token(MODEL, 1024, "causal")
    used = mfu(MODEL, length=1024, tokens_per_second_per_device=rate, device_kind="NVIDIA H200")
    assert used.causal == pytest.approx(0.5)
    assert used.causal_flops_per_second == pytest.approx(989e12 / 2)
    ratio = train_flops_per_token(MODEL, 1024, "full") / train_flops_per_token(MODEL, 1024, "causal")
    assert used.full == pytest.approx(0.5 * ratio)
    assert used.peak == "989 TFLOP/s, NVIDIA H200 SXM, dense bfloat16"


def test_float32_is_held_against_what_xla_multiplies_it_in() -> None:
    model = MODEL.model_copy(update={"dtype": "float32"})
    for kind, peak in {
        "NVIDIA A100-SXM4-80GB": "156 TFLOP/s, NVIDIA A100 SXM 80 GB, dense tensorfloat32",
        "Tesla T4": "8.1 TFLOP/s, NVIDIA T4, dense float32",
    }.items():
        assert mfu(model, length=8, tokens_per_second_per_device=1.0, device_kind=kind).peak == peak


@pytest.mark.parametrize(
    ("device_kind", "reason"),
    [
        ("cpu", "no peak: cpu is not in the table of chips"),
        ("Tesla T4", "no peak: NVIDIA T4 has none listed for bfloat16"),
    ],
)
def test_without_a_peak_there_is_a_reason_and_still_a_rate(device_kind: str, reason: str) -> None:
    used = mfu(MODEL, length=1024, tokens_per_second_per_device=10.0, device_kind=device_kind)
    assert (used.full, used.causal, used.peak) == (None, None, reason)
    assert used.full_flops_per_second == 10 * train_flops_per_token(MODEL, 1024, "full")
