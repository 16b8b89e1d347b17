"""`evaluate`, `predict`, `export`, `index`, `fuse`, `compare`: what they check, and their jobs."""
