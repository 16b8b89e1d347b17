"""Trains and evaluates on a small real dataset that comes with the package.

    OUTPUT/raw           the archive of renee_ray/examples/, unpacked
    OUTPUT/dataset       the converted dataset, 2% of its training points held out
    OUTPUT/run           the run, by the recipe `quickstart`; with encoder.name=none `perl-bag`
    OUTPUT/predictions   predictions for the test points
    OUTPUT/report.html   metrics beside baselines, curves, examples

All metrics of the comparison are computed from predictions by scoring/metrics.py. A second call
with the same OUTPUT repeats only what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp
import torch

from renee_ray.config.overrides import make_config, read_yaml
from renee_ray.config.recipes import recipe_path
from renee_ray.config.schema import NO_TRANSFORMER, BagConfig, ConvertConfig, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Dataset, has_manifest
from renee_ray.data.storage import absolute
from renee_ray.errors import ConfigError, ReneeError, reason
from renee_ray.model.encoder import build_encoder
from renee_ray.model.initialise import embed_texts
from renee_ray.rank.batch import Ragged, ragged
from renee_ray.report.run import write_report
from renee_ray.scoring.metrics import KS, RECALL_KS, MetricSums, inverse_propensity
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.launch import quiet
from renee_ray.service.convert.convert import convert
from renee_ray.service.score.predict import predict_run
from renee_ray.service.score.predictions import Predicted, padded
from renee_ray.service.train.train import train

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

NAME = "LF-DebianPerl-2K"
ARCHIVE = Path(__file__).resolve().parents[1] / "examples" / f"{NAME}.tar.gz"

VALIDATION = 0.02
K = max(*KS, *RECALL_KS)
COMPARED = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "recall@100")
TIMED = ("convert", "train", "predict")
EXAMPLES, EXAMPLE_LABELS = 10, 5


def quickstart(
    overrides: Mapping[str, Any], on_progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Converts, trains, predicts, compares and reports.

    Args:
        overrides: keys of the recipe that change; `output` is the directory for everything.

    Returns:
        "comparison" and "examples" as report/run.py takes them, "report" (a path), "output", and
        the "seconds" of each stage.

    Raises:
        ReneeError: a wrong key or value, or a directory that cannot be used.
    """
    output, config = configuration(overrides)
    if importlib.util.find_spec("sklearn") is None:
        raise ReneeError(
            "quickstart needs scikit-learn for a baseline; pip install 'renee_ray[quickstart]'"
        )
    ends = [time.perf_counter()]
    raw = unpack(ARCHIVE, output / "raw")
    there = _dataset(raw, config)
    ensure_ray(config.max_workers + 1)
    dataset = there or _converted(raw, config, on_progress)
    ends.append(time.perf_counter())
    train(config, on_progress)
    ends.append(time.perf_counter())
    on_progress(f"predicting {dataset.manifest.num_points('test'):,} test points")
    # The last: so few validation points, each much like a training point, choose too early a one.
    score = ScoreConfig(k=K, checkpoint="last", overwrite=True)
    predict_run(config.output, dataset.path, str(output / "predictions"), score)
    # So few points are one block of predictions.
    ((_, labels, scores),) = Predicted(str(output / "predictions")).blocks()
    ends.append(time.perf_counter())
    on_progress("computing the baselines")
    truth = Truth.read(dataset)
    comparison = [
        _row("renee_ray", truth, padded(labels, K)),
        _row("linear, TF-IDF", truth, _linear(raw, dataset, truth)),
        _row("zero-shot label text", truth, _zero_shot(dataset, truth, config)),
        _row("most frequent labels", truth, most_frequent(truth.train_count, truth.filters, K)),
    ]
    ends.append(time.perf_counter())
    taken = [round(end - begin, 1) for begin, end in pairwise(ends)]
    seconds = dict(zip((*TIMED, "baselines"), taken, strict=True))
    examples = pick_examples(raw, truth, labels, scores)
    report = output / "report.html"
    write_report(
        config.output, str(report), title=f"renee_ray on {NAME}", comparison=comparison,
        facts={f"time to {stage}": f"{seconds[stage]:.0f} s" for stage in TIMED},
        examples=examples,
    )  # fmt: skip
    return {
        "output": str(output),
        "report": str(report),
        "comparison": comparison,
        "examples": examples,
        "seconds": seconds,
    }


