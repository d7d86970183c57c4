"""XLA_FLAGS that would end the process are refused by name; the others are read once."""

import subprocess

import pytest

from stack import StackError
from stack.environment import xla_flags


@pytest.fixture
def flags(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    return lambda text: monkeypatch.setenv("XLA_FLAGS", text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_triton_gem=false",
            r"--xla_gpu_enable_triton_gem=false is no flag of .*; did you mean xla_gpu_enable_triton_gemm\?$",
        ),
        ("--xla_gpu_autotune_level=high", r"--xla_gpu_autotune_level=high is no value of that flag \(jaxlib"),
        ("--zz", r"--zz is no flag of the installed XLA \(jaxlib [\d.]+\); remove it$"),
        ("no_dashes", r'XLA does not take XLA_FLAGS=no_dashes \(.*\): Could not open file "no_dashes"'),
    ],
)
def test_flags_that_end_the_process_are_one_line(flags, text, told):
    flags(text)
    with pytest.raises(StackError, match=told):
        xla_flags.check()


def test_flags_that_are_known_are_read_once_for_each_text(flags, monkeypatch):
    flags("--xla_gpu_enable_triton_gemm=false")
    xla_flags.check()
    monkeypatch.setattr(subprocess, "run", None)
    xla_flags.check()
    flags("--xla_gpu_enable_triton_gemm=true")
    with pytest.raises(TypeError):
        xla_flags.check()
    flags("")
    xla_flags.check()


def test_flags_are_told_by_name_from_the_variable_or_the_file_it_names(flags, tmp_path):
    flags("--xla_a=1  --xla_b --xla_c='x'")
    assert xla_flags.given() == {"xla_a": "1", "xla_b": "true", "xla_c": "x"}
    file = tmp_path / "flags"
    file.write_text("--xla_a=2\n")
    flags(str(file))
    assert xla_flags.given() == {"xla_a": "2"}
    flags("")
    assert xla_flags.given() == {}
