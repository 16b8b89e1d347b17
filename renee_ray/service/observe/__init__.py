"""What a run tells while it trains: status, progress, metrics, logs, slow or hung workers."""
