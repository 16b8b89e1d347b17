"""Sources, storage, datasets, what they hold and the order of their rows, without torch or Ray."""
