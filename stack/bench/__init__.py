"""`stack bench`: kernels and whole steps measured on the machine at hand, beside their peers."""
