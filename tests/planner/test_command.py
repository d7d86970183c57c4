"""`stack plan` as it is typed."""

import json
from pathlib import Path

import pytest

from stack.cli import main
from stack.config import load
from stack.planner.validate import TABLE

LLAMA = str(Path(__file__).parents[2] / "configs" / "llama3_8b.yaml")
SMALL = ["model.num_layers=4", "model.embed_dim=1024", "model.num_heads=8", "model.mlp_dim=4096"]


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["plan", *arguments])
    return status, *capsys.readouterr()


def test_a_plan_prints_memory_time_and_what_binds(capsys):
    status, out, error = plan(capsys, LLAMA, "--hardware", "h100", "--devices", "1024")
    assert (status, error) == (0, "")
    for text in (
        "8,030,261,248 parameters",
        "memory of a device, GB",
        "time of a step",
        "MFU",
        "device-hours",
    ):
        assert text in out
    assert "binds" in out


def test_a_plan_takes_the_configs_target_and_overrides(capsys):
    status, out, _ = plan(capsys, LLAMA, "target={hardware: b200, devices: 8}", "--price", "3")
    assert status == 0
    assert "8 x NVIDIA B200" in out
    assert ", cost " in out


@pytest.mark.full
def test_json_is_json(capsys):
    for arguments in ([LLAMA, "--hardware", "h200", "--devices", "8"], ["--validate"]):
        status, out, _ = plan(capsys, *arguments, "--json")
        assert status == 0
        assert json.loads(out)


@pytest.mark.full
def test_a_search_writes_a_config_that_loads(capsys, tmp_path):
    out = tmp_path / "best.yaml"
    status, text, _ = plan(
        capsys,
        LLAMA,
        *SMALL,
        "--hardware",
        "h100",
        "--devices",
        "16",
        "--search",
        "--top",
        "2",
        "--out",
        str(out),
    )
    assert status == 0
    assert f"wrote the first to {out}" in text
    assert load(out).mesh.auto is False


@pytest.mark.full
def test_a_range_of_devices_gives_the_curve(capsys, tmp_path):
    picture = tmp_path / "curve.png"
    arguments = [LLAMA, *SMALL, "--hardware", "h100", "--devices", "8..32", "--out", str(picture)]
    status, text, _ = plan(capsys, *arguments)
    assert status == 0
    assert "strong" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_validate_takes_a_table_of_the_users_own(capsys, tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("\n".join(TABLE.read_text().splitlines()[:4]) + "\nnot,a,row\n")
    status, text, _ = plan(capsys, "--validate", str(table))
    assert status == 0
    assert "3 runs predicted, 1 refused" in text
    assert "refused line 5: too few columns" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which config? for example `stack plan configs/llama3_8b.yaml`"),
        ([LLAMA, "--hardware", "h1000"], "'h1000' is unknown; did you mean h100?"),
        ([LLAMA, "--hardware", "h100", "--devices", "12"], "mesh.fsdp=6"),
        ([LLAMA, "--hardware", "h100", "--devices", "many"], "--devices many: expected a number above 0"),
        ([LLAMA, "--hardware", "h100", "--devices", "-8"], "--devices -8: expected a number above 0"),
        ([LLAMA, "--hardware", "h100", "--devices", "64..8"], "devices=64..8: expected a range"),
        ([LLAMA, "--search", "--compile"], "--search and --compile are different questions"),
        ([LLAMA, "--out", "a.yaml"], "--out is written by --search"),
        ([LLAMA, "--price", "0"], "--price 0 must be above 0"),
        (
            [LLAMA, "--search", "--top", "0", "--hardware", "h100", "--devices", "8"],
            "--top 0 must be at least 1",
        ),
        (["--validate", "none.csv"], "none.csv: cannot be read as a CSV file"),
    ],
)
def test_what_cannot_be_is_one_line_with_status_2(capsys, arguments, message):
    status, out, error = plan(capsys, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.full
def test_a_curve_is_drawn_as_text_too(capsys):
    status, out, _ = plan(capsys, LLAMA, "--hardware", "h100", "--devices", "8..64")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 120
    assert out.count("########## 100.0%") >= 2
    assert "--out curve.png" in out


def test_what_does_not_fit_is_an_error_after_its_lines(capsys):
    for options in ([], ["--json"]):
        assert main(["plan", LLAMA, "--hardware", "t4", "--devices", "8", *options]) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith("error: llama3_8b does not fit: memory: it needs")
        assert shown.err.count("\n") == 1
        assert '"fits": false' in shown.out if options else "DOES NOT FIT in 16" in shown.out


@pytest.mark.parametrize("options", [pytest.param(["--search"], marks=pytest.mark.full), []])
def test_tables_are_of_a_screens_width(capsys, options):
    status, out, _ = plan(capsys, LLAMA, "--hardware", "b200", "--devices", "64", *options)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 120
