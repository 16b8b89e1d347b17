"""The benchmarks that need Ray."""
