"""The labels of a run: whether a dataset has them, which were added, and which are hidden."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset, Extended, add_hashes, hash_labels
from renee_ray.data.storage import absolute, read_file
from renee_ray.errors import ReneeError
from renee_ray.service.run.directory import RUN_FILE, RunDirectory

BLOCK = 1 << 16
"""Labels whose texts are compared together."""


def opened(run: str, which: str) -> tuple[RunDirectory, Checkpoint, Dataset]:
    """Opens a run, a checkpoint as `RunDirectory.checkpoint`, and the dataset of all its labels."""
    directory = RunDirectory(absolute(run))
    checkpoint = directory.checkpoint(which)
    return directory, checkpoint, labels_of(directory, directory.dataset(), checkpoint)


def labels_of(directory: RunDirectory, dataset: Dataset, checkpoint: Checkpoint) -> Dataset:
    """Returns `dataset` with all labels of a checkpoint of the run.

    It has those that the run was trained with, and those that were added since or none of them.

    Raises:
        ReneeError: it has others.
    """
    trained = (directory.read(RUN_FILE) or {}).get("dataset", {}).get("num_labels")
    total = checkpoint.state.facts.get("num_labels", trained)
    added = checkpoint.added(trained) if type(trained) is int and total != trained else []
    if added and dataset.manifest.num_labels == total:
        check_labels(directory, dataset, [text for _, text in added])
        return dataset
    check_labels(directory, dataset)
    return Extended(dataset, added) if added else dataset


def hidden_labels(
    labels: Dataset, checkpoint: Checkpoint, allow: str = "", deny: str = ""
) -> np.ndarray | None:
    """Returns which labels must appear in no result, bool [L]; None: there are none.

    These are the retired ones, those that the file `deny` names, and those that `allow` does not.

    Raises:
        ReneeError: a file that is not there, or a line of it that names no label.
    """
    hidden = np.zeros(labels.manifest.num_labels, dtype=bool)
    hidden[checkpoint.state.retired] = True
    if deny:
        hidden[ids_of(labels, path=deny)] = True
    if allow:
        hidden |= ~np.isin(np.arange(len(hidden)), ids_of(labels, path=allow))
    return hidden if hidden.any() else None


def ids_of(labels: Dataset, given: Iterable[str] = (), path: str = "") -> np.ndarray:
    """Returns the ids of labels that are given, or that a file names one a line; int64, ascending.

    What consists of digits is an id, and `id:7` is in any case. A name that several labels have
    stands for all of them.

    Raises:
        ReneeError: there is no such file, there is no such label, or an id is another one's name.
    """
    lines = [(f"label {each!r:.80}", each) for each in given]
    if path:
        if (content := read_file(path)) is None:
            raise ReneeError(f"{path} does not exist; give a file with a label's id or name a line")
        text = content.decode("utf-8-sig", "replace")
        # A label's text may hold what else `splitlines` takes for the end of a line.
        rows = (line.removesuffix("\r") for line in text.split("\n"))
        lines += [(f"{path}:{i}", line) for i, line in enumerate(rows, 1) if line.strip()]
    found, ids = named(labels, [line for _, line in lines]), set[int]()
    for where, line in lines:
        same, digits = found.get(line, []), line.strip().removeprefix("id:")
        if digits.isdecimal() and int(digits) < labels.manifest.num_labels:
            others = [label for label in same if label != int(digits)]
            if others and digits == line.strip():
                raise ReneeError(
                    f"{where}: {digits} is the id of one label and the name of another, label "
                    f"{others[0]}; write id:{digits} or id:{others[0]}"
                )
            same = [int(digits)]
        if not same:
            raise ReneeError(f"{where}: the run has no label {line!r:.80}; correct it")
        ids.update(same)
    return np.array(sorted(ids), dtype=np.int64)


def named(labels: Dataset, names: Iterable[str]) -> dict[str, list[int]]:
    """Finds the ids of labels by name; a label of a dataset is named by its text."""
    wanted, found = set(names), dict[str, list[int]]()
    if not wanted:
        return found
    added = labels.added if isinstance(labels, Extended) else []
    first = labels.manifest.num_labels - len(added)
    for start in range(0, first, BLOCK):
        table = labels.read_rows("labels", start, min(start + BLOCK, first), ["text"])
        texts = table["text"].combine_chunks()
        for at in pc.indices_nonzero(pc.is_in(texts, pa.array(wanted, pa.string()))).to_pylist():
            found.setdefault(texts[at].as_py(), []).append(start + at)
    for label, (name, _) in enumerate(added, first):
        if name in wanted:
            found.setdefault(name, []).append(label)
    return found


def check_labels(directory: RunDirectory, dataset: Dataset, added: Sequence[str] = ()) -> None:
    """Raises ReneeError where a run was trained with other labels or another vocabulary.

    added: texts of labels that `dataset` must have behind these.

    Where either has no label texts, only their number can be compared.
    """
    trained = (directory.read(RUN_FILE) or {}).get("dataset", {})
    manifest = dataset.manifest
    own = manifest.num_labels - len(added)
    for key, have in (("num_labels", own), ("vocabulary_hash", manifest.vocabulary_hash)):
        if trained.get(key) != have:
            raise ReneeError(
                f"{directory.path} was trained with {key}={trained.get(key)!r} and "
                f"{dataset.path} has {have!r}; convert it with the run's tokenizer and labels"
            )
    texts = manifest.has_label_texts and trained.get("has_label_texts", True)
    if trained.get("manifest_hash") == manifest.hash or not texts:
        return
    known = str(trained.get("labels_hash"))
    if added:
        known = add_hashes([known, hash_labels(own, pa.array(added, pa.string()))])
    if manifest.labels_hash != known:
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


def _first_difference(directory: RunDirectory, known: str, dataset: Dataset) -> str:
    """Names the first label that differs, for a sentence; empty if the run's labels are gone."""
    try:
        other = directory.dataset()
        if other.manifest.labels_hash != known:
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
