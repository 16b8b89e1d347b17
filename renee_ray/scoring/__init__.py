"""Top-k and metrics across shards, with votes of the nearest training points."""
