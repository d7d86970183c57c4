"""What a run says of itself when it starts and when it ends, for the screen."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def introduction(info: Mapping[str, Any]) -> Table:
    """What runs, on what and where, from what the trainer tells at the start."""
    taken = f" ({info['step']:,} taken)" if info["step"] else ""
    steps = f"{info['steps']:,} steps{taken} of {info['batch_tokens']:,} tokens"
    return _table(
        ("run", f"{info['name']}, {steps}, in {info['folder']}"),
        ("model", f"{info['parameters']:,} parameters; {info['attention']}"),
        ("data", f"{info['train_tokens']:,} tokens, {info['heldout_tokens']:,} held out"),
        ("devices", f"{info['devices']}; mesh {info['mesh']}; zero {info['zero']}"),
        ("MFU peak", info["peak"].replace("no peak", "none")),
    )


def conclusion(summary: Mapping[str, Any], *, steps: int) -> Table:
    """How well the run did, a sample, where it lies and how to go on."""
    rows = []
    if "nats_per_byte" in summary:
        measured = f"{summary['nats_per_byte']:.4f} nats per byte"
        if "trigram_nats_per_byte" in summary:
            measured += f"; a trigram model of the same text: {summary['trigram_nats_per_byte']:.4f}"
        rows.append(("held-out", measured))
    prompt, folder = summary["prompt"], shlex.quote(summary["folder"])
    sample = Text(_printable(prompt), "bold").append(_printable(summary["sample"]), "not bold")
    return _table(
        *rows,
        ("sample", sample),
        ("run", summary["folder"]),
        (
            "go on",
            f"stack sample {folder} {shlex.quote(prompt)}\nstack train {folder} train.steps={2 * steps}",
        ),
    )


def _table(*rows: tuple[str, str | Text]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value if isinstance(value, Text) else Text(value))
    return table


def _printable(text: str) -> str:
    """Text that cannot move the cursor: a model of bytes may write escape sequences."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
