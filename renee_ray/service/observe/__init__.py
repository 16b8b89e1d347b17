"""What a run tells in training: status, progress, metrics, logs, profiles, versions, hangs."""
