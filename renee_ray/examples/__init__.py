"""Datasets that come with the package, with their data cards, and the script that made one."""
