"""One NVIDIA GPU: is the training step right, how fast is it, and how much memory does it take.

    PYTHONPATH=. python benchmarks/gpu.py [speed] [rows] [parity] [--seconds 540] [--json gpu.json]

Needs jax with CUDA, flax, optax and pydantic; no network and no data. Where pydantic is missing,
carry its wheels: on a machine with a network

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
        -d wheels pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions

and on the one with the GPU

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=.:site python benchmarks/gpu.py --json gpu.json

Parity: loss and gradients of one step, in float32 at full matmul precision against the CPU, and in
bfloat16 with each attention kernel as the error against float32 over the CPU's bfloat16 error; packed
rows and whole ones, GPT-2's shapes and Llama's (grouped keys, rotary, gated). Rows: the gradient of a word
table, summed in an order that stays, beside a plain scatter. Speed: GPT-2 124M and 1.5B on random tokens.
Every case is a process of its own, so what one leaves behind, memory or a crash, is not the next one's; no
case is begun after --seconds. `--tiny` tries the script out, on a CPU too.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stack.config import Config, StackError, load
from stack.doctor.numerics import Numbers, distance, errors
from stack.layers.embedding import sum_sorted_rows
from stack.models.flops import mfu
from stack.step import program as programs
from stack.step import state as states
from stack.step.options import compiler_options, compiler_settings
from stack.step.step import loss_gradient, train_step

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CASE_SECONDS = 240
BLOCKS, STEPS_PER_BLOCK = 7, 5
FLOAT32_LIMIT, BFLOAT16_RATIO = 1e-5, 1.2
Kernel = Literal["xla", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """Gradients of one step of a small model, against the CPU."""

    family: Literal["gpt", "llama"]
    packed: bool
    tiny: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Training steps of a recipe on random tokens."""

    recipe: str
    kernel: Kernel
    rows: int
    remat: str
    packed: bool = False
    tiny: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The gradient of a table of words: `stack.layers.embedding.sum_sorted_rows` beside a scatter."""

    tokens: int
    width: int
    words: int
    packed: bool = False
    tiny: bool = False


Case = Parity | Speed | Rows
Row = dict[str, Any]
"""What a case found, or under `failed` or `not run` why it found nothing."""

PARITY = [Parity(family=family, packed=packed) for family in ("gpt", "llama") for packed in (False, True)]
SPEED = [
    Speed(recipe="gpt2_124m", kernel="cudnn", rows=32, remat="none"),
    Speed(recipe="gpt2_124m", kernel="xla", rows=32, remat="none"),
    Speed(recipe="gpt2_1_5b", kernel="cudnn", rows=16, remat="full"),
    Speed(recipe="gpt2_1_5b", kernel="xla", rows=16, remat="full"),
    Speed(recipe="gpt2_1_5b", kernel="cudnn", rows=8, remat="none"),
    Speed(recipe="gpt2_124m", kernel="cudnn", rows=32, remat="none", packed=True),
    Speed(recipe="gpt2_124m", kernel="xla", rows=32, remat="none", packed=True),
    Speed(recipe="gpt2_1_5b", kernel="cudnn", rows=16, remat="dots"),
    Speed(recipe="gpt2_1_5b", kernel="cudnn", rows=16, remat="full", packed=True),
    Speed(recipe="gpt2_1_5b", kernel="cudnn", rows=16, remat="save_qkv_proj"),
    Speed(recipe="gpt2_124m", kernel="cudnn", rows=64, remat="none"),
    Speed(recipe="gpt2_1_5b", kernel="cudnn", rows=32, remat="full"),
]
"""What matters most comes first: time may run out."""

ROWS = [Rows(tokens=32_768, width=768, words=50_304), Rows(tokens=8_192, width=4_096, words=128_256)]
"""GPT-2 124M's and Llama 3 8B's, of one micro-batch."""

PARTS: dict[str, list[Case]] = {"speed": [*SPEED], "rows": [*ROWS], "parity": [*PARITY]}


def random_batch(rows: int, length: int, words: int, *, packed: bool) -> dict[str, Any]:
    """Random tokens; packed: documents of random lengths, about four a row."""
    rng = np.random.default_rng(0)
    stream = rng.integers(0, words, (rows, length + 1), dtype=np.int32)
    starts = rng.random((rows, length)) < (4 / length if packed else 0.0)
    starts[:, 0] = True
    places = np.arange(length, dtype=np.int32)
    ends = np.concatenate([starts[:, 1:], np.ones((rows, 1), bool)], axis=1)
    return {
        "tokens": stream[:, :-1],
        "labels": np.where(ends & packed, -1, stream[:, 1:]).astype(np.int32),
        "segments": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": places - np.maximum.accumulate(np.where(starts, places, 0), axis=1),
        "example": np.arange(rows, dtype=np.int32),
    }


def parity(case: Parity) -> Iterator[Row]:
    """One row for each precision and kernel on the device."""
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    params = initial(parity_config(case, "float32", "xla"), cpu)

    def run(dtype: str, kernel: Kernel, where: jax.Device) -> Numbers:
        return gradient(parity_config(case, dtype, kernel), params, where)

    exact = run("float32", "xla", cpu)
    rounded = distance(run("bfloat16", "xla", cpu), exact)

    def float32() -> Row:
        found = errors(run("float32", "xla", device), exact)
        # Without a soft cap the softmax takes the key bias out: its gradient is rounding alone.
        found.pop("layers.attention.key.bias", None)
        worst = max(found, key=found.__getitem__)
        ok = found[worst] <= FLOAT32_LIMIT
        return {"ok": ok, "error": found[worst], "of": worst, "loss_error": found["loss"]}

    def bfloat16(kernel: Kernel) -> Row:
        numbers = run("bfloat16", kernel, device)
        error, loss_error = distance(numbers, exact), errors(numbers, exact)["loss"]
        ratio = error / rounded
        return {"ok": ratio <= BFLOAT16_RATIO, "error": error, "ratio": ratio, "loss_error": loss_error}

    yield {"variant": "float32 xla"} | attempt(float32)
    yield {"variant": "bfloat16 xla"} | attempt(partial(bfloat16, "xla"))
    yield {"variant": "bfloat16 cudnn"} | attempt(partial(bfloat16, "cudnn"))


def attempt(run: Callable[[], Row]) -> Row:
    """What `run` returns, or why it could not."""
    try:
        return run()
    except StackError as error:
        return {"not run": str(error)}
    except Exception as error:  # one failing variant does not take the others with it
        return {"failed": f"{type(error).__name__}: {error}"[:600]}


def parity_config(case: Parity, dtype: str, kernel: Kernel) -> Config:
    """A small model with an odd vocabulary."""
    families = {
        "gpt": {},
        "llama": {
            "num_kv_heads": 2,
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "position": "rotary",
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": False,
            "mlp_bias": False,
            "tied_embeddings": False,
            "sliding_window": 100,
        },
    }
    embed, length, rows = (64, 128, 4) if case.tiny else (256, 256, 8)
    model = {"vocab_size": 5003, "num_layers": 4, "embed_dim": embed, "num_heads": embed // 64}
    if case.tiny:
        model |= {"num_heads": 4}
    tree = {
        "model": model | families[case.family] | {"dtype": dtype, "attention": kernel},
        "data": {"sequence_length": length, "packed": case.packed},
        "train": {"batch_size": rows, "remat": "full"},
        "objective": {"logits_bytes": 256 * 4 * 5120},
    }
    return Config.model_validate(tree)


def initial(config: Config, device: jax.Device) -> Any:
    """Initial parameters on the host, for every device: random bits agree, their logarithms need not."""
    return jax.device_get(states.init_params(programs.build(config, [device])))


def gradient(config: Config, params: Any, device: jax.Device) -> Numbers:
    """Loss and gradients of one batch, on one device."""
    program = programs.build(config, [device])
    rows, length = config.train.batch_size, config.data.sequence_length
    numbers = random_batch(rows, length, config.model.vocab_size, packed=config.data.packed)
    precision = "highest" if config.model.dtype == "float32" else "default"
    with jax.set_mesh(states.concrete(program)), jax.default_matmul_precision(precision):
        batch = jax.device_put(numbers, program.layout.sharding("batch"))
        placed = jax.device_put(params, program.layout.sharding())
        step = jax.device_put(np.int32(0), program.layout.sharding())
        found, sums = jax.jit(partial(loss_gradient, program))(placed, step, batch)
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}
    return Numbers(loss=float(sums["loss"]), params={}, gradient=named)


def speed(case: Speed) -> Row:
    """Time, tokens, MFU and memory of the step, compiled as the trainer compiles it."""
    config, device = speed_config(case), jax.devices()[0]
    program = programs.build(config, [device])
    rows, length = config.train.batch_size, config.data.sequence_length
    numbers = random_batch(rows, length, config.model.vocab_size, packed=case.packed)
    options = compiler_options(compiler_settings(program))
    with jax.set_mesh(states.concrete(program)):
        state = states.init(program)
        batch = jax.device_put(numbers, program.layout.sharding("batch"))
        step = jax.jit(partial(train_step, program), donate_argnums=0, compiler_options=options)
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        blocks, loss = timed(compiled, state, batch, blocks=2 if case.tiny else BLOCKS)
    seconds = statistics.median(blocks)
    used = mfu(
        config.model,
        length=length,
        tokens_per_second_per_device=rows * length / seconds,
        device_kind=device.device_kind,
    )
    plan: Any = compiled.memory_analysis()
    arguments_and_results = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {
        "attention": str(program.attention),
        "step_ms": 1e3 * seconds,
        "fastest_ms": 1e3 * min(blocks),
        "slowest_ms": 1e3 * max(blocks),
        "tokens_per_second": rows * length / seconds,
        "mfu_full": used.full,
        "mfu_causal": used.causal,
        "peak": used.peak,
        "allocated_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "planned_bytes": arguments_and_results + plan.temp_size_in_bytes,
        "compile_seconds": compile_seconds,
        "loss": loss,
    }


def sum_rows_twice(case: Rows) -> Row:
    """Milliseconds of both, whether each gives the same bits again, and the error against float64."""
    tokens, width, words = (1000, 16, 99) if case.tiny else (case.tokens, case.width, case.words)
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(words) + 2.7)  # Zipf's law, as in text
    ids = rng.choice(words, tokens, p=share / share.sum()).astype(np.int32)
    values = rng.normal(size=(tokens, width)).astype("bfloat16")
    exact = np.zeros((words, width))
    np.add.at(exact, ids, values.astype(np.float64))

    def scatter(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values.astype(jnp.float32), ids, words)

    row: Row = {}
    for name, add in (("sorted", partial(sum_sorted_rows, number=words)), ("scatter", scatter)):
        compiled, arrays, seconds = jax.jit(add), jax.device_put((values, ids)), []
        results = [np.asarray(compiled(*arrays)) for _ in range(5)]
        for _ in range(20):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            seconds.append(time.perf_counter() - start)
        row |= {
            f"{name}_ms": 1e3 * statistics.median(seconds),
            f"{name}_repeats": all((one == results[0]).all() for one in results),
            f"{name}_error": float(np.abs(results[0] - exact).max() / np.abs(exact).max()),
        }
    return row


def speed_config(case: Speed) -> Config:
    """The recipe on one device, without accumulation."""
    overrides = [
        f"model.attention={case.kernel}",
        f"data.packed={str(case.packed).lower()}",
        f"train.remat={case.remat}",
        f"train.batch_size={2 if case.tiny else case.rows}",
        "train.accumulation=1",
        "eval.batch_size=null",
    ]
    if case.tiny:
        overrides += ["model.num_layers=2", "model.embed_dim=128", "model.num_heads=2"]
        overrides += ["model.vocab_size=999", "data.sequence_length=64", "model.max_length=64"]
    return load(CONFIGS / f"{case.recipe}.yaml", overrides)


def timed(step: Any, state: Any, batch: Any, *, blocks: int) -> tuple[list[float], float]:
    """Seconds per step of each block of steps, and the last loss.

    Steps of a block are queued as in training; the device is waited for at the block's end.
    """
    seconds, metrics = [], {}
    for number in range(1 + blocks):
        start = time.perf_counter()
        for _ in range(STEPS_PER_BLOCK):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if number:  # the first warms up
            seconds.append((time.perf_counter() - start) / STEPS_PER_BLOCK)
    return seconds, float(metrics["loss"])


def machine() -> Row:
    """What the figures are of, and the rate of a large matrix product, the practical ceiling."""
    device, versions = jax.devices()[0], {}
    for name in ("jax", "jaxlib", "flax", "optax", "tensorstore", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    size = 256 if device.platform == "cpu" else 8192
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product, seconds = jax.jit(jnp.matmul), []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(product(left, right))
        seconds.append(time.perf_counter() - start)
    return {
        "device": device.device_kind,
        "client": device.client.platform_version.replace("\n", ", "),
        "versions": versions,
        f"bfloat16 product of {size}, TFLOP/s": 2 * size**3 / statistics.median(seconds) / 1e12,
    }


def rows_of(case: Case | None) -> list[Row]:
    """What a case finds in a process of its own, and why it found no more; None: the machine."""
    text = json.dumps(None if case is None else {"kind": type(case).__name__, **dataclasses.asdict(case)})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, __file__, "--case", text], stdout=out, stderr=err)
        try:
            ended = f"exit {process.wait(CASE_SECONDS)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"not done after {CASE_SECONDS} s"
        out.seek(0)
        err.seek(0)
        rows = [json.loads(line) for line in out if line.startswith('{"')]
        if process.returncode:
            said = [line.strip() for line in err if line.strip()]
            rows.append({"failed": f"{ended}: {' | '.join(said[-3:])}"[:600]})
    return rows


def run_case(text: str) -> None:
    """The body of such a process: prints rows as they are found, each a line of JSON."""
    fields = json.loads(text)
    kind = fields.pop("kind") if fields else None
    found = {
        None: lambda: [machine()],
        "Parity": lambda: parity(Parity(**fields)),
        "Rows": lambda: [attempt(lambda: sum_rows_twice(Rows(**fields)))],
        "Speed": lambda: [attempt(lambda: speed(Speed(**fields)))],
    }
    for row in found[kind]():
        print(json.dumps(row), flush=True)


def row_text(case: Case, row: Row) -> str:
    """One line of the table."""
    packed = "packed" if case.packed else "whole"
    if isinstance(case, Parity):
        title = f"{case.family:6} {packed:6} {row.get('variant', ''):15}"
    elif isinstance(case, Rows):
        title = f"{case.tokens:,} x {case.width:,} into {case.words:,} rows"
    else:
        title = f"{case.recipe} {case.kernel:5} {case.rows:3} rows, remat {case.remat:13} {packed:6}"
    for word in ("failed", "not run"):
        if word in row:
            return f"{title} {word}: {row[word]}"
    if isinstance(case, Parity):
        ratio = f"{row['ratio']:.3f} x the CPU's bfloat16 error" if "ratio" in row else f"worst: {row['of']}"
        verdict = "ok" if row["ok"] else "TOO FAR"
        return f"{title} {verdict:8} error {row['error']:.2e}, loss {row['loss_error']:.1e}, {ratio}"
    if isinstance(case, Rows):
        return f"{title} " + ", ".join(
            f"{name} {row[f'{name}_ms']:.2f} ms, "
            f"{'the same' if row[f'{name}_repeats'] else 'other'} bits, error {row[f'{name}_error']:.1e}"
            for name in ("scan", "scatter")
        )
    used = (
        f"MFU {row['mfu_full']:.1%} full {row['mfu_causal']:.1%} causal" if row["mfu_full"] else row["peak"]
    )
    held = f"{row['allocated_bytes'] / 2**30:.1f}" if row["allocated_bytes"] else "?"
    return (
        f"{title} {row['step_ms']:8.1f} ms ({row['fastest_ms']:.1f} to {row['slowest_ms']:.1f})"
        f" {row['tokens_per_second']:9,.0f} tokens/s  {used}  {held} GiB held,"
        f" {row['planned_bytes'] / 2**30:.1f} planned  compiled in {row['compile_seconds']:.0f} s"
    )


def main() -> None:
    """Runs the cases and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="speed, rows, parity; all if none is named")
    parser.add_argument("--seconds", type=float, default=540, help="no case is begun after this")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case)
        return
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")

    cases = [case for part in arguments.parts or PARTS for case in PARTS[part]]
    begun = time.perf_counter()
    (about,) = rows_of(None)
    print(json.dumps(about, indent=2), flush=True)
    report: dict[str, Any] = {"machine": about, "cases": []}
    lines = []
    for listed in cases:
        case = dataclasses.replace(listed, tiny=arguments.tiny)
        taken = time.perf_counter() - begun
        in_time = taken < arguments.seconds
        rows = rows_of(case) if in_time else [{"not run": f"{taken:.0f} s were over"}]
        report["cases"].append({"case": dataclasses.asdict(case), "rows": rows})
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2))
        lines += [row_text(case, row) for row in rows]
        print(f"{taken:4.0f} s  {lines[-1]}", file=sys.stderr, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
