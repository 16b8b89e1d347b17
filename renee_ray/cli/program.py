"""The entry point `renee-ray`: takes over signals (signals.py), then imports and runs the rest."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

from renee_ray.signals import install, leave

IMPORTING = 100_000
"""New objects between two collections of garbage. By Python's 700, they are a sixth of the time in
which torch, Ray and transformers are imported, and these are most of a short command's."""


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `renee-ray` with `arguments`, by default those of this process, and ends the process."""
    install()
    gc.set_threshold(IMPORTING)
    try:
        from renee_ray.cli.main import main

        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # Ray's threads may still print, and standard output must end with the result.
    sys.stdout = sys.stderr
    leave(status)
