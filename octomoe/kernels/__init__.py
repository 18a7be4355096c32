"""Triton kernels: the same names and meaning as `octomoe.reference`, one op per file."""
