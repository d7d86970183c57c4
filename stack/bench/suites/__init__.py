"""What is measured: each module gives the cases for a machine, and the contestants of a case."""
