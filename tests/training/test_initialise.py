"""First weights from label texts: the docstring's formula, dense, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.model import initialise as initialise_module
from renee_ray.model.initialise import embed_texts, initialise_classifier
from renee_ray.model.model import Model
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.rank.recorder import Recorder
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.data.tiny import PAD, write_tiny
from tests.devices import DEVICES
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")
DIM, VOCABULARY, BATCH = 6, 30, 8
SCALE, CENTROID, CONSTANT = 7.0, 0.5, 2.0
EMPTY = 2, 9
"""Labels with an empty text, which says nothing about them."""


class Bag(nn.Module):
    dim = DIM
    bag = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        with torch.no_grad():
            self.tokens.weight.copy_(torch.randn(VOCABULARY, DIM, generator=generator) + 0.5)
        self.constant: torch.Tensor
        self.register_buffer("constant", torch.zeros(DIM))
        self.noise = nn.Dropout(0.5)  # must be off

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.unsqueeze(-1).to(self.tokens.weight.dtype)
        return self.noise((self.tokens(ids) * mask).sum(1) / mask.sum(1)) + self.constant


def config_of(**classifier: object) -> RunConfig:
    settings = {"init_scale": SCALE, "init_centroid": CENTROID, "init_constant": CONSTANT}
    return make_config(
        RunConfig, {"data": "d", "output": "o", "classifier": {**settings, **classifier}}
    )


def train_rows(dataset: Dataset) -> list[dict[str, list[int]]]:
    return dataset.read_rows("train", 0, dataset.manifest.num_points("train")).to_pylist()


def batches_of(dataset: Dataset, ranks: Ranks) -> list[Batch]:
    rows = train_rows(dataset)
    out = []
    for start in range(0, len(rows), BATCH):
        listed = rows[start : start + BATCH]
        mine = listed[slice(*split_range(len(listed), ranks.num_ranks, ranks.rank))]
        out.append(
            Batch(
                Position(0, start // BATCH),
                np.array([row["point_id"] for row in mine], dtype=np.int64),
                Ragged.of_lists([row["input_ids"] for row in mine]),
                Ragged.of_lists([row["labels"] for row in mine]),
                Ragged.of_lists([[]] * len(mine)),
                PAD,
            )
        )
    return out


def initialise(
    ranks: Ranks, path: str, centroid: float = CENTROID, device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    dataset = Dataset.open(path)
    owned = LabelRange.of_rank(dataset.manifest.num_labels, ranks.num_ranks, ranks.rank)
    shard = Shard(owned, Weights("fp32", len(owned), DIM, False, device), chunk=4)
    encoder = Bag().to(device)
    model = Model(encoder, shard)  # type: ignore[arg-type]
    config, recorder = config_of(init_centroid=centroid), Recorder()
    points = lambda: batches_of(dataset, ranks)  # noqa: E731
    initialise_classifier(model, config, dataset, points, ranks, recorder)
    assert encoder.training, "the mode is put back"
    return {"weight": shard.weights.weight.read(0, len(owned)).cpu().clone(),
            "constant": encoder.constant.cpu().clone(),
            "rounds": torch.tensor(recorder.place().entered)}  # fmt: skip


def both(ranks: Ranks, path: str) -> dict[str, dict[str, torch.Tensor]]:
    return {"with": initialise(ranks, path), "without": initialise(ranks, path, 0.0)}


Runs = dict[int, list[dict[str, dict[str, torch.Tensor]]]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(
        tmp_path_factory.mktemp("tiny"), train=(30, 11), labels=(7, 4), vocabulary=VOCABULARY,
        empty=EMPTY,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(dataset: Dataset) -> Runs:
    return {
        n: [both(Ranks(), dataset.path)] if n == 1 else on_ranks(n, both, dataset.path)
        for n in (1, 2, 3)
    }


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def dense(dataset: Dataset, centroid: float = CENTROID) -> dict[str, torch.Tensor]:
    """The formula of the module's docstring, term by term."""
    table = Bag().tokens.weight.detach().double()

    def embed(rows: list[dict[str, list[int]]]) -> torch.Tensor:
        return torch.stack([table[row["input_ids"]].mean(0) for row in rows])

    manifest = dataset.manifest
    rows = train_rows(dataset)
    texts = dataset.read_rows("labels", 0, manifest.num_labels).to_pylist()
    e = embed(rows)
    count = torch.tensor([float(row["train_count"]) for row in texts], dtype=torch.float64)
    points = manifest.num_points("train") + manifest.num_points("validation")
    rho, mu, second = e.norm(dim=1).mean(), e.mean(0), e.T @ e / len(e)
    ridge = 1e-4 * second.trace() / DIM
    b = torch.linalg.solve(second + ridge * torch.eye(DIM, dtype=torch.float64), mu)
    u = b / b.norm()
    v = unit(embed(texts))
    v[list(EMPTY)] = 0
    if centroid:
        has = torch.zeros(manifest.num_labels, len(rows), dtype=torch.float64)
        for i, row in enumerate(rows):
            has[row["labels"], i] = 1
        v = unit(v + centroid * unit(has @ unit(e)))
    e, mu = e + CONSTANT * u, mu + CONSTANT * u
    v = SCALE / rho * v
    log_prior = (count.clamp(min=0.5) / points).log()

    def weights(delta: float) -> torch.Tensor:
        return v + (log_prior + delta - v @ mu)[:, None] * u / (mu @ u)

    wanted = sum(len(row["labels"]) for row in rows) / len(rows)
    low, high = -20.0, 20.0
    for _ in range(60):
        delta = (low + high) / 2
        expected = float((e @ weights(delta).T).sigmoid().sum(1).median())
        low, high = (low, delta) if expected > wanted else (delta, high)
    return {"weight": weights(low), "constant": CONSTANT * u}


