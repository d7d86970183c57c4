"""The kernel that runs is a value with its reason; what was asked for runs or is refused."""

from functools import partial

import pytest

from stack.config import ConfigError, DecoderConfig
from stack.kernels.attention import KERNELS, Request, choose
from stack.layers.attention import choose_attention

PLAIN = {"dtype": "bfloat16"}


def chosen(platform, capability=None, **model):
    return choose_attention(DecoderConfig(**PLAIN | model), platform=platform, compute_capability=capability)


@pytest.mark.parametrize("capability", [8.0, 9.0, 10.0, None])
def test_auto_takes_cudnn_where_it_honours_the_whole_config(capability):
    choice = chosen("gpu", capability, sliding_window=128, num_kv_heads=4)
    assert str(choice) == "attention: cudnn (honours the whole config)"


@pytest.mark.parametrize(
    ("platform", "capability", "model", "reason"),
    [
        ("cpu", None, {}, "the platform is cpu, not an NVIDIA GPU"),
        ("tpu", None, {}, "the platform is tpu, not an NVIDIA GPU"),
        ("rocm", None, {}, "the platform is rocm, not an NVIDIA GPU"),
        ("gpu", 7.5, {}, "compute capability 7.5 < 8.0"),
        ("gpu", 9.0, {"dtype": "float32"}, "dtype is float32, not bfloat16"),
        ("gpu", 9.0, {"head_dim": 20}, "head width 20 is not a multiple of 8"),
        ("gpu", 9.0, {"head_dim": 264}, "head width 264 is over 256"),
        ("gpu", 8.0, {"head_dim": 152}, "head width 152 is over 128"),
        ("gpu", 9.0, {"attention_dropout": 0.1}, "it has no attention dropout"),
        ("gpu", 9.0, {"attention_softcap": 50.0}, "it has no soft cap"),
    ],
)
def test_auto_says_why_it_takes_xla(platform, capability, model, reason):
    choice = chosen(platform, capability, **model)
    assert choice.kernel == "xla"
    assert choice.reason == f"cudnn cannot: {reason}"


def test_packed_rows_of_an_odd_length_are_left_to_xla():
    packed = partial(choose_attention, DecoderConfig(**PLAIN), platform="gpu", compute_capability=9.0)
    assert packed(packed_length=1023).reason == "cudnn cannot: packed rows of 1023 tokens, an odd number"
    assert packed(packed_length=1024).kernel == packed(packed_length=None).kernel == "cudnn"


def test_every_obstacle_is_named():
    choice = chosen("gpu", 7.5, dtype="float32", attention_dropout=0.1)
    assert choice.reason.count(";") == 2


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_xla_is_taken_when_asked_for(platform):
    assert str(chosen(platform, 9.0, attention="xla")) == "attention: xla (asked for)"


def test_cudnn_is_taken_when_asked_for():
    assert str(chosen("gpu", 9.0, attention="cudnn")) == "attention: cudnn (asked for)"


@pytest.mark.parametrize(
    ("platform", "capability", "model", "reason"),
    [
        ("cpu", None, {}, "the platform is cpu"),
        ("gpu", 8.0, {"head_dim": 152}, "head width 152 is over 128"),
    ],
)
def test_cudnn_that_cannot_be_honoured_is_refused_with_the_remedy(platform, capability, model, reason):
    with pytest.raises(ConfigError, match=rf"model\.attention=cudnn cannot run: .*{reason}.*attention=xla"):
        chosen(platform, capability, attention="cudnn", **model)


def test_a_bias_is_left_to_xla():
    request = Request(platform="gpu", compute_capability=9.0, dtype="bfloat16", head_dim=64, bias=True)
    assert choose(request).reason == "cudnn cannot: it takes no bias here"


def test_the_last_kernel_can_do_everything():
    worst = Request(
        platform="cpu",
        dtype="float32",
        head_dim=7,
        kind="prefix",
        packed_length=3,
        dropout=0.5,
        softcap=1.0,
        bias=True,
    )
    *_, last = KERNELS.values()
    assert last.obstacles(worst) == []
