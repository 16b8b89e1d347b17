"""Search by FAISS finds what a dense product in float64 finds, whatever the norms of the rows."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

import renee_ray
from renee_ray.config.score import ExportConfig, IndexConfig, ScoreConfig
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Ragged
from renee_ray.scoring.index import (
    Classifier,
    IndexSearch,
    Part,
    Search,
    check_search,
    index_of,
    open_search,
)
from renee_ray.scoring.index_building import (
    Survey,
    build,
    check_size,
    default_candidates,
    default_factory,
    empty_index,
)
from renee_ray.scoring.index_quality import efforts_of, recall, swept
from renee_ray.service.labels import add_labels, retire_labels
from renee_ray.service.score.index import Plan, _pieces
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.weights.storages import Weights

from .planted import near, planted
from .service.test_changing_labels import DIM, LABELS, NEW, new_at, quiet, run_at

L, D, B = 601, 13, 17
EVERY = 1 << 20
"""Search effort that reads all."""


def make_part(weights: Tensor, offsets: Tensor, factory: str, start: int, stop: int) -> Part:
    centre = torch.full((weights.shape[1],), 0.25)

    def rows() -> Iterator[Tensor]:
        last = offsets + weights @ centre
        yield from torch.cat([weights, last[:, None]], 1)[start:stop].split(50)

    survey = Survey.of(rows, stop - start, 1000)
    index = empty_index(factory, weights.shape[1])
    build(index, rows, survey)
    return Part(start, stop, survey.greatest, index, centre.numpy())


def make_parts(weights: Tensor, offsets: Tensor, factory: str, number: int) -> list[Part]:
    bounds = [split_range(len(weights), number, i) for i in range(number)]
    return [make_part(weights, offsets, factory, *each) for each in bounds]


def shards(weights: Tensor, number: int) -> list[Shard]:
    owned = [LabelRange.of_rank(len(weights), number, rank) for rank in range(number)]
    return [Shard(each, Weights.of(weights[each.start : each.stop])) for each in owned]


def classifiers(weights: Tensor, offsets: Tensor, number: int) -> list[Classifier]:
    """One for each rank."""
    return [
        Classifier([shard], [offsets[shard.owned.start : shard.owned.stop]])
        for shard in shards(weights, number)
    ]


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Weights of norms from 0.1 to 10, offsets, embeddings and their scores in float64."""
    weights, offsets = planted(L, D, spread=True)
    embeddings = near(weights, B)
    dense = embeddings.double() @ weights.double().T + offsets.double()
    return weights, offsets, embeddings, dense.numpy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("factory", "parts", "factor"),
    [("Flat", 1, 1), ("Flat", 4, 1), ("IVF8,Flat", 3, 1), ("IVF8,PQ8x4fs", 3, 20)],
)
def test_all_effort_finds_the_exact_labels(
    problem: tuple[Tensor, Tensor, Tensor, np.ndarray],
    ranks: int,
    factory: str,
    parts: int,
    factor: int,
) -> None:
    weights, offsets, embeddings, dense = problem
    built, k, dense = make_parts(weights, offsets, factory, parts), 12, dense.copy()
    banned = torch.tensor([[0, 0, 0, 3], [*np.argsort(-dense[0])[:3].tolist(), 5]])
    hidden = np.argsort(-dense[1])[:40].copy()
    offsets = offsets.clone()
    offsets[hidden] = -torch.inf
    dense[:, hidden] = -np.inf
    dense[tuple(banned.numpy())] = -np.inf
    found = []
    for each in classifiers(weights, offsets, ranks):
        inside = (banned[1] >= each.start) & (banned[1] < each.stop)
        excluded = Pairs(*banned[:, inside], each.shards[0].owned)
        search = IndexSearch(each, built, EVERY, factor)
        found.append(search.search(embeddings, k, excluded))
    scores, labels = (torch.cat([each[i] for each in found], 1).numpy() for i in (0, 1))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    wanted = np.argsort(-dense, axis=1)[:, :k]
    np.testing.assert_array_equal(np.take_along_axis(labels, order, 1), wanted)
    np.testing.assert_allclose(
        np.take_along_axis(scores, order, 1), np.take_along_axis(dense, wanted, 1), rtol=1e-5
    )


