"""`train`: what a training worker runs, resuming, checkpoints on demand."""
