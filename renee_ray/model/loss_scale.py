"""The fp16 loss scale of the encoder's gradient alone ("split loss scaling", Renée, 3.2).

Gradients inside an fp16 encoder may be too small for fp16, whose smallest number is 6e-8. dE is
therefore multiplied by a scale before the encoder's backward, and the parameters' gradients, in
fp32, are divided by it. The classifier needs none: its residuals lie within [-1, 1], and the
gradients of its weights are added up in fp32. The scale is halved at each overflow, in whose step
the encoder is not updated, and doubled after `GROWTH_STEPS` steps without one.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 2.0**10
"""The loss is summed over the batch, not averaged, so its gradients are large already."""
GROWTH_STEPS = 1000
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The present scale.

    value: the factor; steps: number of steps since it changed last.
    dynamic: whether it changes at all, which it does only if the encoder's autocast is fp16.
    """

    value: float = 1.0
    steps: int = 0
    dynamic: bool = False

    @classmethod
    def start(cls) -> LossScale:
        """Returns the scale that a run with fp16 autocast begins with."""
        return cls(FIRST, 0, dynamic=True)

    def update(self, finite: bool) -> None:
        """Adapts the scale after a backward; finite: whether every rank's gradient was finite."""
        if not self.dynamic:
            return
        self.steps = self.steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.steps == GROWTH_STEPS:
            self.value, self.steps = min(self.value * 2, LARGEST), 0
