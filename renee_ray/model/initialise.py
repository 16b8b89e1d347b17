"""First weights of the classifier; their values do not depend on the number of ranks.

(With init_centroid=0 and more than MOMENT_BATCHES batches of points they do: each rank then reads
the first of its own.)

`label_text` starts from what a nearest-neighbour search would find. With e the embeddings of the
training points (mean mu, mean norm rho), for every label l of n_l among N points:

    b    = (E'E/N + 1e-4 mean-square I)^-1 mu      least squares for  e . b = 1;  u = b / |b|
    e   <- e + init_constant * u                   the encoder's `constant`;  mu with it
    v_l  = unit(unit(e(text of l)) + init_centroid * unit(sum of unit(e_i) over its points))
    w_l  = s v_l + (log(n_l / N) + delta - s v_l . mu) u / (mu . u)        s = init_scale / rho

The last term replaces a label's score on the average point by its prior. delta makes the median
point expect as many labels as the average point has. docs/design.md has the reasons.

Ledger, on rank r of R, which owns n of L labels, D dimensions:

    mean, second    [D], [D, D]    float64  of all training points; summed over the ranks
    sample          [~512, D]      float32  the same points on every rank
    centroids       [n, D]         float32  sums of unit embeddings of each own label's points
    rows            [block, D]     float32  first weights of some own labels
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.split import splitmix64
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import Encoder
from renee_ray.model.model import Model
from renee_ray.rank.batch import Batch, Ragged, padded_tokens, ragged, truncate
from renee_ray.rank.collectives import Ranks, all_sum, gather_rows, route, row_counts
from renee_ray.rank.recorder import Recorder
from renee_ray.rank.rounds import Rounds
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard

log = logging.getLogger(__name__)

TEXT_BLOCK = 16384
"""Labels whose texts are read and embedded together."""
TEXT_BATCH = 256
SAMPLE = 512
"""Points on which the prior is calibrated."""
MOMENT_BATCHES = 64
"""Global batches for mean and second moment, where centroids are not needed."""


def initialise_classifier(
    model: Model,
    config: RunConfig,
    dataset: Dataset,
    points: Callable[[], Iterable[Batch]],
    ranks: Ranks,
    recorder: Recorder | None = None,
    say: Callable[[str], None] = log.info,
) -> None:
    """Fills this rank's shard, after the weights of a bag's n-grams.

    Args:
        points: this rank's training points, once; every rank draws equally many batches.
        recorder, say: are told the progress.

    A dataset without label texts leaves `label_text` with the labels' points alone.

    Raises:
        ReneeError: `label_text` without label texts and with init_centroid 0.
    """
    settings = config.classifier
    recorder = recorder or Recorder()
    num_points = dataset.manifest.num_points("train")
    weigh_ngrams(model, config, dataset, points, ranks, recorder, say)
    if settings.init == "normal":
        model.shard.initialise_normal(settings.init_std, config.seed)
        return
    if not dataset.manifest.has_label_texts and not settings.init_centroid:
        raise ReneeError(
            f"{dataset.path} has no label texts for classifier.init=label_text; "
            f"set classifier.init=normal or classifier.init_centroid=1"
        )
    training = model.encoder.training
    model.encoder.eval()
    if not settings.init_centroid:
        num_points = min(num_points, MOMENT_BATCHES * config.evaluation.batch_size)
    over_points = Rounds(ranks, "first weights: training points", num_points, recorder, say)
    num_labels = dataset.manifest.num_labels
    with torch.inference_mode():
        survey = _over_points(model, points(), config, dataset, over_points)
        bias = _add_constant(model.encoder, survey, settings.init_constant)
        over_labels = Rounds(ranks, "first weights: label texts", num_labels, recorder, say)
        _write_rows(model, config, dataset, survey, bias, over_labels)
        _calibrate(model.shard, survey, bias, ranks)
    model.encoder.train(training)


def weigh_ngrams(
    model: Model,
    config: RunConfig,
    dataset: Dataset,
    points: Callable[[], Iterable[Batch]],
    ranks: Ranks,
    recorder: Recorder,
    say: Callable[[str], None],
) -> None:
    """Gives weights to the n-grams of a bag that have none; does nothing without a bag.

    Its arguments are those of `initialise_classifier`.
    """
    bag, owned, manifest = model.encoder.bag, model.shard.owned, dataset.manifest
    if bag is None:
        return
    first_weights = config.classifier.init == "label_text" and not config.start
    used = manifest.has_label_texts and (config.feed.augment > 0 or first_weights)
    num_points = manifest.num_points("train")
    num_texts = num_points + manifest.num_labels * used
    rounds = Rounds(ranks, "first weights: n-grams", num_texts, recorder, say)

    def texts() -> Iterator[tuple[Tensor, Tensor]]:
        pad_id, longest = manifest.pad_id, config.encoder.max_length
        for first in range(owned.start, owned.stop, TEXT_BLOCK):
            stop = min(first + TEXT_BLOCK, owned.stop)
            table, empty = _read_texts(dataset, first, stop, "input_ids")
            tokens = ragged(table["input_ids"]).take(np.flatnonzero(~empty))
            for _, ids, mask in text_batches(tokens, longest, pad_id, bag.idf.device):
                yield ids, mask

    bag.weigh(points(), num_points, rounds, texts() if used else ())


@dataclass
class Survey:
    """Statistics of one pass over the training points.

    mean: float64 [D]; second: E'E/N float64 [D, D]; norm: mean of |e|; labels_per_point: mean;
    sample: float32 [~SAMPLE, D] embeddings, the same on every rank; centroids: float32 [n, D]
    sums of the unit embeddings of each own label's points, or None.
    """

    mean: Tensor
    second: Tensor
    norm: float
    labels_per_point: float
    sample: Tensor
    centroids: Tensor | None


def steady_direction(mean: Tensor, second: Tensor) -> Tensor:
    """Returns v [D] float64 for which e . v is about 1 and varies little over points e.

    mean: of the points, float64 [D]; second: E'E/N, float64 [D, D].
    """
    ridge = 1e-4 * second.trace() / len(mean) * torch.eye(len(mean), dtype=torch.float64)
    return torch.linalg.solve(second + ridge, mean)


def _over_points(
    model: Model,
    points: Iterable[Batch],
    config: RunConfig,
    dataset: Dataset,
    rounds: Rounds,
) -> Survey:
    encoder, owned, ranks = model.encoder, model.shard.owned, rounds.ranks
    dim, device = encoder.dim, encoder.constant.device
    with_centroids = config.classifier.init_centroid > 0
    centroids = torch.zeros(len(owned), dim, device=device) if with_centroids else None
    second = torch.zeros(dim, dim, dtype=torch.float64)
    total = torch.zeros(dim, dtype=torch.float64)
    scalars = torch.zeros(3, dtype=torch.float64)  # points, norms, labels
    sampled = [torch.zeros(0, dim)]
    limit = min(1.0, SAMPLE / rounds.total) * 2.0**64
    for batch in points if with_centroids else islice(points, MOMENT_BATCHES):
        own = encoder(*batch.tokens(device))[: len(batch)]
        host = own.cpu()
        second += (own.T @ own).double().cpu()
        total += host.sum(0, dtype=torch.float64)
        norms = host.norm(dim=1).sum(dtype=torch.float64)
        scalars += torch.tensor([len(own), float(norms), len(batch.labels.values)])
        sampled.append(host[torch.from_numpy(splitmix64(batch.points.astype(np.uint64)) < limit)])
        if centroids is not None:
            _add_to_centroids(centroids, batch, own, owned, ranks)
        rounds.add(len(batch))
    rounds.finish()
    own_sample = torch.cat(sampled)
    sample = gather_rows(ranks, own_sample.to(device), row_counts(ranks, len(own_sample)))
    for sums in (second, total, scalars):
        all_sum(ranks, sums)
    count, norm, labels = (float(value) for value in scalars)
    if not norm:
        raise ReneeError(
            f"every training text of {dataset.path} has the embedding 0: a bag of n-grams cannot "
            f"tell texts apart that are all the same; give more texts, or a transformer"
        )
    return Survey(total / count, second / count, norm / count, labels / count, sample, centroids)


def _add_to_centroids(
    centroids: Tensor, batch: Batch, own: Tensor, owned: LabelRange, ranks: Ranks
) -> None:
    device = centroids.device
    counts = row_counts(ranks, len(batch))
    pairs = batch.pairs(sum(counts[: ranks.rank]))
    rows, labels = route(ranks, *pairs, owned.num_labels)
    everyone = gather_rows(ranks, unit(own), counts)
    # A GPU adds repeated indices in any order: without segments no two runs would begin alike.
    order = torch.argsort(labels, stable=True)
    labels, lengths = labels[order].unique_consecutive(return_counts=True)
    of_label = everyone[rows[order].to(device)]
    sums = torch.segment_reduce(of_label, "sum", lengths=lengths.to(device), unsafe=True)
    centroids[(labels - owned.start).to(device)] += sums


def _add_constant(encoder: Encoder, survey: Survey, norm: float) -> Tensor:
    """Sets the encoder's constant; returns the direction [D] whose mean score is 1."""
    solution = steady_direction(survey.mean, survey.second)
    u = (solution / solution.norm()).float()
    encoder.constant.copy_(norm * u)
    survey.mean = survey.mean + norm * u.double()
    survey.sample = survey.sample + norm * u.to(survey.sample)
    return (u / float(survey.mean.float() @ u)).to(survey.sample)


