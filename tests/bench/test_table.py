"""What a person reads: one table for all suites, and a summary that says what is uncertain or wrong."""

from pathlib import Path

from stack.bench import table
from stack.bench.case import Case, Machine, Row, derive

SNAPSHOT = Path(__file__).with_name("table.txt")
MACHINE = Machine(
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    compute_capability=9.0,
    memory_bytes=80 * 2**30,
    processor="Intel Xeon",
    cores=16,
    versions={"jax": "0.11.2", "flax": "0.12.12"},
    client="PJRT C API, cuda 13000",
)
CEILINGS = {"bfloat16": 700e12, "float8": 1300e12, "copy": 2.9e12}


def step(by: str, team: str, blocks: list[float], **facts) -> Row:
    made = {
        "tokens": 16_384,
        "flops_full": 2e14,
        "flops_causal": 1.8e14,
        "precision": "bfloat16",
        "peak_flops": 989e12,
        "rows": 8,
        "remat": "none",
    }
    title = "gpt2_1_5b, 2,048 whole, bfloat16, 8 rows, remat none"
    return Row(
        suite="step",
        title=title,
        by=by,
        team=team,
        status="measured",
        blocks=blocks,
        facts={**made, **facts},
    )


def rows() -> list[Row]:
    product = {"precision": "bfloat16", "flops_full": 1.1e12, "error": 1.7e-3}
    made = [
        Row(
            suite="ceilings",
            title="products and a copy",
            by="bfloat16 8192 x 8192 x 8192",
            team="stack",
            status="measured",
            blocks=[1.6e-3, 1.61e-3, 1.59e-3],
            facts=product,
        ),
        Row(
            suite="ceilings",
            title="products and a copy",
            by="copy of 1024 MiB",
            team="stack",
            status="measured",
            blocks=[0.75e-3] * 3,
            facts={"bytes": 2 * 2**30},
        ),
        step(
            "stack",
            "stack",
            [0.4, 0.39, 0.41],
            planned_seconds=0.5,
            planned_bytes=28 * 2**30,
            peak_bytes=27.5 * 2**30,
        ),
        step("torch compiled", "torch", [0.5, 0.6, 0.49], note="attention cudnn, loss chunked"),
        Row(
            suite="attention",
            title="llama3_8b, 4 x 8,192 packed, bfloat16",
            by="mosaic_gpu, forward",
            team="stack",
            status="wrong",
            reason="error of key 0.3, limit 0.02",
        ),
    ]
    for row in made:
        derive(row, CEILINGS)
    return made


def test_the_table_reads_so(request):
    made = rows()
    about = {
        "commit": "commit b1ffe83b90",
        "load": 0.31,
        "peers": {"torch": "2.11.0+cu130", "tokamax": "absent: not installed"},
    }
    cases = [Case(suite=row.suite, title=row.title, spec={}, priority=0, together=False) for row in made]
    text = [*table.head(MACHINE, about), table.ceilings_line(CEILINGS), table.heading()]
    text += [*table.lines(cases[0], made[:2]), *table.lines(cases[2], made[2:4])]
    text += table.lines(cases[4], made[4:])
    text += ["", *table.summary(made)]
    told = "\n".join([*text, ""])
    if request.config.getoption("refresh"):
        SNAPSHOT.write_text(told)
    assert told == SNAPSHOT.read_text()


def test_sizes_and_times_have_the_unit_that_suits_them():
    assert [table.time_text(seconds) for seconds in (2.5, 0.0025, 2.5e-6)] == ["2.5 s", "2.5 ms", "2.5 µs"]
    assert [table.size_text(size) for size in (27.5 * 2**30, 2**26, 2**12)] == [
        "27.5 GiB",
        "64 MiB",
        "4 KiB",
    ]


def test_steps_of_other_settings_compete_and_other_passes_do_not():
    slow, fast = step("stack", "stack", [0.4] * 3), step("stack", "stack", [0.5] * 3, rows=16, tokens=32_768)
    fast.title = fast.title.replace("8 rows, remat none", "16 rows, remat full")
    peer = step("torch compiled", "torch", [0.5] * 3)
    made = [slow, fast, peer]
    for row in made:
        derive(row, CEILINGS)
    (line,) = table.summary(made)
    assert line == (
        "step: gpt2_1_5b, 2,048 whole, bfloat16: stack (16 rows, remat none) 2.00 x the speed of"
        " torch compiled (8 rows, remat none)"
    )
    for row, group in zip(made, ("forward", "with gradients", "forward"), strict=True):
        row.suite, row.facts = "attention", {"group": group}
    (line,) = table.summary(made)
    assert ", forward: stack 1.25 x the speed of torch compiled" in line
