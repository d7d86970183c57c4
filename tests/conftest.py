"""Eight virtual CPU devices and a persistent compile cache, set before anything imports jax."""

import dataclasses
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Kept between runs, and shared with the processes that tests start; for programs of one device.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# The user's own cache has tiles that were tuned, with which numbers round otherwise.
os.environ["XDG_CACHE_HOME"] = str(CACHE.with_name("home"))
shutil.rmtree(CACHE.with_name("home") / "stack" / "tiles", ignore_errors=True)
# Tests compile much and run little: with LLVM's optimisation of CPU code, and the emitter of fusions by
# MLIR in place of the one before it, a program takes three times as long to compile.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# What runs in the background of a script ignores interrupts, and so does what it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import install_import_hook  # noqa: E402 (imports jax)

# Shapes and types in annotations are checked at every call.
install_import_hook(["stack.layers", "stack.kernels", "stack.objectives", "stack.data"], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--refresh` writes the files that tests compare with anew: config snapshots and the schema."""
    parser.addoption("--refresh", action="store_true", help="write golden snapshots anew")


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., list[Any]]:
    """`processes.run`: a function called in several JAX processes at once."""
    spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


@pytest.fixture
def tokamax_is_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether Tokamax is installed, whatever is: `auto` and its reasons differ. At first it is not."""
    from stack.kernels.attention import KERNELS, tokamax

    def say(is_here: bool) -> None:
        monkeypatch.setattr(tokamax, "installed", lambda: is_here)
        kernel = dataclasses.replace(KERNELS["tokamax"], installed=tokamax.installed)
        monkeypatch.setitem(KERNELS, "tokamax", kernel)

    say(False)
    return say


@pytest.fixture(scope="module")
def quick_gpu_compiler() -> Iterator[None]:
    """Programs for absent GPUs without what takes most of their compilation and no collective depends on.

    Normalizations are not fused by Triton, whose tiles are searched for anew at every fusion that is tried;
    neither are products, some of which have no kernel until all that there are have been gone through; and
    kernels are not assembled. Sizes of memory to the percent need these fusions.
    """
    from stack.planner.compiled import compile as compiler

    options = {
        "xla_disable_hlo_passes": "triton-softmax-rewriter",
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_cuda_data_dir": str(Path(__file__).with_name("cuda")),
    }
    avoid_aborts = compiler.avoid_aborts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "avoid_aborts", lambda *program: avoid_aborts(*program) | options)
        yield
