"""Before any test imports triton: without a GPU its kernels are interpreted."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, triton's own included

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other tests have the other core

STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process after the last line of the report, with pytest's own status.

    Ray, Arrow, torch and numba are in it at once, their threads too, and what they do while the
    interpreter is taken down crashed once after all tests had passed. What users run is a process
    of its own in the tests, whose exit status is looked at.
    """
    if STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])
