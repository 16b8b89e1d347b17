"""Learning-rate schedules."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` of `total` (counted from 0).

    Rises linearly over the first `warmup` share of the steps, then follows half a cosine
    down to 0 (the schedule of Renée, on encoder and classifier alike).
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