def test_l2_without_the_last_number_finds_other_labels(
    problem: tuple[Tensor, Tensor, Tensor, np.ndarray],
) -> None:
    weights, _, embeddings, dense = problem
    near = torch.cdist(embeddings, weights).argsort(1)[:, :10].numpy()
    assert recall(near, np.argsort(-dense, axis=1)[:, :10]) < 0.5


@pytest.mark.parametrize("factory", ["HNSW16,SQ8", "IVF32,SQ8", "IVF32,PQ20x4fs"])
def test_a_sweep_reaches_the_recall_where_norms_vary(factory: str) -> None:
    weights, offsets = planted(3000, 32, spread=True)
    parts = make_parts(weights, offsets, factory, 2)
    assert parts[0].index.d == 40
    exact = Classifier(shards(weights, 1), [offsets])
    embeddings = near(weights, 40)
    best = exact.search(embeddings, 1)[1].tolist()
    truth = Ragged.of_lists(best), Ragged.of_lists([[] for _ in best])
    found = swept(exact, parts, embeddings, truth, factor=10, wanted=0.95)
    kept = next(row for row in found["sweep"] if row["effort"] == found["effort"])
    assert found["reached"] and kept["recall@10"] >= 0.95
    assert found["exact"]["P@1"] == 100 and kept["P@1 lost"] <= 5
    cheaper = [row["recall@10"] for row in found["sweep"] if row["effort"] < found["effort"]]
    assert all(value < 0.95 for value in cheaper)
    assert found["effort"] in efforts_of(parts[0])[1]


def test_coarse_codes_get_more_candidates_until_they_suffice() -> None:
    weights, offsets = planted(3000, 32, spread=True)
    parts = make_parts(weights, offsets, "IVF32,PQ10x4fs", 2)
    exact = Classifier(shards(weights, 1), [offsets])
    embeddings = near(weights, 40)
    truth = Ragged.of_lists([[0]] * 40), Ragged.of_lists([[]] * 40)
    found = swept(exact, parts, embeddings, truth, factor=1, wanted=0.9)
    first = [row["recall@10"] for row in found["sweep"] if row["candidates"] == 1]
    assert max(first) < 0.9, "one candidate a label suffices, so that this tests nothing"
    assert found["reached"] and found["candidates"] in (4, 16, 64, 256, 1024)
    search = IndexSearch(exact, parts, found["effort"], found["candidates"])
    there = search.search(embeddings, 10)[1].numpy()
    assert recall(there, exact.search(embeddings, 10)[1].numpy()) >= 0.9


def test_rows_without_any_weight_and_more_labels_than_there_are() -> None:
    weights, offsets = torch.zeros(3, 4), torch.zeros(3)
    search = IndexSearch(
        classifiers(weights, offsets, 1)[0], make_parts(weights, offsets, "Flat", 1), 0, 2
    )
    scores, labels = search.search(torch.ones(2, 4), 5)
    assert labels.tolist() == [[0, 1, 2, -1, -1]] * 2
    assert scores[:, :3].eq(0).all() and scores[:, 3:].eq(-torch.inf).all()


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ReneeError, match="not finite"):
        make_parts(torch.full((3, 4), torch.nan), torch.zeros(3), "Flat", 1)


def test_the_index_depends_on_the_number_of_labels() -> None:
    kinds = [default_factory(n, 72) for n in (49_999, 50_000, 20_000_000)]
    assert kinds == ["Flat", "IVF1024,PQ36x4fs", "IVF16384,PQ36x4fs"]
    assert [default_candidates(kind) for kind in kinds] == [1, 30, 30]
    with pytest.raises(ReneeError, match="FAISS does not take it"):
        empty_index("nonsense", 8)
    with pytest.raises(ReneeError, match="IndexLSH"):
        empty_index("LSH", 8)


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ReneeError, match=r"renee_ray\[index\]"):
        empty_index("Flat", 8)


