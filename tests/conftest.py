"""Before any test imports triton: without a GPU its kernels are interpreted."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, triton's own included