def configuration(overrides: Mapping[str, Any]) -> tuple[Path, RunConfig]:
    """Returns (directory for everything, configuration of the run in it).

    Raises:
        ConfigError: a wrong key or value.
    """
    if "data" in overrides:
        raise ConfigError(
            "quickstart trains on the dataset that comes with it; for another one use "
            "`renee-ray train quickstart data=DATASET output=RUN`"
        )
    output = str(overrides.get("output", "quickstart"))
    if "://" in output or not output:
        raise ConfigError(f"output={output!r} is no local directory; quickstart writes to one")
    root = Path(output).expanduser().resolve()
    encoder = overrides.get("encoder")
    alone = isinstance(encoder, Mapping) and encoder.get("name") == NO_TRANSFORMER
    layers = (
        read_yaml(str(recipe_path("perl-bag" if alone else "quickstart"))),
        overrides,
        {"data": str(root / "dataset"), "output": str(root / "run")},
    )
    return root, make_config(RunConfig, *layers, where="quickstart")


def unpack(archive: Path, destination: Path) -> Path:
    """Unpacks the dataset, and returns its folder, `destination`/NAME.

    Raises:
        ReneeError: the archive is missing or damaged, or `destination` cannot be written.
    """
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(destination, filter="data")
    except (tarfile.TarError, EOFError, FileNotFoundError) as error:
        raise ReneeError(
            f"{archive} is missing or damaged ({reason(error)}); install renee_ray again"
        ) from error
    except OSError as error:
        raise ReneeError(
            f"cannot unpack {archive} to {destination} ({error.strerror or error}); "
            f"give a directory that can be written as output=DIR"
        ) from error
    return destination / NAME


def _model(config: RunConfig) -> str:
    """Returns the transformer, or the one that a bag alone is compared with."""
    name = config.encoder.name
    name = absolute(name) if os.path.isdir(name) else name
    return ConvertConfig().tokenizer if name == NO_TRANSFORMER else name


def _dataset(raw: Path, config: RunConfig) -> Dataset | None:
    """Returns the dataset at config.data; None where there is none yet.

    Raises:
        ReneeError: another dataset is there, or this one with another tokenizer.
    """
    if not has_manifest(config.data):
        return None
    dataset, tokenizer = Dataset.open(config.data), _model(config)
    own = [len((raw / name).read_bytes().splitlines()) for name in ("Y.txt", "tst_X.txt")]
    if [dataset.manifest.num_labels, dataset.manifest.num_points("test")] != own:
        raise ReneeError(f"{config.data} is another dataset; give another output")
    if dataset.manifest.tokenizer != tokenizer:
        raise ReneeError(
            f"{config.data} has the tokenizer {dataset.manifest.tokenizer}, not {tokenizer}; "
            f"give another output"
        )
    return dataset


def _converted(raw: Path, config: RunConfig, on_progress: Callable[[str], None]) -> Dataset:
    settings = ConvertConfig(tokenizer=_model(config), validation=VALIDATION)
    return Dataset(config.data, convert(str(raw), config.data, settings, on_progress))


# ------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Truth:
    """The test points, in ascending order of their ids, and what their metrics need.

    tokens, labels and filters have a row for each point; inverse_propensity is float64 [L] and
    train_count int64 [L]. L is small here; no other code may hold a column of all labels.
    """

    points: Ints
    tokens: Ragged
    labels: Ragged
    filters: Ragged
    train_count: Ints
    inverse_propensity: npt.NDArray[np.float64]
    label_texts: list[str]
    label_tokens: Ragged

    @classmethod
    def read(cls, dataset: Dataset) -> Truth:
        manifest = dataset.manifest
        test = dataset.read_rows("test", 0, manifest.num_points("test"))
        labels = dataset.read_rows("labels", 0, manifest.num_labels)
        count = labels["train_count"].to_numpy()
        points = manifest.num_points("train") + manifest.num_points("validation")
        return cls(
            points=test["point_id"].to_numpy(),
            tokens=ragged(test["input_ids"]),
            labels=ragged(test["labels"]),
            filters=ragged(test["filter_labels"]),
            train_count=count,
            inverse_propensity=inverse_propensity(
                count, points, manifest.propensity_a, manifest.propensity_b
            ),
            label_texts=labels["text"].to_pylist(),
            label_tokens=ragged(labels["input_ids"]),
        )


def _row(model: str, truth: Truth, predicted: Ints) -> dict[str, Any]:
    """Returns metrics in percent of `predicted`, int64 [n, K], a row for each test point."""
    sums = MetricSums()
    sums.add(predicted, truth.labels, truth.inverse_propensity[truth.labels.values])
    metrics = sums.metrics()
    return {"model": model, **{name: metrics[name] for name in COMPARED}}


