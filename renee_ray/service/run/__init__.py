"""The run directory: configuration, checkpoints, curves, its one writer, what it may replace."""
