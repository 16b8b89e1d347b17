"""Datasets that come with the package, with their data cards."""
