"""Search of the k best labels: exact, or by a FAISS index that leaves most labels unread.

The score of label l for an embedding e is e . w_l + b_l, where b is the logit adjustment. Graphs
and clusters of FAISS need distances, and rows of different norms have no distance that orders them
like the score. So what is indexed of a range is (Bachrach et al., RecSys 2014)

    x_l = [w_l, b_l, sqrt(M^2 - |w_l|^2 - b_l^2)]    M: the range's greatest norm of [w, b]
    q   = [e, 1, 0] M / |[e, 1]|                     |x_l - q|^2 = 2 M^2 - 2 (e . w_l + b_l) M / |q|

The order by L2 distance is exactly the order by score. The factor M / |[e, 1]| leaves that order as
it is; it puts the query on the sphere where all x_l are, which centroids are compared with. All
vectors are padded with zeros to a multiple of 8, so that product quantisers can cut them.

The index compresses its vectors, so its own distances only choose candidates: of each range the
c k nearest, whose scores are then computed with the true weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from renee_ray.data.storage import absolute, filesystem_of, patiently, read_file
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.xfc.labels import NONE
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk.select import merge_topk, shard_topk

if TYPE_CHECKING:
    import faiss

MANIFEST, FORMAT_VERSION = "index.json", 1
FILES = re.compile(r"labels-\d{12}-\d{12}\.(?:faiss|json)|recall\.png")
RESCORED_BYTES = 1 << 26
"""Bytes of true weights that are gathered at once."""


def load_faiss() -> Any:
    """Imports FAISS, which takes a moment.

    Raises:
        ReneeError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ReneeError(
            f"an index needs FAISS ({reason(error):.200}); pip install 'renee_ray[index]'"
        ) from error
    return faiss


