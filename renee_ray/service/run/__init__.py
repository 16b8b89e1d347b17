"""The run directory: configuration, curves, which labels are named or hidden, its one writer."""
