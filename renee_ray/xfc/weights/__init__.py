"""Storages of the weights: how numbers lie in memory, and how an update is rounded."""
