"""Datasets and their sources, without torch or Ray: numpy and pyarrow."""
