"""What this machine has, and what is proven of the numbers."""

from stack.doctor.numerics import measure, numerics
from stack.doctor.report import report

__all__ = ["measure", "numerics", "report"]
