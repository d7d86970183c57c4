"""What this machine has, and what is proven of the numbers."""

from stack.doctor.numerics import numerics
from stack.doctor.report import report

__all__ = ["numerics", "report"]
