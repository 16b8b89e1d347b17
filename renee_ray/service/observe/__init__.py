"""What a run tells while it trains: status, progress, metrics, logs, versions, hung workers."""
