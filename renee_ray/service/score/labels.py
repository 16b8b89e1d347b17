"""Checks that a dataset has the labels that a run was trained with, and its tokenizer."""

from __future__ import annotations

from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.service.run.directory import RUN_FILE, RunDirectory


def check_labels(directory: RunDirectory, dataset: Dataset) -> None:
    """Raises ReneeError where a run was trained with other labels or another vocabulary.

    Where either has no label texts, only their number can be compared. A run that is older than
    `labels_hash` is compared with the dataset that it was trained on.
    """
    trained = (directory.read(RUN_FILE) or {}).get("dataset", {})
    manifest = dataset.manifest
    for key in ("num_labels", "vocabulary_hash"):
        have = getattr(manifest, key)
        if trained.get(key) != have:
            raise ReneeError(
                f"{directory.path} was trained with {key}={trained.get(key)!r} and "
                f"{dataset.path} has {have!r}; convert it with the run's tokenizer and labels"
            )
    texts = manifest.has_label_texts and trained.get("has_label_texts", True)
    if trained.get("manifest_hash") == manifest.hash or not texts:
        return
    known = trained.get("labels_hash") or _trained_on(directory, dataset).labels_hash()
    if dataset.labels_hash() != known:
        raise ReneeError(
            f"{dataset.path} has other labels than {directory.path} was trained with, or the same "
            f"in another order{_first_difference(directory, known, dataset)}; convert it with the "
            f"run's labels in their order"
        )


def vocabulary_of(dataset: Dataset) -> str:
    """Loads the tokenizer of a dataset, as `tokenizer.encode` takes it.

    Raises:
        ReneeError: that tokenizer is not available, or is another one now.
    """
    vocabulary = tokenizer.load(dataset.manifest.tokenizer)
    if vocabulary.hash != dataset.manifest.vocabulary_hash:
        raise ReneeError(
            f"the tokenizer {dataset.manifest.tokenizer!r} is not the one that {dataset.path} was "
            f"converted with; make that one available"
        )
    return vocabulary.serialised


def _trained_on(directory: RunDirectory, dataset: Dataset) -> Dataset:
    """Opens the dataset that an earlier renee_ray trained the run on, as it was then.

    Raises:
        ReneeError: it is not there any more, so that nobody knows the run's labels.
    """
    found = directory.dataset()
    if found.manifest.hash != (directory.read(RUN_FILE) or {})["dataset"].get("manifest_hash"):
        raise ReneeError(
            f"{found.path} has changed since {directory.path} was trained on it, by a renee_ray "
            f"that kept no hash of the labels: whether those of {dataset.path} are the same cannot "
            f"be told; put the dataset back as it was"
        )
    return found


def _first_difference(directory: RunDirectory, known: str, dataset: Dataset) -> str:
    """Names the first label that differs, for a sentence; empty if the run's labels are gone."""
    try:
        other = directory.dataset()
        if other.labels_hash() != known:
            return ""
    except ReneeError:
        return ""
    for part in other.manifest.splits["labels"]:
        stop = min(part.first + part.rows, dataset.manifest.num_labels)
        texts = other.read_part(part, ["text"])["text"].to_pylist()
        have = dataset.read_rows("labels", part.first, stop, ["text"])["text"].to_pylist()
        for label, (text, mine) in enumerate(zip(texts, have, strict=False), part.first):
            if text != mine:
                return f" (label {label} is {mine!r:.80} and was {text!r:.80})"
    return ""
