"""One NVIDIA GPU: is the training step right, how fast is it, and how much memory does it take.

    PYTHONPATH=. python benchmarks/gpu.py [parity] [speed] [--seconds 540] [--json gpu.json]

Needs jax with CUDA, flax, optax, orbax and pydantic; no network and no data. Where pydantic is missing,
carry its wheels: on a machine with a network

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
        -d wheels pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions

and on the one with the GPU

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=.:site python benchmarks/gpu.py --json gpu.json

Parity: loss and gradients of one step, in float32 at full matmul precision against the CPU, and in
bfloat16 with each attention kernel as the error against float32 over the CPU's bfloat16 error; packed
rows and whole ones, GPT-2's shapes and Llama's (grouped keys, rotary, gated). Speed: GPT-2 124M and 1.5B
on random tokens. Every case is a process of its own, so what one leaves behind, memory or a crash, is
not the next one's; no case is begun after --seconds. `--tiny` tries the script out, on a CPU too.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

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


Case = Parity | Speed

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


def random_batch(rows: int, length: int, words: int, *, packed: bool) -> dict[str, Any]:
    """Random tokens; packed: documents of random lengths, about four a row."""
    import numpy as np

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


def parity(case: Parity) -> list[dict[str, Any]]:
    """One row for each precision and kernel on the device."""
    import jax

    from stack.doctor.numerics import distance, errors

    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    exact = gradient(parity_config(case, "float32", "xla"), cpu)
    rounded = distance(gradient(parity_config(case, "bfloat16", "xla"), cpu), exact)

    def float32() -> dict[str, Any]:
        found = errors(gradient(parity_config(case, "float32", "xla"), device), exact)
        # Without a soft cap the softmax takes the key bias out: its gradient is rounding alone.
        found.pop("layers.attention.key.bias", None)
        worst = max(found, key=found.__getitem__)
        ok = found[worst] <= FLOAT32_LIMIT
        return {"ok": ok, "error": found[worst], "of": worst, "loss_error": found["loss"]}

    def bfloat16(kernel: Kernel) -> dict[str, Any]:
        numbers = gradient(parity_config(case, "bfloat16", kernel), device)
        ratio = distance(numbers, exact) / rounded
        loss_error = errors(numbers, exact)["loss"]
        return {"ok": ratio <= BFLOAT16_RATIO, "ratio": ratio, "error": ratio * rounded} | {
            "loss_error": loss_error
        }

    variants = {
        "float32 xla": float32,
        "bfloat16 xla": partial(bfloat16, "xla"),
        "bfloat16 cudnn": partial(bfloat16, "cudnn"),
    }
    return [{"variant": name, **attempt(run)} for name, run in variants.items()]


def attempt(run: Any) -> dict[str, Any]:
    """What `run` returns, or why it could not."""
    try:
        return run()
    except Exception as error:  # one failing variant does not take the others with it
        return {"failed": f"{type(error).__name__}: {error}"[:600]}


def parity_config(case: Parity, dtype: str, kernel: Kernel) -> Any:
    """A small model with an odd vocabulary."""
    from stack.config import Config

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
    embed, length, rows = (64, 128, 4) if case.tiny else (512, 512, 8)
    model = {"vocab_size": 5003, "num_layers": 4, "embed_dim": embed, "num_heads": embed // 64}
    if case.tiny:
        model |= {"num_heads": 4}
    tree = {
        "model": model | families[case.family] | {"dtype": dtype, "attention": kernel},
        "data": {"sequence_length": length, "packed": case.packed},
        "train": {"batch_size": rows, "remat": "full", "loss_chunk": 256},
    }
    return Config.model_validate(tree)


def gradient(config: Any, device: Any) -> Any:
    """Loss and gradients of one batch at initialisation, on one device."""
    import jax
    import numpy as np

    from stack.doctor.numerics import Numbers
    from stack.train import program as programs
    from stack.train import state as states
    from stack.train.step import loss_gradient

    program = programs.build(config, [device])
    rows, length = config.train.batch_size, config.data.sequence_length
    numbers = random_batch(rows, length, config.model.vocab_size, packed=config.data.packed)
    precision = "highest" if config.model.dtype == "float32" else "default"
    with jax.set_mesh(states.concrete(program)), jax.default_matmul_precision(precision):
        batch = jax.device_put(numbers, program.layout.sharding("batch"))
        params = jax.device_put(cpu_params(config), program.layout.sharding())
        step = jax.device_put(np.int32(0), program.layout.sharding())
        found, sums, tokens = jax.jit(partial(loss_gradient, program))(params, step, batch)
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}
    return Numbers(loss=float(sums.loss / tokens), params={}, gradient=named)


def cpu_params(config: Any) -> Any:
    """The same initial parameters for every device: random bits agree, their logarithms need not."""
    import jax

    from stack.train import program as programs
    from stack.train import state as states

    plain = config.replace("model.attention=xla")
    return jax.device_get(states.init_params(programs.build(plain, jax.devices("cpu")[:1])))


def speed(case: Speed) -> list[dict[str, Any]]:
    """Time, tokens, MFU and memory of the step, compiled as the trainer compiles it."""
    import jax

    from stack import load
    from stack.plan.hardware import mfu
    from stack.train import program as programs
    from stack.train import state as states
    from stack.train.step import compiler_options, train_step

    overrides = [
        f"model.attention={case.kernel}",
        f"data.packed={str(case.packed).lower()}",
        f"train.remat={case.remat}",
        f"train.batch_size={2 if case.tiny else case.rows}",
        "train.accumulation=1",
        "eval.batch_size=null",
    ]
    if case.tiny:
        overrides += [
            "model.num_layers=2",
            "model.embed_dim=128",
            "model.num_heads=2",
            "model.vocab_size=999",
        ]
        overrides += ["data.sequence_length=64", "model.max_length=64"]
    config = load(CONFIGS / f"{case.recipe}.yaml", overrides)
    device = jax.devices()[0]
    program = programs.build(config, [device])
    rows, length = config.train.batch_size, config.data.sequence_length
    numbers = random_batch(rows, length, config.model.vocab_size, packed=case.packed)
    with jax.set_mesh(states.concrete(program)):
        state = states.init(program)
        batch = jax.device_put(numbers, program.layout.sharding("batch"))
        options = compiler_options(device.platform)
        step = jax.jit(partial(train_step, program), donate_argnums=0, compiler_options=options)
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        planned = compiled.memory_analysis()
        blocks, metrics = [], {}
        for number in range(1 + (2 if case.tiny else BLOCKS)):
            start = time.perf_counter()
            for _ in range(STEPS_PER_BLOCK):
                state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            if number:  # the first warms up
                blocks.append((time.perf_counter() - start) / STEPS_PER_BLOCK)
    seconds = statistics.median(blocks)
    used = mfu(
        config.model,
        length=length,
        tokens_per_second_per_device=rows * length / seconds,
        device_kind=device.device_kind,
    )
    allocated = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return [
        {
            "attention": str(program.attention),
            "step_ms": 1e3 * seconds,
            "fastest_ms": 1e3 * min(blocks),
            "slowest_ms": 1e3 * max(blocks),
            "tokens_per_second": rows * length / seconds,
            "mfu_full": used.full,
            "mfu_causal": used.causal,
            "peak": used.peak,
            "allocated_bytes": allocated,
            "planned_bytes": planned.argument_size_in_bytes
            + planned.output_size_in_bytes
            - planned.alias_size_in_bytes
            + planned.temp_size_in_bytes,
            "compile_seconds": compile_seconds,
            "loss": float(metrics["loss"]),
        }
    ]


def machine() -> list[dict[str, Any]]:
    """What the figures are of, and the rate of the best matrix product as the practical ceiling."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "nvidia-cudnn-cu13")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    size = 8192 if device.platform == "gpu" else 256
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    times = []
    for _ in range(20):
        jax.block_until_ready((left, right))
        start = time.perf_counter()
        jax.block_until_ready(product(left, right))
        times.append(time.perf_counter() - start)
    rate = 2 * size**3 / statistics.median(times)
    return [
        {
            "device": device.device_kind,
            "client": device.client.platform_version.replace("\n", ", "),
            "versions": versions,
            f"bfloat16 product of {size}, TFLOP/s": rate / 1e12,
        }
    ]


