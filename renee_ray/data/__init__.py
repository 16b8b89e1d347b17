"""Sources, storage, datasets and the order of their rows, without torch or Ray."""
