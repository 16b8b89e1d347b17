"""Rows for labels without points, from their texts: a ridge regression on trained rows.

With t_l the unit embedding of the text of a trained label l, w_l its row and c its class, the
labels whose number of points n has the same floor(log2 n):

    X, Y       rows t_l - x_c and w_l - m_c of all classes; x_c, m_c: the means of a class
    A          (X'X + lambda I)^-1 X'Y, lambda chosen on labels that are held out
    new row    m_c + g (t - x_c) A + b v, c the class of fewest points that is large enough

m_c holds the prior of such labels. g gives what is added to it `GAIN` times the mean length that it
has in rows of the class: texts tell a part of a row only, and at the full length wrong new labels
displace trained ones. b is the same for all new labels: e . v = 1 for a point's embedding e, as
nearly as can be, and b makes labels that were held out come first on `SHARE` of the points of which
as many others would. So trained labels lose few first places, and new ones get into the lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from renee_ray.errors import ReneeError
from renee_ray.model.initialise import steady_direction, unit

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of which one is chosen, relative to the mean square of the columns of X."""
HELD_OUT = 10
"""One in so many trained labels is held out of the fit."""
LEAST = 20
"""Labels of the class that new labels are given, at least."""
GAIN, SHARE = 0.3, 0.07


@dataclass(frozen=True)
class ColdStart:
    """The regression, float32: slope [D, D], and of the class of new labels the means [D].

    held: unit embeddings [h, D] of labels of that class that are held out.

    figures: "lambda"; of held-out labels of that class "cosine", the mean cosine between w - m_c
    and its regression, and "recall@10", percent whose row is among the 10 nearest of these to it;
    "fitted", the number of labels; and "points", of a label of the class, at least.
    """

    slope: Tensor
    text: Tensor
    row: Tensor
    held: Tensor
    figures: dict[str, float]

    @classmethod
    def fit(cls, texts: Tensor, rows: Tensor, counts: Tensor) -> ColdStart:
        """Fits trained labels: embeddings and rows float32 [m, D], numbers of points int64 [m].

        Labels without a point are left out: nothing has trained their rows.

        Raises:
            ReneeError: fewer than 2 `LEAST` labels have a point.
        """
        trained = counts > 0
        texts, rows, counts = unit(texts[trained]), rows[trained], counts[trained]
        if len(counts) < 2 * LEAST:
            raise ReneeError(
                f"only {len(counts)} labels of the run have points, and {2 * LEAST} are needed to "
                f"tell rows from texts; train on more labels"
            )
        classes = counts.log2().floor().long()
        sizes = torch.bincount(classes)
        large = (sizes >= LEAST).nonzero().flatten()
        few = int(large[0] if len(large) else sizes.argmax())
        drawn = torch.rand(len(counts), generator=torch.Generator().manual_seed(0))
        held = drawn < 1 / HELD_OUT
        means = [_means(each[~held], classes[~held], len(sizes)) for each in (texts, rows)]
        x, y = texts - means[0][classes], rows - means[1][classes]
        tested = held & (classes == few) if (held & (classes == few)).any() else classes == few
        slope, figures = _best_slope(x[~held], y[~held], x[tested], y[tested])
        found = x[tested] @ slope
        gain = GAIN * float(
            y[tested].norm(dim=1).mean() / found.norm(dim=1).mean().clamp(min=1e-12)
        )
        near = (unit(found) @ unit(y[tested]).T).topk(min(10, len(found)), dim=1).indices
        own = torch.arange(len(found))[:, None]
        figures["recall@10"] = 100 * float((near == own).any(dim=1).float().mean())
        figures |= {"fitted": int((~held).sum()), "points": 2**few}
        return cls(gain * slope, means[0][few], means[1][few], texts[tested], figures)

    def raised(self, points: Tensor, best: Tensor) -> ColdStart:
        """Chooses b.

        Args:
            points: embeddings [n, D] of points; best: [n], the highest score of each among the
                fitted labels that it does not have.
        """
        margin = best - (points @ self.rows(self.held).T).amax(dim=1)
        share = SHARE * len(self.held) / (len(self.held) + self.figures["fitted"])
        b = float(margin.quantile(share))
        wide = points.double()
        v = steady_direction(wide.mean(dim=0), wide.T @ wide / len(points)).float()
        v = v / (points.mean(dim=0) @ v)
        return replace(self, row=self.row + b * v, figures={**self.figures, "raised": b})

    def rows(self, texts: Tensor) -> Tensor:
        """Returns the rows [n, D] of labels whose texts have these embeddings [n, D]."""
        return self.row + (unit(texts) - self.text) @ self.slope


def _best_slope(
    x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Returns the A of the lambda that regresses held-out labels best, and its figures."""
    square, mixed = (x.T @ x).double(), (x.T @ y).double()
    ridge = torch.eye(len(square), dtype=torch.float64) * float(square.trace()) / len(square)
    tried = []
    for value in LAMBDAS:
        slope = torch.linalg.solve(square + value * ridge, mixed).float()
        cosine = float((unit(held_x @ slope) * unit(held_y)).sum(dim=1).mean())
        tried.append((cosine, value, slope))
    cosine, value, slope = max(tried, key=lambda each: each[0])
    return slope, {"lambda": value, "cosine": cosine}


def _means(rows: Tensor, classes: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, rows.shape[1]).index_add_(0, classes, rows)
    return sums / torch.bincount(classes, minlength=count).clamp(min=1)[:, None]
