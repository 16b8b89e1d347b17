"""Observation of a run: status, progress, metrics, curves, logs, stragglers."""
