"""What a run tells of itself: status, progress, metrics, curves, logs, stragglers."""
