"""The run directory: configuration, checkpoints, curves, its one writer."""
