"""Checkpoints of a run: files that any number of ranks can read, and who writes them."""
