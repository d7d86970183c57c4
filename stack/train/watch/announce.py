"""What a run says of itself when it starts and when it ends, for the screen."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.text import Text


def introduction(info: Mapping[str, Any]) -> Text:
    """What runs, on what and where, from what the trainer and its listeners tell at the start."""
    taken = f" ({info['step']:,} taken)" if info["step"] else ""
    rows = {
        "run": f"{info['name']}, {info['steps']:,} steps{taken} of {info['batch_tokens']:,} tokens",
        "model": f"{info['parameters']:,} parameters; {info['attention']}",
        "data": f"{info['train_tokens']:,} tokens, {info['heldout_tokens']:,} held out",
        "devices": f"{info['devices']}; mesh {info['mesh']}; zero {info['zero']}",
        "planned": info.get("planned"),
        "memory": info.get("memory"),
        "MFU peak": info.get("peak", "").replace("no peak", "none"),
        "folder": info["folder"],
    }
    return _lines(*((label, text) for label, text in rows.items() if text))


def conclusion(summary: Mapping[str, Any], *, steps: int) -> Text:
    """What the objective shows, where the run lies and how to go on."""
    folder = shlex.quote(summary["folder"])
    going_on = [f"stack train {folder} train.steps={2 * steps}"]
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
