"""The process of a command: its signals come first, before anything slow is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from renee_ray.signals import install, leave


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `renee-ray` with `arguments`, by default this process's own, and ends the process."""
    install()
    try:
        from renee_ray.cli.main import main

        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # What Ray's threads still have to say must not follow the result.
    sys.stdout = sys.stderr
    leave(status)
