"""Which versions of what a run is made of are installed."""

from importlib.metadata import PackageNotFoundError, version

RECORDED = ("stack", "jax", "flax", "optax", "orbax-checkpoint")
"""Packages whose versions a checkpoint tells."""


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not, as of Stack run from a plain folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
