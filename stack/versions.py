"""Which versions of what a run is made of are installed."""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORDED = ("stack", "jax", "flax", "optax", "grain", "tokenizers")
"""Packages whose versions a checkpoint tells."""


@cache
def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not, as of Stack run from a plain folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def code_digest(folder: str = "") -> str:
    """Of every module of Stack, or of a folder: equal where the same code is, whatever its version says."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).parent / folder
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