def _linear(raw: Path, dataset: Dataset, truth: Truth) -> Ints:
    """Returns the predictions of a linear model of all training points and label texts."""
    table = pa.concat_tables(
        dataset.read_rows(split, 0, dataset.manifest.num_points(split))
        for split in ("train", "validation")
    )
    rows = ragged(table["labels"]).followed_by(ragged(table["filter_labels"]))
    shape, ones = (len(rows), len(truth.label_texts)), np.ones(len(rows.values), np.float32)
    true = sp.csr_matrix((ones, rows.values, rows.offsets), shape)
    labels = sp.vstack([true, sp.identity(shape[1], np.float32)])
    trained, tests = _lines(raw / "trn_X.txt"), _lines(raw / "tst_X.txt")
    texts = [trained[point] for point in table["point_id"].to_pylist()] + truth.label_texts
    points = [tests[point] for point in truth.points]
    return tfidf_ridge(texts, labels, points, truth.filters, K)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def _zero_shot(dataset: Dataset, truth: Truth, config: RunConfig) -> Ints:
    """Returns the nearest label texts of each test point, by the encoder before training."""
    quiet()
    plain = {"name": _model(config), "bottleneck": 0, "compile": False, "bag": BagConfig()}
    settings = config.encoder.model_copy(update=plain)
    encoder = build_encoder(settings, torch.device("cpu"), config.seed).eval()

    def embed(tokens: Ragged) -> Floats:
        pad_id = dataset.manifest.pad_id
        return embed_texts(encoder, tokens, settings.max_length, pad_id).numpy()

    with torch.inference_mode():
        points, labels = embed(truth.tokens), embed(truth.label_tokens)
    return nearest_label_text(points, labels, truth.filters, K)


# ------------------------------------------------------------------------------------- report


def pick_examples(
    raw: Path, truth: Truth, predicted: Ragged, probabilities: npt.NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Returns test points that are evenly spaced in the file, so that none is hand-picked.

    Args:
        predicted: labels of each test point, best first, with probabilities [m].
    """
    lines = _lines(raw / "tst_X.txt")
    count = min(EXAMPLES, len(truth.points))
    chosen = np.linspace(0, len(truth.points) - 1, count).astype(np.int64)
    found = []
    for i in chosen:
        start, stop = truth.labels.offsets[i : i + 2]
        true = set(truth.labels.values[start:stop].tolist())
        first, end = predicted.offsets[i : i + 2]
        best = range(first, min(first + EXAMPLE_LABELS, end))
        found.append(
            {
                "text": lines[truth.points[i]].strip(),
                "true": [truth.label_texts[label] for label in sorted(true)],
                "predicted": [
                    {
                        "label": truth.label_texts[predicted.values[at]],
                        "score": float(probabilities[at]),
                        "right": int(predicted.values[at]) in true,
                    }
                    for at in best
                ],
            }
        )
    return found


# --------------------------------------------------------------------------------- baselines
#
# They take seconds. All remove the filter labels of the n points before the cut, so that k labels
# remain wherever a point has k others. They return int64 [n, k], best first, -1 where none is
# left; equal scores come in ascending order of the id.


def most_frequent(train_count: Ints, filters: Ragged, k: int) -> Ints:
    """Predicts the k labels with the most training points for all n points, but for filters.

    train_count: int64 [L], training points of each label.
    """
    counts = train_count.astype(np.float64)[:, None]
    return _largest_products(np.ones((len(filters), 1)), counts, filters, k)


def nearest_label_text(points: Floats, labels: Floats, filters: Ragged, k: int) -> Ints:
    """Predicts the k labels whose texts' embeddings have the largest cosine with the point's.

    points: float32 [n, D]; labels: float32 [L, D]; neither need be normalised.
    """
    lengths = np.linalg.norm(labels, axis=1, keepdims=True)  # a point's changes no order
    unit = labels / np.maximum(lengths, np.finfo(np.float32).tiny)
    return _largest_products(points, unit, filters, k)


def tfidf_ridge(
    texts: Sequence[str], labels: sp.csr_matrix, points: Sequence[str], filters: Ragged, k: int
) -> Ints:
    """Predicts by a linear model: ridge regression, one-vs-rest, on TF-IDF of words and pairs.

    It is solved in the kernel form, as there are fewer texts than features: 8 m (m + L) bytes.

    Args:
        texts: m texts to train on; labels: [m, L], 1 where a label is true; points: n texts.

    scikit-learn must be installed.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.kernel_ridge import KernelRidge

    features = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    trained = features.fit_transform(texts)
    weights = KernelRidge(alpha=1.0).fit(trained, labels.toarray()).dual_coef_.T
    kernel = (features.transform(points) @ trained.T).toarray()
    return _largest_products(kernel, weights, filters, k)


def _largest_products(points: Floats, labels: Floats, filters: Ragged, k: int) -> Ints:
    scores = points @ labels.T
    scores[filters.pairs()] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kept = np.isfinite(np.take_along_axis(scores, order, axis=1))
    found = np.full((len(points), k), -1, dtype=np.int64)
    found[:, : order.shape[1]] = np.where(kept, order, -1)
    return found
