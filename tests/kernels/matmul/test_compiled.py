"""What XLA makes of products in 8 bits for GPUs that are not here."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.kernels.matmul.fp8 import Fp8, project
from stack.layers.parameter import parameter
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import Layout
from stack.planner.compiled.compile import compile_step, devices, has_plugin

CUBLAS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

EVEN = (2, 64), 256, 512


def compiled(target, sizes, blocks, options):
    """A product and its gradients."""
    rows, inputs, outputs = sizes
    config = MeshConfig()
    mesh = meshes.build(config, devices(target, 1))
    layout = Layout.of(mesh, config, dtype="bfloat16")

    def loss(x, weight):
        kernel = parameter(weight, axes=("embed", "mlp"), role="float8")
        names, how = ("batch", "length", "mlp"), Fp8(blocks=blocks)
        y = project(x, kernel, layout, names, contracted=1, how=how)
        return jnp.square(y.astype(jnp.float32)).sum()

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding())

    with meshes.use(mesh), without_cache():
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
            array("bfloat16", *rows, inputs), array("float32", inputs, outputs)
        )
        return lowered.compile(compiler_options=options).as_text() or ""


def calls(hlo):
    return Counter(re.findall(r'custom_call_target="([^"]+)"', hlo))


@pytest.mark.skipif(not has_plugin(), reason="compiling for GPUs needs the extra plan")
@pytest.mark.parametrize("blocks", ["tensor", "channel"])
@pytest.mark.parametrize("sizes", [EVEN, ((3, 5), 7, 9)], ids=["even", "odd"])
def test_hopper_computes_all_three_in_8_bits_whatever_the_sizes(sizes, blocks):
    """cuBLAS wants multiples of 16; XLA pads to them."""
    hlo = compiled("h200", sizes, blocks, CUBLAS)
    assert calls(hlo) == {"__cublas$lt$matmul$f8": 3}
    precision = re.findall(r'matmul\$f8.*?"operand_precision":\["(\w+)"', hlo)
    assert sorted(precision) == ["DEFAULT", "HIGHEST", "HIGHEST"], "partial sums of gradients in float32"
    if sizes[1] == 7:
        assert "f8e4m3fn[16,16]" in hlo


@pytest.mark.full
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_so_do_other_chips_and_triton(target):
    assert calls(compiled(target, EVEN, "tensor", CUBLAS)) == {"__cublas$lt$matmul$f8": 3}
    hlo = compiled(target, EVEN, "tensor", {"xla_gpu_autotune_level": 0})
    assert len(re.findall(r'"kind":"__triton\w*"', hlo)) == 3
    assert not calls(hlo)


@pytest.mark.full
def test_ampere_would_widen_them_without_a_word():
    """For which it is refused."""
    assert calls(compiled("a100-40gb", EVEN, "tensor", CUBLAS)) == {"__cublas$lt$matmul": 3}


@pytest.mark.full
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_stage_3_gathers_the_layers_weights_in_8_bits_and_scatters_in_32():
    config = Config(
        model=DecoderConfig(
            vocab_size=1000,
            num_layers=3,
            embed_dim=512,
            num_heads=8,
            head_dim=64,
            mlp_dim=1536,
            norm="rmsnorm",
            position="rotary",
            max_length=256,
        ),
        data=DataConfig(sequence_length=256, packed=False),
        mesh=MeshConfig(data=2, fsdp=4, zero=3),
        train=TrainConfig(batch_size=16, remat="full"),
        kernels=KernelsConfig(matmul="fp8", attention="cudnn"),
    )
    with without_cache():
        hlo = compile_step(config, devices("h200", 8)).as_text()
    assert hlo is not None
    gathers, scatters = (
        re.findall(rf"= (.*?) {operation}(?:-start)?\(", hlo)
        for operation in ("all-gather", "reduce-scatter")
    )
    layers = re.compile(r"(\w+)\[(?:\d+,)?(?:512,1536|1536,512|512,8,64|8,64,512)\]")
    assert {dtype for one in gathers for dtype in layers.findall(one)} == {"f8e4m3fn"}
    assert {dtype for one in scatters for dtype in re.findall(r"(\w+)\[", one)} == {"f32"}
    products = calls(hlo)
    assert products["__cublas$lt$matmul$f8"] > 3 * products["__cublas$lt$matmul"], "the head's alone are not"
