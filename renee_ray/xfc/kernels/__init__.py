"""The loops that touch every weight: compiled for CPUs (numba) and GPUs (triton)."""