@pytest.fixture
def written(
    problem: tuple[Tensor, Tensor, Tensor, np.ndarray], tmp_path: Path
) -> tuple[Path, Classifier]:
    """An index of two files, and the whole classifier."""
    weights, offsets, *_ = problem
    ranges = []
    for part in make_parts(weights, offsets, "Flat", 2):
        name = f"labels-{part.start:012d}-{part.stop:012d}.faiss"
        content = faiss.serialize_index(part.index).tobytes()
        (tmp_path / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        facts = {"start": part.start, "stop": part.stop, "greatest": part.greatest}
        facts["centre"] = part.centre.tolist()
        ranges.append({**facts, "file": name, "sha256": sha256})
    known = {"format_version": 1, "model": "ab", "tail": 0.0, "effort": 0, "candidates": 2}
    (tmp_path / "index.json").write_text(json.dumps({**known, "ranges": ranges}))
    return tmp_path, classifiers(weights, offsets, 1)[0]


def opened(path: Path, classifier: Classifier, model: str = "ab", tail: float = 0.0) -> Search:
    settings = ScoreConfig(search="index", index=str(path))
    return open_search(check_search(settings, "none", model, tail), classifier)


def test_a_written_index_is_read_again(written: tuple[Path, Classifier]) -> None:
    path, classifier = written
    embeddings = near(classifier.shards[0].weights.read(0, L), 5)
    found = opened(path, classifier).search(embeddings, 7)
    exact = open_search({}, classifier)
    assert isinstance(exact, Classifier) and not check_search(ScoreConfig(), "none", "ab", 0.0)
    assert torch.equal(found[1], exact.search(embeddings, 7)[1])


@pytest.mark.parametrize(
    "harm",
    [
        "flip",
        "cut",
        "lost",
        "label",
        "json",
        "no range",
        "outside",
        "effort",
        "candidates",
        "centre",
    ],
)
def test_a_damaged_index_is_refused(written: tuple[Path, Classifier], harm: str) -> None:
    path, classifier = written
    file, manifest = sorted(path.glob("*.faiss"))[0], path / "index.json"
    content = bytearray(file.read_bytes())
    facts = json.loads(manifest.read_text())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-5])
    elif harm == "lost":
        file.unlink()
    elif harm == "label":
        facts["ranges"][0]["stop"] -= 1
    elif harm == "no range":
        del facts["ranges"][1]
    elif harm == "effort":
        del facts["effort"]
    elif harm == "candidates":
        facts["candidates"] = 0
    elif harm == "centre":
        facts["ranges"][0]["centre"] = facts["ranges"][0]["centre"][1:]
    elif harm == "outside":
        facts["ranges"][0]["file"] = "../" + file.name
    manifest.write_text("{" if harm == "json" else json.dumps(facts))
    with pytest.raises(ReneeError, match="is damaged"):
        opened(path, classifier)


@pytest.mark.parametrize(
    ("model", "tail", "words"),
    [("cd", 0.0, "model='ab'.* overwrite=true"), ("ab", 0.5, "tail=0.0 .*; give tail=0.0,")],
)
def test_an_index_of_another_model_is_refused(
    written: tuple[Path, Classifier], model: str, tail: float, words: str
) -> None:
    path, classifier = written
    with pytest.raises(ReneeError, match=f"was built for {words}"):
        opened(path, classifier, model, tail)
    with pytest.raises(ReneeError, match="is no index"):
        opened(path / "none", classifier, model, tail)


def test_a_model_has_the_same_index_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "now").symlink_to("first")
    assert index_of(f"{tmp_path}/now/") == f"{tmp_path}/first-index"
    assert index_of("s3://bucket/first/") == "s3://bucket/first-index"


def test_more_centroids_than_labels_are_refused() -> None:
    for factory, centroids in ("IVF64,Flat", 64), ("IVF2,PQ4", 256), ("IVF2,PQ4x4fs", 16):
        index = empty_index(factory, 8)
        check_size(index, factory, centroids)
        with pytest.raises(ReneeError, match=f"{centroids} lists or codes, and a range only"):
            check_size(index, factory, centroids - 1)
    check_size(empty_index("Flat", 8), "Flat", 1)


