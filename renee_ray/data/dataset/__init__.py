"""The dataset directory: schemas, manifest, reading, inspection, and what may be overwritten."""
