"""Search of the k best labels: exact, or by a FAISS index that leaves most labels unread.

The score of label l for an embedding e is e . w_l + b_l, where b is the logit adjustment. FAISS's
graphs and lists need distances, which order rows of different norms otherwise than scores do. So
what is indexed of a range is (Bachrach et al., RecSys 2014)

    x_l = [w_l, b_l, sqrt(M^2 - |w_l|^2 - b_l^2)]    M: the range's greatest norm of [w, b]
    q   = [e, 1, 0] M / |[e, 1]|                     |x_l - q|^2 = 2 M^2 - 2 (e . w_l + b_l) M / |q|

The order by L2 distance is exactly the order by score. The factor M / |[e, 1]| keeps that order and
puts the query on the sphere of all x_l, so that centroids inside it are compared fairly. Vectors
are padded with zeros to a multiple of 8, which FAISS compares fastest.

What all embeddings or all rows have in common, such as the constant of first weights from label
texts, says nothing about the order, but would be multiplied by the errors of compression. With the
mean c of some embeddings and the mean (v, a) of some rows [w, b + c . w], indexed instead are
[w - v, b + c . w - a] and [e - c, 1]: their product differs from the score by e . v + a - c . v.

The index holds compressed vectors, so it only proposes: of each range the c max(k, 10) nearest
labels, whose scores are then computed with the true weights.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from renee_ray.config.score import Searched
from renee_ray.data.storage import absolute, read_file
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.xfc.labels import NONE
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk.best import join
from renee_ray.xfc.topk.select import merge_topk, shard_topk

MANIFEST, FORMAT_VERSION = "index.json", 1
FILES = re.compile(r"(?:labels-\d{12}-\d{12}\.(?:faiss|json)|recall\.html)(?:\.tmp)?")
"""Those that end with .tmp are what a killed command leaves."""
RESCORED_BYTES = 1 << 26
"""Bytes of true weights that are gathered at once."""
FEWEST = 10
"""Labels that candidates are found for, where fewer are asked for."""


def load_faiss() -> Any:
    """Imports FAISS. Raises ReneeError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ReneeError(
            f"an index needs FAISS ({reason(error):.200}); pip install 'renee_ray[index]'"
        ) from error
    return faiss


