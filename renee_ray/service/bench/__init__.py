"""The benchmarks that start Ray, or other processes of this package."""
