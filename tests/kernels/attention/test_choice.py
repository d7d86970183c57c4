"""The kernel that runs is a value with its reason; what was asked for runs or is refused."""

import dataclasses
from functools import partial

import pytest

from stack.config import Config, ConfigError
from stack.kernels.attention import KERNELS, Request, choose
from stack.kernels.measured import measured
from stack.step.kernels import attention_request, choose_attention

pytestmark = pytest.mark.usefixtures("tokamax_is_here")
"""Which says that it is not: without it there are the same kernels everywhere."""
GPT = Request(platform="gpu", compute_capability=9.0, dtype="bfloat16", head_dim=64, length=1024)
PLAIN = Config().replace("data.sequence_length=1024", "data.packed=false")


def chosen(platform, capability=None, *overrides):
    return choose_attention(PLAIN.replace(*overrides), platform=platform, compute_capability=capability)


def told(platform, capability, overrides, reason) -> str:
    """Kernels that cannot for one reason are named together."""
    model = PLAIN.replace(*overrides)
    request = attention_request(model, platform=platform, compute_capability=capability)
    if KERNELS["mosaic_gpu"].obstacles(request) == [reason]:
        return f"cudnn and mosaic_gpu cannot: {reason}"
    return f"cudnn cannot: {reason}; mosaic_gpu cannot: "


def test_auto_takes_what_was_measured_to_be_fastest_and_says_where():
    assert str(choose(GPT)) == (
        "attention: cudnn (measured on NVIDIA H100 80GB HBM3: 2.4 times as fast as xla)"
    )


@pytest.mark.parametrize("capability", [8.0, 10.0])
@pytest.mark.parametrize("change", [{}, {"head_dim": 128}, {"window": True}, {"kind": "full"}])
def test_what_was_not_measured_is_taken_where_xla_would_store_all_scores(capability, change):
    request = dataclasses.replace(GPT, compute_capability=capability, **change)
    assert choose(request).kernel == "cudnn"
    assert choose(request).reason.startswith(
        "not measured at such shapes on such a device, but xla would store all scores"
    )


@pytest.mark.parametrize(
    ("platform", "capability", "overrides", "reason"),
    [
        ("tpu", None, (), "the platform is tpu, not an NVIDIA GPU"),
        ("rocm", None, (), "the platform is rocm, not an NVIDIA GPU"),
        ("gpu", 7.5, (), "compute capability 7.5 < 8.0"),
        ("gpu", 9.0, ("model.dtype=float32",), "dtype is float32, not bfloat16"),
        ("gpu", 8.0, ("model.head_dim=20",), "head width 20 is not a multiple of 8"),
        ("gpu", 9.0, ("model.head_dim=264",), "head width 264 is over 256"),
        ("gpu", 8.0, ("model.head_dim=152",), "head width 152 is over 128"),
        ("gpu", 8.0, ("model.attention_dropout=0.1",), "it has no attention dropout"),
        ("gpu", 10.0, ("model.attention_softcap=50.0",), "it has no soft cap"),
    ],
)
def test_long_rows_that_no_kernel_can_have_blocks_and_short_ones_xla(platform, capability, overrides, reason):
    choice = chosen(platform, capability, *overrides)
    assert choice.kernel == "xla_chunked"
    assert not choice.stores_scores
    assert choice.reason.startswith(
        "not measured at such shapes on such a device, but xla would store all scores;"
        f" {told(platform, capability, overrides, reason)}"
    )
    short = chosen(platform, capability, *overrides, "data.sequence_length=128")
    assert str(short).startswith(
        f"attention: xla (its rows are short; {told(platform, capability, overrides, reason)}"
    )
    assert short.stores_scores


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model.attention_dropout=0.1",), "it has no attention dropout"),
        (("model.attention_softcap=50.0",), "it has no soft cap"),
        (("model.head_dim=20", "model.attention_dropout=0.1"), "it has no attention dropout"),
        (("data.packed=true", "data.sequence_length=1023"), "packed rows of 1023 tokens, an odd number"),
    ],
)
def test_hopper_has_a_kernel_for_what_cudnn_cannot(overrides, reason):
    choice = chosen("gpu", 9.0, *overrides)
    assert choice.kernel == "mosaic_gpu"
    assert "not measured" in choice.reason
    assert reason in choice.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_processor_has_blocks_from_the_length_on_that_was_measured(dtype):
    choice = partial(chosen, "cpu", None, f"model.dtype={dtype}")
    assert choice("data.sequence_length=128").kernel == "xla"
    assert choice("data.sequence_length=128").reason.startswith("nothing was measured to be faster;")
    assert choice("data.sequence_length=1024").kernel == "xla_chunked"
    assert "times as fast as xla" in choice("data.sequence_length=1024").reason