def test_labels_that_were_added_make_one_more_range(tmp_path: Path) -> None:
    """A last range that is small grows; others keep their bounds and their factory strings."""

    def cut(number: int, **settings: Any) -> list[tuple[int, int, str]]:
        found = _pieces(str(tmp_path), number, 8, IndexConfig(**settings), workers=2)
        return [(each.start, each.stop, each.factory) for each in found]

    def build(pieces: list[tuple[int, int, str]]) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        for start, stop, factory in pieces:
            content = json.dumps({"built_from": {"factory": factory}})
            (tmp_path / f"labels-{start:012d}-{stop:012d}.json").write_text(content)

    large = [(0, 100_000, "IVF1024,PQ8x4fs"), (100_000, 200_000, "IVF1024,PQ8x4fs")]
    assert cut(200_000) == large
    build(large)
    assert cut(200_000) == large and cut(200_001) == [*large, (200_000, 200_001, "Flat")]
    build([*large, (200_000, 200_001, "Flat")])
    assert cut(200_010) == [*large, (200_000, 200_010, "Flat")]
    assert [each[:2] for each in cut(200_010, ranges=1)] == [(0, 200_010)]
    assert {each[2] for each in cut(200_010, factory="HNSW8,SQ8")} == {"HNSW8,SQ8"}
    assert cut(150_000) == [(0, 75_000, large[0][2]), (75_000, 150_000, large[0][2])]
    build([large[0], (100_001, 200_000, "Flat")])  # not all labels
    assert cut(200_000) == large
    build(large[:1])  # cut off
    assert cut(200_000) == large
    build([(0, 60_000, "IVF512,SQ8"), (60_000, 120_000, "IVF512,SQ8")])
    assert cut(180_000)[2:] == [(120_000, 180_000, "IVF512,SQ8")]
    assert len(cut(250_000)) == 2, "most labels are new"
    build([(0, 3, ""), (3, 7, "Flat")])  # damaged
    assert cut(7) == [(0, 3, "Flat"), (3, 7, "Flat")]


def test_rows_of_added_and_retired_labels_are_indexed(tmp_path: Path) -> None:
    run, export, total = run_at(tmp_path), str(tmp_path / "export"), LABELS + len(NEW)
    add_labels(run.path, new_at(tmp_path), quiet)
    retire_labels(run.path, ("3", str(LABELS)), "", quiet, restore=False)
    renee_ray.export(run.path, export, ExportConfig())

    none = torch.zeros(DIM)

    def rows(model: str, checkpoint: str, tail: float, centre: Tensor = none) -> Tensor:
        plan = Plan(model, checkpoint, "", total, DIM, tail, "", (), 1, centre)
        return torch.cat(list(plan.rows(0, total)()))

    name = run.checkpoint("best").name
    torch.testing.assert_close(rows(run.path, name, 0.0), rows(export, "best", 0.0))
    counts = run.dataset().read_rows("labels", 0, LABELS, ["train_count"])["train_count"].to_numpy()
    wanted = [*(-0.5 * np.log(np.maximum(counts, 1))), *[0.0] * len(NEW)]
    wanted[3] = 0.0  # it is retired, and found by nobody
    found = rows(run.path, name, 0.5)
    np.testing.assert_allclose(found[:, -1], wanted - np.mean(wanted), rtol=1e-5, atol=1e-6)

    noise = torch.Generator().manual_seed(0)
    centre, embeddings = torch.randn(DIM, generator=noise), torch.randn(5, DIM, generator=noise)
    centred = rows(run.path, name, 0.5, centre)
    assert centred.mean(0).abs().max() < 1e-5
    scores = embeddings @ found[:, :-1].T + found[:, -1]
    again = (embeddings - centre) @ centred[:, :-1].T + centred[:, -1]
    torch.testing.assert_close(again - again[:, :1], scores - scores[:, :1])  # the same order
