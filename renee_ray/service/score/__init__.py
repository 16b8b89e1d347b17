"""`evaluate`, `predict`, `export`, `index`, `fuse`, `compare`; their arithmetic is `scoring`."""
