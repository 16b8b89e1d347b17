"""First weights of the classifier, the same whatever the number of ranks.

`label_text` starts where nearest-neighbour search would stop. With e the embeddings of the
training points, for every label l that occurs n_l times in N points:

    u_l   = normalise(normalise(e(text of l)) + c * normalise(sum of normalise(e_i), i has l))
    b     = (E'E / N + 1e-4 mean-square I)^-1 mean(e)     least squares for  e . b = 1
    w_l   = s/rho * u_l  -  (s/rho * u_l . mean(e)) b  +  log(n_l / N) b

for rho the mean norm of e, s = init_scale and c = init_centroid. There is no bias term, so b
stands in for one: the second term takes out what a label scores on the average point, the
third puts the log-odds of the label's prior there. Without them every logit starts near 0,
every sigmoid near 1/2, and the first steps are spent, violently, on L negatives a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from renee_ray.config import ReneeError, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.training.batch import Batch, Ragged, pad, ragged, truncate
from renee_ray.training.collectives import Ranks, all_sum, gather_rows, route, row_counts
from renee_ray.training.encoder import Encoder
from renee_ray.training.model import Model
from renee_ray.xfc.labels import LabelRange

TEXT_BLOCK = 16384
"""Labels whose texts are read and embedded at a time."""
TEXT_BATCH = 256
MOMENT_BATCHES = 64
"""Global batches that mean and second moment are taken from when no centroid is wanted."""


def initialise_classifier(
    model: Model,
    config: RunConfig,
    dataset: Dataset,
    points: Callable[[], Iterable[Batch]],
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Fills this rank's shard.

    Args:
        points: this rank's training points, once; every rank draws equally many batches.

    Raises:
        ReneeError: `label_text` on a dataset without label texts.
    """
    settings = config.classifier
    if settings.init == "normal":
        model.shard.initialise_normal(settings.init_std, config.seed)
        return
    if not dataset.manifest.has_label_texts:
        raise ReneeError(
            f"{dataset.path} has no label texts for classifier.init=label_text; "
            f"set classifier.init=normal"
        )
    training = model.encoder.training
    model.encoder.eval()
    with torch.inference_mode():
        moments, centroids = _over_points(
            model, points(), settings.init_centroid > 0, ranks, device
        )
        _write_rows(model, config, dataset, moments, centroids, device)
    model.encoder.train(training)


@dataclass(frozen=True)
class Moments:
    """Of the points' embeddings e: mean [D], second moment E'E/N [D, D], mean norm; float64."""

    mean: Tensor
    second: Tensor
    norm: float

    def bias_direction(self) -> Tensor:
        """b [D] float64 with e . b = 1 in the least-squares sense."""
        dim = len(self.mean)
        ridge = 1e-4 * float(self.second.trace()) / dim
        return torch.linalg.solve(
            self.second + ridge * torch.eye(dim, dtype=torch.float64), self.mean
        )


def _over_points(
    model: Model, points: Iterable[Batch], wanted: bool, ranks: Ranks, device: torch.device
) -> tuple[Moments, Tensor | None]:
    """Moments of the embeddings and, if `wanted`, sums of each own label's points [n, D]."""
    encoder, owned = model.encoder, model.shard.owned
    dim = encoder.dim
    sums = torch.zeros(dim + 2, dim, dtype=torch.float64)  # E'E, then E'1, then (count, norms, ..)
    centroids = torch.zeros(len(owned), dim, device=device) if wanted else None
    for batch in points if wanted else islice(points, MOMENT_BATCHES):
        own = encoder(*batch.tokens(device))[: len(batch)]
        sums[:dim] += (own.T @ own).double().cpu()
        sums[dim] += own.sum(0, dtype=torch.float64).cpu()
        sums[dim + 1, 0] += len(own)
        sums[dim + 1, 1] += float(own.norm(dim=1).sum())
        if centroids is not None:
            counts = row_counts(ranks, len(batch))
            first = sum(counts[: ranks.rank])
            rows, labels = route(ranks, *batch.pairs(first), owned.num_labels)
            everyone = gather_rows(ranks, _unit(own), counts)
            centroids.index_add_(
                0, (labels - owned.start).to(device), everyone[rows.to(device)]
            )
    total = all_sum(ranks, sums)
    count, norms = float(total[dim + 1, 0]), float(total[dim + 1, 1])
    return Moments(total[dim] / count, total[:dim] / count, norms / count), centroids


def _write_rows(
    model: Model,
    config: RunConfig,
    dataset: Dataset,
    moments: Moments,
    centroids: Tensor | None,
    device: torch.device,
) -> None:
    settings, shard = config.classifier, model.shard
    manifest = dataset.manifest
    points = manifest.num_points("train") + manifest.num_points("validation")
    bias = moments.bias_direction()
    mean, direction = moments.mean.float().to(device), bias.float().to(device)
    scale = settings.init_scale / moments.norm
    for first, texts, counts in _embed_labels(model.encoder, config, dataset, shard.owned, device):
        rows = _unit(texts)
        if centroids is not None:
            start = first - shard.owned.start
            near = _unit(centroids[start : start + len(rows)])
            rows = _unit(rows + settings.init_centroid * near)
        prior = torch.from_numpy(np.log(np.maximum(counts, 0.5) / points)).float().to(device)
        shift = prior - scale * (rows @ mean)
        shard.write(first, scale * rows + shift[:, None] * direction)


def _embed_labels(
    encoder: Encoder, config: RunConfig, dataset: Dataset, owned: LabelRange, device: torch.device
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """(first label, embeddings [n, D], train counts int64 [n]) of blocks of the owned labels."""
    for first in range(owned.start, owned.stop, TEXT_BLOCK):
        stop = min(first + TEXT_BLOCK, owned.stop)
        table = dataset.read_rows("labels", first, stop, ["input_ids", "train_count"])
        tokens = truncate(ragged(table["input_ids"]), config.encoder.max_length)
        embedded = embed_texts(encoder, tokens, dataset.manifest.pad_id, device)
        yield first, embedded, table["train_count"].to_numpy()


def embed_texts(encoder: Encoder, tokens: Ragged, pad_id: int, device: torch.device) -> Tensor:
    """Embeddings [n, D] float32 of tokenised texts, computed in batches of similar length."""
    out = torch.empty(len(tokens), encoder.dim, device=device)
    order = np.argsort(tokens.lengths, kind="stable")
    for start in range(0, len(order), TEXT_BATCH):
        rows = order[start : start + TEXT_BATCH]
        ids, mask = pad(tokens.take(rows), pad_id)
        embedded = encoder(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        out[torch.from_numpy(rows).to(device)] = embedded
    return out


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
