"""What the run is meant for."""

from pydantic import PositiveInt

from stack.config.section import Section


class TargetConfig(Section):
    """The machine a config is planned for, and compiled for where there is none.

    Training reads it only to know its chip, where this is a file that describes the chip it runs on.
    """

    hardware: str = "h100"
    """A chip by name (`h100`, `v100-32gb`; an unknown one is answered with all) or a YAML file of one."""
    devices: PositiveInt = 8
    """How many of them; mesh axes of -1 take what is left of these."""
    compile_target: str | None = None
    """The chip compiled for in its place, where the compiler knows no such chip (V100, TPU, CPU)."""
