"""The run directory: configuration, labels, curves, and its one writer."""
