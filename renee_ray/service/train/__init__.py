"""`train`: its driver, what a training worker runs, and what a resumed run may change."""