def whole(runs: Runs, num_ranks: int, kind: str) -> torch.Tensor:
    return torch.cat([result[kind]["weight"] for result in runs[num_ranks]])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("kind", ["with", "without"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_equals_the_formula(runs: Runs, dataset: Dataset, num_ranks: int, kind: str) -> None:
    wanted = dense(dataset, CENTROID if kind == "with" else 0.0)
    # delta is found by 16 bisections of [-20, 20]: to 40 / 2**17.
    assert error(whole(runs, num_ranks, kind), wanted["weight"]) < 1e-3
    for result in runs[num_ranks]:
        assert error(result[kind]["constant"], wanted["constant"]) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_begins_alike_each_time(dataset: Dataset, device: str) -> None:
    first, again = (
        initialise(Ranks(), dataset.path, device=torch.device(device)) for _ in range(2)
    )
    assert torch.equal(first["weight"], again["weight"])
    assert error(first["weight"], dense(dataset)["weight"]) < 1e-3


def test_the_centroid_makes_a_difference(runs: Runs) -> None:
    assert error(whole(runs, 1, "with"), whole(runs, 1, "without")) > 0.02


@pytest.mark.parametrize("kind", ["with", "without"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_world_sizes_agree(runs: Runs, num_ranks: int, kind: str) -> None:
    assert error(whole(runs, num_ranks, kind), whole(runs, 1, kind)) < 1e-5


def initialise_finely(ranks: Ranks, path: str) -> torch.Tensor:
    initialise_module.TEXT_BATCH = 2
    return initialise(ranks, path)["rounds"]


def test_ranks_meet_after_every_batch_of_texts(dataset: Dataset) -> None:
    """So that none waits for another's texts longer than one batch takes."""
    points = -(-dataset.manifest.num_points("train") // BATCH) + 1
    for rounds in on_ranks(3, initialise_finely, dataset.path):
        assert int(rounds) == points + 2 + 1, "4 labels in batches of 2, and the end"


def test_a_batch_without_any_label_adds_nothing(dataset: Dataset) -> None:
    centroids = torch.zeros(11, DIM)
    batch = batches_of(dataset, Ranks())[0]
    bare = replace(batch, labels=Ragged.of_lists([[]] * len(batch)))
    own = torch.ones(len(batch), DIM)
    owned = LabelRange(0, 11, 11)
    initialise_module._add_to_centroids(centroids, bare, own, owned, Ranks())
    assert not centroids.any()


def test_texts_are_embedded_in_their_own_order() -> None:
    encoder = Bag().eval()
    rows = [[3, 4, 5, 6], [7], [8, 9], [1, 2, 3]]
    found = embed_texts(encoder, Ragged.of_lists(rows), 4, PAD)  # type: ignore[arg-type]
    wanted = torch.stack([encoder.tokens.weight[row].mean(0) for row in rows])
    torch.testing.assert_close(found, wanted)


def test_normal_needs_neither_texts_nor_points(tmp_path: Path, dataset: Dataset) -> None:
    shard = Shard(LabelRange(0, 11, 11), Weights("fp32", 11, DIM, False, CPU))

    def points() -> list[Batch]:
        raise AssertionError("the points were read")

    config = config_of(init="normal", init_std=0.5)
    model = Model(Bag(), shard)  # type: ignore[arg-type]
    initialise_classifier(model, config, dataset, points, Ranks())
    assert 0.3 < float(shard.weights.weight.read(0, 11).std()) < 0.7


def test_neither_texts_nor_centroids_is_refused(dataset: Dataset) -> None:
    bare = Dataset(dataset.path, replace(dataset.manifest, has_label_texts=False))
    shard = Shard(LabelRange(0, 11, 11), Weights("fp32", 11, DIM, False, CPU))
    model = Model(Bag(), shard)  # type: ignore[arg-type]
    with pytest.raises(ReneeError, match=r"set classifier\.init=normal"):
        initialise_classifier(model, config_of(init_centroid=0), bare, lambda: [], Ranks())