@dataclass(frozen=True)
class Classifier:
    """The true weights of some labels: shards in the order of labels, without a gap.

    offsets: float32 [n] for each shard, added to its labels' scores, or None; -inf hides a label.
    """

    shards: Sequence[Shard]
    offsets: Sequence[Tensor | None]

    @property
    def start(self) -> int:
        return self.shards[0].owned.start

    @property
    def stop(self) -> int:
        return self.shards[-1].owned.stop

    def rows(self, start: int, stop: int) -> Tensor:
        """Reads [w_l, b_l] of the labels [start, stop), which are here, float32 [n, D + 1]."""
        found = []
        for shard, offset in zip(self.shards, self.offsets, strict=True):
            low = max(start - shard.owned.start, 0)
            high = min(stop, shard.owned.stop) - shard.owned.start
            if low < high:
                last = torch.zeros(high - low) if offset is None else offset[low:high]
                found.append(torch.cat([shard.weights.read(low, high), last[:, None]], 1))
        return torch.cat(found)

    def shown(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Returns which of the labels [start, stop) are here and not hidden, bool [n]."""
        found = np.zeros(stop - start, bool)
        for shard, offset in zip(self.shards, self.offsets, strict=True):
            low, high = max(start, shard.owned.start), min(stop, shard.owned.stop)
            if low < high:
                here = slice(low - shard.owned.start, high - shard.owned.start)
                kept = True if offset is None else (offset[here] > -torch.inf).cpu().numpy()
                found[low - start : high - start] = kept
        return found

    def score(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Computes scores float32 [B, c] of labels int64 [B, c], host memory; -inf for `NONE`."""
        scores = torch.full(labels.shape, -torch.inf, device=embeddings.device)
        rows = max(1, RESCORED_BYTES // (4 * embeddings.shape[1] * labels.shape[1]))
        for ids, here, e in zip(
            *(t.split(rows) for t in (labels, scores, embeddings)), strict=True
        ):
            for shard, offset in zip(self.shards, self.offsets, strict=True):
                owned = shard.owned
                row, place = ((ids >= owned.start) & (ids < owned.stop)).nonzero(as_tuple=True)
                local = (ids[row, place] - owned.start).to(e.device)
                found = (shard.weights.weight.pick(local) * e[row]).sum(1)
                here[row, place] = found if offset is None else found + offset[local]
        return scores

    def search(
        self, embeddings: Tensor, k: int, excluded: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the k best labels of each row of embeddings, float32 [B, D], by scoring them all.

        excluded: pairs of a row and a label that are not to be found, of a single shard.

        Returns:
            (scores float32 [B, k] descending, labels int64 [B, k], global ids), with label `NONE`
            and score -inf where fewer than k are found
        """
        both = zip(self.shards, self.offsets, strict=True)
        return join([shard_topk(each, embeddings, k, excluded, b) for each, b in both], k)


@dataclass(frozen=True)
class Part:
    """The FAISS index of the labels [start, stop).

    greatest, centre: M and c of the module's equations; centre: float32 [D], or 0.
    """

    start: int
    stop: int
    greatest: float
    index: Any
    centre: NDArray[np.float32] | float = 0.0

    def candidates(
        self, queries: NDArray[np.float32], number: int, effort: int, selector: dict[str, Any]
    ) -> NDArray[np.int64]:
        """Finds labels near queries float32 [B, D + 1]; int64 [B, number], `NONE` for none."""
        faiss, queries = load_faiss(), queries.copy()
        queries[:, :-1] -= self.centre
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        padded = np.zeros((len(queries), self.index.d), np.float32)
        padded[:, : queries.shape[1]] = queries * ((self.greatest or 1.0) / norms)
        if isinstance(self.index, faiss.IndexHNSW):
            how = faiss.SearchParametersHNSW(efSearch=effort, **selector)
        elif isinstance(self.index, faiss.IndexIVF):
            how = faiss.SearchParametersIVF(nprobe=effort, **selector)
        else:
            how = faiss.SearchParameters(**selector)
        number = min(number, self.stop - self.start)
        found: NDArray[np.int64] = self.index.search(padded, number, params=how)[1]
        return np.where(found < 0, NONE, found + self.start)


class IndexSearch:
    """Scores the candidates that FAISS finds in each range of labels.

    Args:
        parts: ranges that cover the labels of `classifier`, and may reach beyond them.
        effort: efSearch of HNSW, nprobe of IVF.
        factor: c, candidates of a range for each label asked for, and at least for 10.
    """

    def __init__(
        self, classifier: Classifier, parts: Sequence[Part], effort: int, factor: int
    ) -> None:
        self.classifier, self.parts, self.effort, self.factor = classifier, parts, effort, factor
        shown = (classifier.shown(part.start, part.stop) for part in parts)
        self._selectors = [
            {} if each.all()
            else {"sel": load_faiss().IDSelectorBitmap(np.packbits(each, bitorder="little"))}
            for each in shown
        ]  # fmt: skip

    def search(
        self, embeddings: Tensor, k: int, excluded: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Classifier.search`; a row gets fewer than k labels where the index finds fewer."""
        load_faiss().omp_set_num_threads(torch.get_num_threads())
        start, stop = self.classifier.start, self.classifier.stop
        number = self.factor * max(k, FEWEST)
        banned = torch.empty(0, dtype=torch.int64)
        if excluded is not None:
            rows, local = (each.cpu() for each in excluded.by_chunk([(0, stop - start)])[0][:2])
            banned = rows * stop + local + start
            number += int(rows.bincount().max()) if len(rows) else 0
        ones = np.ones((len(embeddings), 1), np.float32)
        queries = np.hstack([embeddings.float().cpu().numpy(), ones])
        found = [
            part.candidates(queries, number, self.effort, selector)
            for part, selector in zip(self.parts, self._selectors, strict=True)
        ]
        labels = torch.from_numpy(np.hstack([*found, np.full((len(queries), k), NONE)]))
        if len(banned):
            keys = torch.arange(len(labels))[:, None] * stop + labels
            labels[torch.isin(keys, banned) & (labels != NONE)] = NONE
        scores = self.classifier.score(embeddings, labels)
        labels = labels.to(scores.device).masked_fill_(scores == -torch.inf, NONE)
        return merge_topk([scores], [labels], k)


Search = Classifier | IndexSearch


def index_of(model: str) -> str:
    """Returns where the index of a run or an export is, unless one says otherwise.

    It is beside what a symbolic link leads to, so that it is found by any name of the model.
    """
    path = absolute(model)
    return f"{path.rstrip('/') if '://' in path else os.path.realpath(path)}-index"


def check_search(settings: Searched, run: str, model: str, tail: float) -> dict[str, Any]:
    """Returns `index.json` of the index to search by; nothing where search is exact.

    Args:
        model: SHA-256 of the manifest of the checkpoint to search; tail: of its logit adjustment.

    Raises:
        ReneeError: there is no index, a damaged one, or one of another model or adjustment.
    """
    if settings.search == "exact":
        return {}
    path = settings.index or index_of(run)
    content = read_file(f"{path}/{MANIFEST}")
    if content is None:
        raise ReneeError(f"{path} is no index: it has no {MANIFEST}; run `renee-ray index` first")
    try:
        facts: dict[str, Any] = {**parse_json(content), "path": path}
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {facts['format_version']!r:.40}")
        facts |= {key: int(facts[key]) for key in ("effort", "candidates")}
        if facts["candidates"] < 1:
            raise ValueError(f"candidates are {facts['candidates']}")
        for key, wanted in (("model", model), ("tail", tail)):
            if facts[key] != wanted:
                known = f"{key}={facts[key]!r:.80}"
                remedy = "run `renee-ray index` for this model with overwrite=true, or give index="
                remedy = f"give {known}, or search=exact" if key == "tail" else f"{remedy}DIR"
                raise ReneeError(f"{path} was built for {known} and this is {wanted!r}; {remedy}")
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from None
    return facts


def open_search(facts: dict[str, Any], classifier: Classifier) -> Search:
    """Opens search by the index that `check_search` found, or exact search."""
    if not facts:
        return classifier
    parts = read_parts(facts["path"], facts.get("ranges"), classifier)
    return IndexSearch(classifier, parts, facts["effort"], facts["candidates"])


def read_parts(path: str, ranges: Any, classifier: Classifier) -> list[Part]:
    """Reads the ranges of an index that have labels of a classifier.

    Raises:
        ReneeError: a file is missing or damaged, or some label is in none.
    """
    parts, held = [], classifier.start
    try:
        for each in ranges:
            start, stop, name = int(each["start"]), int(each["stop"]), each["file"]
            if start < classifier.stop and stop > classifier.start:
                content = read_file(f"{path}/{name}") if FILES.fullmatch(name) else None
                # FAISS parses only what has the right checksum.
                if content is None or hashlib.sha256(content).hexdigest() != each["sha256"]:
                    raise ValueError(f"{name!r:.80} is not what {MANIFEST} says")
                index = load_faiss().deserialize_index(np.frombuffer(content, np.uint8))
                if index.ntotal != stop - start or start > held:
                    raise ValueError(f"{name} does not have the labels from {held} on")
                held = stop
                centre = np.asarray(each.get("centre", 0.0), np.float32)
                if centre.shape not in ((), (classifier.shards[0].weights.dim,)):
                    raise ValueError(f"{name} has a centre of {centre.size} numbers")
                parts.append(Part(start, stop, float(each["greatest"]), index, centre))
        if held < classifier.stop:
            raise ValueError(f"it lacks label {held}")
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from None
    return parts


def _damaged(path: str, error: Exception) -> ReneeError:
    return ReneeError(
        f"{path} is damaged ({reason(error):.200}); remove it and run `renee-ray index` again"
    )
