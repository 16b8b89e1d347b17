"""What a process runs on: device, driver, versions and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from renee_ray import __version__
from renee_ray.machine import output
from renee_ray.plan.devices import cores


def environment() -> dict[str, Any]:
    """Returns date, device, driver, versions and commit; None for what is unknown."""
    device, driver, commit = f"{platform.machine()} CPU, {cores()} cores", None, None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        driver = _first_line("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    versions = {
        "renee_ray": __version__, "python": platform.python_version(), "cuda": torch.version.cuda,
    }  # fmt: skip
    for package in ("torch", "triton", "ray", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # an installed package may lie in a repository of something else
        commit = _first_line(f"git -C {root} describe --always --dirty --abbrev=40")
    return {
        "date": time.strftime("%Y-%m-%d"), "device": device, "driver": driver,
        "versions": versions, "commit": os.environ.get("RENEE_RAY_COMMIT", commit),
    }  # fmt: skip


def _first_line(command: str) -> str | None:
    with contextlib.suppress(OSError):
        return next(iter(output(command.split())), None)
    return None
