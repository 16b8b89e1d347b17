"""What a run tells while it trains: status, progress, metrics, logs, profiles, hung workers."""