def _read_texts(
    dataset: Dataset, first: int, stop: int, *columns: str
) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Reads labels [first, stop); returns a table, and whose text is empty, bool [stop - first].

    An empty text says nothing about its label. It is that of all without texts in the dataset.
    """
    manifest = dataset.manifest
    some = bool(manifest.statistics.get("labels", {}).get("empty_texts"))
    table = dataset.read_rows("labels", first, stop, [*columns, *["text"] * some])
    empty = np.full(len(table), not manifest.has_label_texts)
    if some:
        empty |= pc.equal(pc.utf8_trim_whitespace(table["text"]), "").to_numpy()
    return table, empty


def _write_rows(
    model: Model,
    config: RunConfig,
    dataset: Dataset,
    survey: Survey,
    bias: Tensor,
    rounds: Rounds,
) -> None:
    settings, owned, device = config.classifier, model.shard.owned, bias.device
    manifest, longest = dataset.manifest, config.encoder.max_length
    points = manifest.num_points("train") + manifest.num_points("validation")
    mean = survey.mean.float().to(device)
    scale = settings.init_scale / survey.norm
    for first in range(owned.start, owned.stop, TEXT_BLOCK):
        stop = min(first + TEXT_BLOCK, owned.stop)
        table, empty = _read_texts(dataset, first, stop, "input_ids", "train_count")
        tokens, counts = ragged(table["input_ids"]), table["train_count"].to_numpy()
        texts = embed_texts(model.encoder, tokens, longest, manifest.pad_id, rounds.add)
        rows = unit(texts - model.encoder.constant)
        rows[torch.from_numpy(empty).to(device)] = 0
        if survey.centroids is not None:
            near = unit(survey.centroids[first - owned.start : stop - owned.start])
            rows = unit(rows + settings.init_centroid * near)
        prior = torch.from_numpy(np.log(np.maximum(counts, 0.5) / points)).float().to(device)
        shift = prior - scale * (rows @ mean)
        model.shard.write(first, scale * rows + shift[:, None] * bias)
    rounds.finish()


def _calibrate(shard: Shard, survey: Survey, bias: Tensor, ranks: Ranks) -> None:
    """Adds delta * bias to all rows, found by bisection, so that the median point expects as many
    labels as the mean has.
    """
    share = (survey.sample @ bias)[:, None]
    low, high = -20.0, 20.0
    for _ in range(16):
        middle = (low + high) / 2
        expected = torch.zeros(len(survey.sample), dtype=torch.float64, device=bias.device)
        for start, stop in shard.chunks(len(survey.sample)):
            logits = survey.sample @ shard.weights.weight.read(start, stop).T
            expected += (logits + middle * share).sigmoid_().sum(1, dtype=torch.float64)
        if float(all_sum(ranks, expected.cpu()).median()) > survey.labels_per_point:
            high = middle
        else:
            low = middle
    for start, stop in shard.chunks(1):
        rows = shard.weights.weight.read(start, stop) + (low + high) / 2 * bias
        shard.weights.weight.write(start, stop, rows)


def embed_texts(
    encoder: Encoder,
    tokens: Ragged,
    longest: int,
    pad_id: int,
    on_batch: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """Embeds tokenised texts in batches of similar length: float32 [n, D] on the encoder's device.

    longest: tokens that a text is cut to.
    on_batch: is called with the number of texts of each embedded batch.
    """
    device = encoder.constant.device
    out = torch.empty(len(tokens), encoder.dim, device=device)
    for rows, ids, mask in text_batches(tokens, longest, pad_id, device):
        out[torch.from_numpy(rows).to(device)] = encoder(ids, mask)
        on_batch(len(rows))
    return out


def text_batches(
    tokens: Ragged, longest: int, pad_id: int, device: torch.device
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yields (numbers of the rows, ids, mask) of texts cut to `longest`, the shortest first."""
    tokens = truncate(tokens, longest)
    order = np.argsort(tokens.lengths, kind="stable")
    for start in range(0, len(order), TEXT_BATCH):
        rows = order[start : start + TEXT_BATCH]
        yield rows, *padded_tokens(tokens.take(rows), pad_id, device)


def unit(rows: Tensor) -> Tensor:
    """Scales rows [n, D] to norm 1."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
