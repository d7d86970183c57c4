"""What a run says of itself when it starts and when it ends, for the screen."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from stack.data.dataset import Data
from stack.step import state as states
from stack.step.program import Program
from stack.train.ledger import Ledger
from stack.train.weights.origin import describe


def introduce(program: Program, data: Data, folder: Path, ledger: Ledger) -> dict[str, Any]:
    """What is known of a run when it starts, for all who listen."""
    config, layout, mesh = program.config, program.layout, states.concrete(program)
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return {
        "name": config.name,
        "folder": str(folder),
        "step": ledger.position.step,
        "rows": ledger.position.rows,
        "steps": config.train.steps,
        "parameters": program.num_parameters,
        **({"trained": program.num_trained} if program.frozen else {}),
        "weights": describe(ledger.origin),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device",
        "zero": config.mesh.zero,
        **({"pipeline": str(program.pipeline(program.stacks))} if layout.size("stage") > 1 else {}),
        **({"average": _average(program)} if program.instances else {}),
        "attention": str(program.attention),
        "settings": [str(setting) for setting in ledger.settings],
        "products": str(program.matmul),
        "train_tokens": data.train.num_tokens,
        "heldout_tokens": data.heldout.num_tokens,
        "batch_tokens": config.train.batch_size * config.data.sequence_length,
    }


def introduction(info: Mapping[str, Any]) -> Text:
    """What runs, on what and where, from what the trainer and its listeners tell at the start."""
    taken = f" ({info['step']:,} taken)" if info["step"] else ""
    some = f", {info['trained']:,} of them trained" if "trained" in info else ""
    rows = {
        "run": f"{info['name']}, {info['steps']:,} steps{taken} of {info['batch_tokens']:,} tokens",
        "model": f"{info['parameters']:,} parameters{some}; {info['attention']}",
        "products": _in_8_bits(info["products"]),
        "weights": info.get("weights"),
        "data": f"{info['train_tokens']:,} tokens, {info['heldout_tokens']:,} held out",
        "devices": f"{info['devices']}; mesh {info['mesh']}; zero {info['zero']}",
        "pipeline": info.get("pipeline"),
        "average": info.get("average"),
        "set": "\n".join(info.get("settings", ())),
        "planned": info.get("planned"),
        "memory": info.get("memory"),
        "MFU peak": info.get("peak", "").replace("no peak", "none"),
        "folder": info["folder"],
    }
    return _lines(*((label, text) for label, text in rows.items() if text))


def _average(program: Program) -> str:
    """How many train apart, and when and how they are averaged."""
    average, instances = program.config.average, program.instances
    assert instances is not None, "there are some"
    how = {
        "none": "their mean (local SGD)",
        "nesterov": f"an outer step of rate {average.outer_learning_rate:g}, momentum"
        f" {average.outer_momentum:g} (DiLoCo)",
    }[average.outer]
    every = "every step" if average.every == 1 else f"every {average.every:,} steps"
    who = f"{instances.number} instances"
    if average.folder is not None:
        who = f"instance {average.instance} of {average.instances}, who meet in {average.folder}"
    return f"{who}, {every} {how}"


def _in_8_bits(products: str) -> str | None:
    """How products are computed, where that is not in the model's dtype, which the config says."""
    return products.removeprefix("products: ") if "fp8" in products else None


def conclusion(summary: Mapping[str, Any]) -> Text:
    """What the objective shows, where the run lies and how to go on."""
    folder = shlex.quote(summary["folder"])
    going_on = [f"stack train {folder} {shlex.join(summary['longer'])}"]
    if "prompt" in summary:
        going_on.insert(0, f"stack sample {folder} {shlex.quote(summary['prompt'])}")
    return _lines(*summary["rows"], ("folder", summary["folder"]), ("go on", "\n".join(going_on)))


def _lines(*rows: tuple[str, str | Text]) -> Text:
    """A column of labels, and values beside it; long lines are left to the terminal, so copy well."""
    text = Text()
    for label, value in rows:
        for number, line in enumerate(Text(value).split() if isinstance(value, str) else value.split()):
            text.append(f"{'' if number else label:<10}", "dim").append(line).append("\n")
    return text
