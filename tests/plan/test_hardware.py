"""The table of chips and utilisation against it."""

import pytest

from stack.config.model import ModelConfig
from stack.plan.flops import train_flops_per_token
from stack.plan.hardware import CHIPS, lookup, mfu

MODEL = ModelConfig(vocab_size=50257)


@pytest.mark.parametrize(
    ("device_kind", "name", "tflops", "memory_gb"),
    [
        ("NVIDIA H200", "NVIDIA H200 SXM", 989, 141),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM", 989, 80),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80 GB", 312, 80),
        ("NVIDIA B200", "NVIDIA B200", 2250, 180),
        ("TPU v5 lite", "TPU v5e", 197, 16),
    ],
)
def test_a_device_is_known_by_the_kind_jax_gives_it(
    device_kind: str, name: str, tflops: float, memory_gb: float
) -> None:
    chip = lookup(device_kind)
    assert chip is not None
    assert (chip.name, chip.memory_bytes) == (name, memory_gb * 1e9)
    assert chip.peak_flops["bfloat16"] == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H300", ""])
def test_what_is_not_a_whole_chip_of_the_table_is_unknown(device_kind: str) -> None:
    assert lookup(device_kind) is None


def test_no_two_chips_share_a_kind() -> None:
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_figures_are_in_bytes_and_flops_per_second() -> None:
    for chip in CHIPS:
        peaks = chip.peak_flops.values()
        assert 5e12 < min(peaks) <= max(peaks) < 1e16, chip.name
        assert 1e10 < chip.memory_bytes < 1e12, chip.name
        assert 1e11 < chip.memory_bandwidth < 1e14, chip.name
        assert chip.link_bandwidth is None or 1e11 < chip.link_bandwidth < 1e13, chip.name
        if "float8" in chip.peak_flops:
            assert chip.peak_flops["float8"] == pytest.approx(2 * chip.peak_flops["bfloat16"], rel=0.01)


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