def child(case: Case | None) -> list[dict[str, Any]]:
    """Runs a case in its own process, and says why if it ends early."""
    text = json.dumps(None if case is None else {"kind": type(case).__name__, **dataclasses.asdict(case)})
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--case", text],
            capture_output=True,
            text=True,
            timeout=CASE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [{"failed": f"not done after {CASE_SECONDS} s"}]
    for line in done.stdout.splitlines():
        if line.startswith('[{"'):
            return json.loads(line)
    reasons = [line for line in done.stderr.splitlines() if line.strip()]
    return [{"failed": f"exit {done.returncode}: {' | '.join(reasons[-3:])}"[:600]}]


def run_case(text: str) -> None:
    """The body of the child: prints its rows as one line of JSON."""
    fields = json.loads(text)
    if fields is None:
        rows = machine()
    elif fields.pop("kind") == "Parity":
        rows = parity(Parity(**fields))
    else:
        rows = [attempt(lambda: speed(Speed(**fields))[0])]
    print(json.dumps(rows), flush=True)


def row_text(case: Case, row: dict[str, Any]) -> str:
    """One line of the table."""
    packed = "packed" if case.packed else "whole"
    if isinstance(case, Parity):
        title = f"{case.family:6} {packed:6} {row.get('variant', ''):15}"
    else:
        title = f"{case.recipe} {case.kernel:5} {case.rows:3} rows, remat {case.remat:13} {packed:6}"
    if "failed" in row:
        return f"{title} FAILED {row['failed']}"
    if isinstance(case, Parity):
        ratio = f"{row['ratio']:.3f} x the CPU's bfloat16 error" if "ratio" in row else f"worst: {row['of']}"
        verdict = "ok" if row["ok"] else "TOO FAR"
        return f"{title} {verdict:8} error {row['error']:.2e}, loss {row['loss_error']:.1e}, {ratio}"
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
    parser.add_argument("parts", nargs="*", metavar="part", help="parity, speed; both if none is named")
    parser.add_argument("--seconds", type=float, default=540, help="no case is begun after this")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case)
        return
    if unknown := set(arguments.parts) - {"parity", "speed"}:
        parser.error(f"no such part: {', '.join(unknown)}; there are parity and speed")

    parts = arguments.parts or ["parity", "speed"]
    cases: list[Case] = [*(PARITY if "parity" in parts else []), *(SPEED if "speed" in parts else [])]
    begun = time.perf_counter()
    about = child(None)[0]
    print(json.dumps(about, indent=2), flush=True)
    report: dict[str, Any] = {"machine": about, "cases": []}
    lines = []
    for case in cases:
        case = dataclasses.replace(case, tiny=arguments.tiny)
        late = time.perf_counter() - begun > arguments.seconds
        rows = [{"failed": f"not begun within {arguments.seconds:.0f} s"}] if late else child(case)
        report["cases"].append({"case": dataclasses.asdict(case), "rows": rows})
        lines += [row_text(case, row) for row in rows]
        print(f"{time.perf_counter() - begun:4.0f} s  {lines[-1]}", file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
