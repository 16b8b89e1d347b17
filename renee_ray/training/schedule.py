"""When a run does what: its steps and epochs, evaluations, and learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, known before the first of them.

    batches: number of batches of each epoch.
    evaluate_every: epochs between evaluations, which may be a fraction; 0: only at the end.
    checkpoint_every: steps between checkpoints beside those of evaluations; 0: none.
    """

    batches: tuple[int, ...]
    evaluate_every: float
    checkpoint_every: int

    @property
    def total(self) -> int:
        return sum(self.batches)

    def evaluation_steps(self) -> set[int]:
        """Returns the numbers of done steps after which to evaluate; the end is among them."""
        if not self.evaluate_every:
            return {self.total}
        count = int(len(self.batches) / self.evaluate_every)
        marks = {self._steps_at((i + 1) * self.evaluate_every) for i in range(count)}
        return marks | {self.total}

    def epochs_done(self, step: int) -> float:
        """Returns the epochs, with their fraction, after `step` steps."""
        for epoch, batches in enumerate(self.batches):
            if step < batches:
                return epoch + step / batches
            step -= batches
        return float(len(self.batches))

    def _steps_at(self, epochs: float) -> int:
        whole = int(epochs)
        if whole >= len(self.batches):  # a multiple of the share may round to just above the end
            return self.total
        part = epochs - whole
        steps = sum(self.batches[:whole])
        return steps + (round(part * self.batches[whole]) if part else 0)


def warmup_cosine(step: int, total: int, warmup: float, held: float = 0.0) -> float:
    """Returns the factor of the peak learning rate at `step` of `total`, counted from 0.

    It rises linearly over the first `warmup` share of the steps, then follows half a cosine
    down to 0 (the schedule of Renée, on encoder and classifier alike). The last share `held` of
    the steps keeps the factor that it begins with.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    step = min(step, max(rising, total - round(held * total)))
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
