"""The loops that most tests on several ranks need, compiled on import: by one process for all."""

from __future__ import annotations

import torch

from renee_ray.xfc.kernels.cpu_update import compile_for
from renee_ray.xfc.topk.best import Best
from renee_ray.xfc.weights.storages import Weights

torch.set_num_threads(1)  # a process that has threads must not be forked
compile_for(Weights("bf16_split", 1, 1, True, torch.device("cpu"), torch.bfloat16))
Best(1, 1, torch.device("cpu")).add(torch.zeros(1, 1), 0)