class Search(Protocol):
    """Finds labels, exactly or not."""

    def search(
        self, embeddings: Tensor, k: int, excluded: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the k best labels of each row.

        Args:
            embeddings: float32 [B, D].
            excluded: pairs of a row and a label that must not be found.

        Returns:
            (scores float32 [B, k] descending, labels int64 [B, k], global ids), with label `NONE`
            and score -inf where fewer than k are found
        """
        ...


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

    def shown(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Returns which of the labels [start, stop) are here, and not hidden, as bool."""
        found = np.zeros(stop - start, bool)
        for shard, offset in zip(self.shards, self.offsets, strict=True):
            first, own = max(start, shard.owned.start), shard.owned
            here = slice(first - own.start, max(first, min(stop, own.stop)) - own.start)
            length = here.stop - here.start
            kept = True if offset is None else (offset[here] > -torch.inf).cpu().numpy()
            found[first - start : first - start + length] = kept
        return found

    def score(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Computes the scores of labels int64 [B, c], host memory; float32 [B, c].

        A place with `NONE` gets -inf. Weights are gathered for some rows at a time.
        """
        stops = torch.tensor([shard.owned.stop for shard in self.shards])
        scores = torch.full(labels.shape, -torch.inf, device=embeddings.device)
        some = max(1, RESCORED_BYTES // (4 * embeddings.shape[1] * max(1, labels.shape[1])))
        for first in range(0, len(labels), some):
            ids, here = labels[first : first + some], scores[first : first + some]
            e = embeddings[first : first + some]
            which = torch.bucketize(ids, stops, right=True).masked_fill_(ids == NONE, -1)
            for i in which.unique().tolist():
                if i >= 0:
                    row, place = (which == i).nonzero(as_tuple=True)
                    local = (ids[row, place] - self.shards[i].owned.start).to(e.device)
                    found = (self.shards[i].weights.weight.pick(local) * e[row]).sum(1)
                    offset = self.offsets[i]
                    here[row, place] = found if offset is None else found + offset[local]
        return scores


@dataclass(frozen=True)
class ExactSearch:
    """Scores every label."""

    classifier: Classifier

    def search(
        self, embeddings: Tensor, k: int, excluded: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Search.search`; `excluded` is of a classifier with a single shard."""
        both = zip(self.classifier.shards, self.classifier.offsets, strict=True)
        found = [
            shard_topk(shard, embeddings, min(k, len(shard.owned)), excluded, offset)
            for shard, offset in both
        ]
        scores, labels = ([each[i] for each in found] for i in (0, 1))
        return merge_topk(scores, labels, k)


@dataclass
class Part:
    """The FAISS index of the labels [start, stop). greatest: M of the module's equations."""

    start: int
    stop: int
    greatest: float
    index: faiss.Index

    def selector(self, classifier: Classifier) -> dict[str, Any]:
        """Returns FAISS's filter of the labels that a classifier has and does not hide, if any."""
        shown = classifier.shown(self.start, self.stop)
        if shown.all():
            return {}
        return {"sel": load_faiss().IDSelectorBitmap(np.packbits(shown, bitorder="little"))}

    def candidates(
        self, queries: NDArray[np.float32], number: int, effort: int, selector: dict[str, Any]
    ) -> NDArray[np.int64]:
        """Finds labels near queries float32 [B, D + 1]; int64 [B, number], `NONE` for none."""
        faiss, number = load_faiss(), min(number, self.stop - self.start)
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        padded = np.zeros((len(queries), self.index.d), np.float32)
        padded[:, : queries.shape[1]] = queries * ((self.greatest or 1.0) / norms)
        if isinstance(self.index, faiss.IndexHNSW):
            how = faiss.SearchParametersHNSW(efSearch=effort, **selector)
        elif isinstance(self.index, faiss.IndexIVF):
            how = faiss.SearchParametersIVF(nprobe=effort, **selector)
        else:
            how = faiss.SearchParameters(**selector)
        found: NDArray[np.int64] = self.index.search(padded, number, params=how)[1]
        return np.where(found < 0, NONE, found + self.start)


class IndexSearch:
    """Scores the candidates that FAISS finds in each range of labels.

    Args:
        parts: ranges that cover the labels of `classifier`, and may reach beyond them.
        effort: efSearch of HNSW, nprobe of IVF.
        factor: c, candidates of a range for each label asked for.
    """

    def __init__(
        self, classifier: Classifier, parts: Sequence[Part], effort: int, factor: int
    ) -> None:
        self.classifier, self.parts, self.effort, self.factor = classifier, parts, effort, factor
        self._selectors = [part.selector(classifier) for part in parts]

    def search(
        self, embeddings: Tensor, k: int, excluded: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Search.search`; a row may get fewer than k labels where the index finds fewer."""
        load_faiss().omp_set_num_threads(torch.get_num_threads())
        start, stop, number = self.classifier.start, self.classifier.stop, self.factor * k
        banned = None
        if excluded is not None:
            rows, local = (each.cpu() for each in excluded.by_chunk([(0, stop - start)])[0])
            banned = rows * stop + local + start
            number += int(rows.bincount().max()) if len(rows) else 0
        ones = np.ones((len(embeddings), 1), np.float32)
        queries = np.hstack([embeddings.float().cpu().numpy(), ones])
        found = [
            part.candidates(queries, number, self.effort, selector)
            for part, selector in zip(self.parts, self._selectors, strict=True)
        ]
        labels = torch.from_numpy(np.hstack([*found, np.full((len(queries), k), NONE)]))
        if banned is not None:
            keys = torch.arange(len(labels))[:, None] * stop + labels
            labels[torch.isin(keys, banned) & (labels != NONE)] = NONE
        scores = self.classifier.score(embeddings, labels)
        labels = labels.to(scores.device).masked_fill_(scores == -torch.inf, NONE)
        return merge_topk([scores], [labels], k)


def index_of(model: str) -> str:
    """Returns where the index of a run or an export is, unless one says otherwise."""
    return f"{absolute(model).rstrip('/')}-index"


def check_index(path: str, model: str | None, tail: float) -> dict[str, Any]:
    """Reads `index.json` of the directory that `renee-ray index` wrote.

    Args:
        model: SHA-256 of the manifest of the checkpoint to search; tail: of its logit adjustment.

    Raises:
        ReneeError: there is no index, a damaged one, or one of another model or adjustment.
    """
    content = read_file(f"{path}/{MANIFEST}")
    if content is None:
        raise ReneeError(f"{path} is no index: it has no {MANIFEST}; run `renee-ray index` first")
    try:
        facts: dict[str, Any] = parse_json(content)
        version, found = facts["format_version"], (facts["model"], facts["tail"])
        int(facts["effort"]), int(facts["candidates"]), list(facts["ranges"])
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from None
    if version != FORMAT_VERSION:
        raise ReneeError(f"{path} has format version {version!r:.40}; build the index again")
    for key, have, wanted in zip(("model", "tail"), found, (model, tail), strict=True):
        if have != wanted:
            raise ReneeError(
                f"{path} was built for {key}={have!r:.80} and this is {wanted!r}; run `renee-ray "
                f"index` for this model with overwrite=true, or give another index"
            )
    return facts


def _damaged(path: str, error: Exception) -> ReneeError:
    return ReneeError(
        f"{path} is damaged ({reason(error):.200}); run `renee-ray index` with overwrite=true"
    )


def open_index(path: str, model: str | None, tail: float, classifier: Classifier) -> IndexSearch:
    """Opens the part of an index that has the labels of a classifier; see `check_index`."""
    facts = check_index(path, model, tail)
    parts = read_parts(path, facts["ranges"], classifier)
    return IndexSearch(classifier, parts, int(facts["effort"]), int(facts["candidates"]))


def read_parts(path: str, ranges: Any, classifier: Classifier) -> list[Part]:
    """Reads the ranges that have labels of a classifier, as `index.json` lists them.

    Raises:
        ReneeError: a file is missing or damaged, or some label is in none.
    """
    parts, held = [], classifier.start
    try:
        for each in ranges:
            start, stop = int(each["start"]), int(each["stop"])
            if start < classifier.stop and stop > classifier.start:
                index = read_index(f"{path}/{each['file']}", each["sha256"])
                if index.ntotal != stop - start or start > held:
                    raise ValueError(f"{each['file']!r:.80} does not have the labels from {held}")
                held = stop
                parts.append(Part(start, stop, float(each["greatest"]), index))
        if held < classifier.stop:
            raise ValueError(f"it lacks label {held}")
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from None
    return parts


def checksum(path: str) -> str:
    """Computes the SHA-256 of a file; empty where there is none."""
    filesystem, name = filesystem_of(path)

    def read() -> str:
        digest = hashlib.sha256()
        try:
            with filesystem.open_input_stream(name) as source:
                while block := source.read(1 << 20):
                    digest.update(block)
        except FileNotFoundError:
            return ""
        return digest.hexdigest()

    return patiently(read, f"reading {path}")


def read_index(path: str, sha256: str) -> Any:
    """Reads an index of FAISS, whose parser sees only what has the right checksum.

    Raises:
        ValueError: it is missing, or another one.
    """
    filesystem, name = filesystem_of(path)
    if not FILES.fullmatch(path.rpartition("/")[2]) or checksum(path) != sha256:
        raise ValueError(f"{path} is not what {MANIFEST} says")
    faiss = load_faiss()

    def read() -> Any:
        with filesystem.open_input_stream(name) as source:
            return faiss.read_index(faiss.PyCallbackIOReader(source.read))

    return patiently(read, f"reading {path}")
