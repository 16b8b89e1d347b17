"""Configurations that come with the package; `renee-ray train NAME` finds them by name."""