def test_packed_rows_of_an_odd_length_are_not_left_to_cudnn():
    packed = partial(chosen, "gpu", 9.0, "data.packed=true", "model.max_length=2048")
    assert "packed rows of 1025 tokens, an odd number" in packed("data.sequence_length=1025").reason
    assert packed("data.sequence_length=1024").kernel == "cudnn"
    assert chosen("gpu", 9.0, "model.max_length=2048", "data.sequence_length=1025").kernel == "cudnn"


def test_every_obstacle_is_named():
    reason = chosen("gpu", 7.5, "model.dtype=float32", "model.attention_dropout=0.1").reason
    cudnn, _, mosaic = reason.partition("cudnn cannot: ")[2].partition("; mosaic_gpu cannot: ")
    assert cudnn.count(";") == 2
    assert mosaic == (
        "compute capability 7.5 is not 9.0 (H100, H200), whose instructions it uses;"
        " dtype is float32, not bfloat16"
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("kernel", ["xla", "xla_chunked"])
def test_what_can_do_everything_is_taken_when_asked_for(platform, kernel):
    assert str(chosen(platform, 9.0, f"kernels.attention={kernel}")) == f"attention: {kernel} (asked for)"
    worst = Request(
        platform=platform,
        dtype="float32",
        head_dim=7,
        kind="prefix",
        packed_length=3,
        dropout=0.5,
        softcap=1.0,
        bias=True,
    )
    assert KERNELS[kernel].obstacles(worst) == []


def test_cudnn_is_taken_when_asked_for():
    assert str(chosen("gpu", 9.0, "kernels.attention=cudnn")) == "attention: cudnn (asked for)"


def test_a_kernel_that_cannot_is_refused_with_all_reasons_and_the_remedy():
    with pytest.raises(ConfigError) as error:
        chosen("cpu", None, "kernels.attention=cudnn", "model.attention_softcap=2.0")
    assert str(error.value) == (
        "kernels.attention=cudnn cannot run: the platform is cpu, not an NVIDIA GPU; it has no soft cap;"
        " set kernels.attention=auto, xla_chunked or xla"
    )


def test_a_request_is_what_the_config_asks():
    ask = partial(attention_request, platform="gpu", compute_capability=9.0)
    gemma = PLAIN.replace("model.sliding_window=64", "model.attention_softcap=50.0", "data.packed=true")
    assert ask(gemma) == dataclasses.replace(
        GPT, packed_length=1024, softcap=50.0, window=True, dtype=gemma.model.dtype
    )
    assert ask(PLAIN.replace("objective.kind=prefix_lm")).kind == "prefix"
    encoder = ("model.kind=encoder", "objective.kind=masked_words")
    assert ask(PLAIN.replace(*encoder)).kind == "full"
    two = ("model.kind=encoder_decoder", "objective.kind=span_corruption", "objective.target_length=256")
    two_stacks = ask(PLAIN.replace(*two, "data.sequence_length=512", "model.position=relative"))
    assert (two_stacks.cross, two_stacks.bias, two_stacks.length) == (True, True, 512)


def test_the_table_is_of_kernels_that_there_are_and_that_could_run():
    for entry in measured().attention:
        for head_dim in entry.head_dims:
            request = Request(
                platform="cpu" if entry.device_class == "cpu" else "gpu",
                compute_capability=None if entry.device_class == "cpu" else float(entry.device_class),
                dtype=entry.dtypes[0],
                head_dim=head_dim,
                length=entry.length_from,
            )
            assert KERNELS[entry.implementation].obstacles(request) == []
            assert entry.implementation != "xla", "that is what all are compared with"
