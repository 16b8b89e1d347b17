"""`evaluate`, `predict`, `export`, `index`, `fuse`, `compare`: their checks and jobs; `load`."""
