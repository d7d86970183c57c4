"""What a run says of itself when it starts and when it ends, for the screen."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.text import Text


def introduction(info: Mapping[str, Any]) -> Text:
    """What runs, on what and where, from what the trainer tells at the start."""
    taken = f" ({info['step']:,} taken)" if info["step"] else ""
    return _lines(
        ("run", f"{info['name']}, {info['steps']:,} steps{taken} of {info['batch_tokens']:,} tokens"),
        ("model", f"{info['parameters']:,} parameters; {info['attention']}"),
        ("data", f"{info['train_tokens']:,} tokens, {info['heldout_tokens']:,} held out"),
        ("devices", f"{info['devices']}; mesh {info['mesh']}; zero {info['zero']}"),
        *([("planned", info["planned"])] if info.get("planned") else []),
        ("MFU peak", info["peak"].replace("no peak", "none")),
        ("folder", info["folder"]),
    )


def conclusion(summary: Mapping[str, Any], *, steps: int) -> Text:
    """How well the run did, a sample, where it lies and how to go on."""
    lines = []
    if "nats_per_byte" in summary:
        lines.append(("held-out", f"{summary['nats_per_byte']:.4f} nats per byte"))
    if "trigram_nats_per_byte" in summary:
        lines.append(("trigram", f"{summary['trigram_nats_per_byte']:.4f} nats per byte, to compare"))
    prompt, folder = summary["prompt"], shlex.quote(summary["folder"])
    sample = Text(_printable(prompt), "bold").append(_printable(summary["sample"]), "not bold")
    return _lines(
        *lines,
        ("sample", sample),
        ("folder", summary["folder"]),
        (
            "go on",
            f"stack sample {folder} {shlex.quote(prompt)}\nstack train {folder} train.steps={2 * steps}",
        ),
    )


def _lines(*rows: tuple[str, str | Text]) -> Text:
    """A column of labels, and values beside it; long lines are left to the terminal, so copy well."""
    text = Text()
    for label, value in rows:
        for number, line in enumerate(Text(value).split() if isinstance(value, str) else value.split()):
            text.append(f"{'' if number else label:<10}", "dim").append(line).append("\n")
    return text


def _printable(text: str) -> str:
    """Text that cannot move the cursor: a model of bytes may write escape sequences."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
