"""Averaged weights: the mean of those after some of the last steps is the result of a run.

With learning rates that do not fall to 0, weights go on moving around what they would reach, and
their mean is nearer to it than any of them (Polyak and Juditsky, SIAM J. Control Optim. 1992).

Ledger, on a rank that owns n labels, D dimensions:

    shard.weights.average   [n, D]    as a velocity is stored    of the classifier's rows
    tensors                 by name   float32, the same on all   of the encoder's trained parameters
"""

from __future__ import annotations

import torch
from torch import Tensor

from renee_ray.model.model import Model

SAMPLES = 16
"""Fewest weights in a mean, or all of a shorter share; the most are twice as many less one."""
SUFFIX = ".average"


def number_of(step: int, total: int, share: float) -> int:
    """Returns which of the averaged weights those after `step` steps are, from 1; 0: none."""
    span = round(share * total)
    spacing = max(1, span // SAMPLES)
    left, between = divmod(total - step, spacing)
    return 0 if between or total - step >= span else (span - 1) // spacing + 1 - left


class Averages:
    """The mean of weights of a model after some of the last `share` of all steps.

    tensors: the encoder's, by name of the parameter, for checkpoints.
    """

    def __init__(self, model: Model, share: float, seed: int) -> None:
        self._model, self._share, self._seed = model, share, seed
        named = model.encoder.named_parameters() if share else ()
        self._parameters = {f"{n}{SUFFIX}": p for n, p in named if p.requires_grad}
        self.tensors = {
            name: torch.zeros_like(p, memory_format=torch.contiguous_format)
            for name, p in self._parameters.items()
        }

    def take(self, saved: dict[str, Tensor]) -> None:
        """Takes the tensors of a checkpoint out of `saved`, which has others too."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved.pop(name))

    @torch.no_grad()
    def add(self, step: int, total: int) -> None:
        """Adds the weights after `step` of `total` steps, if they count; the mean replaces the
        last ones."""
        number = number_of(step, total, self._share)
        if not number:
            return
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, 1 / number)
        self._model.shard.add_to_average(number, self._seed, step)
        if step == total:
            for name, parameter in self._parameters.items():
                parameter.copy_(self.tensors[name])
            self._model.shard.take_average()
