"""A run of the whole model on each device: steps, checkpoint, resumption, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import Checkpoint, State, set_moments
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.model.model import Model, build_model
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.scorer import Propensities
from renee_ray.training.loop import Trainer, Validation
from renee_ray.training.schedule import Schedule
from renee_ray.xfc.labels import LabelRange
from tests.devices import DEVICES

LABELS, VOCABULARY, BATCH, STEPS, SAVED = 70, 40, 12, 10, 5
FIRST = torch.randn(LABELS, 32, generator=torch.Generator().manual_seed(5)) * 0.1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a small encoder with random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 16,
    }  # fmt: skip
    path = str(tmp_path_factory.mktemp("encoder"))
    BertModel(BertConfig(**shape)).save_pretrained(path)
    return path


def batch_of(number: int) -> Batch:
    rng = np.random.default_rng(number)
    rows = [rng.integers(1, VOCABULARY, rng.integers(2, 12)).tolist() for _ in range(BATCH)]
    labels = [[sum(row) % LABELS, row[0]] for row in rows]
    columns = [Ragged.of_lists(each) for each in (rows, labels, [[]] * BATCH)]
    return Batch(Position(0, number), np.arange(BATCH), *columns, pad_id=0)


class Run:
    """A run on one device, which is saved in the middle, and goes on from what is at `path`."""

    def __init__(
        self, path: Path, encoder: str, device: str, autocast: str = "bf16",
        precision: str = "bf16_sr",
    ) -> None:  # fmt: skip
        self.device, self.checkpoints = torch.device(device), Checkpoints(str(path))
        self.losses: list[float] = []
        self.evaluated: list[int] = []
        self.config = make_config(
            RunConfig, {"data": "unused", "output": str(path), "loss_every": 1, "warmup": 0.0},
            {"encoder": {"name": encoder, "autocast": autocast, "dropout": 0.2, "micro_batch": 5,
                         "learning_rate": 1e-3, "internal_dropout": 0.0, "clip_norm": 1.0},
             "classifier": {"precision": precision, "learning_rate": 0.05}},
        )  # fmt: skip
        self.model, checkpoint, moments = resume(self.checkpoints, Ranks(), self._build)
        self.writer = CheckpointWriter(self.checkpoints, Ranks(), 1, "P@1").start()
        self.writer.reserve(self.model.encoder, self.model.shard)
        owned = LabelRange(0, LABELS, LABELS)
        validation = Validation(
            lambda: [batch_of(100)], Propensities(torch.ones(LABELS).double(), owned, Ranks()),
            lambda tail: torch.zeros(LABELS, device=self.device),
        )  # fmt: skip
        self.trainer = Trainer(
            self.config, self.model, Ranks(), self.device, Schedule((STEPS,), 1.0, SAVED),
            validation, lambda r: self.losses.append(r["loss"]),
            self._save, checkpoint.state if checkpoint else State(),
        )  # fmt: skip
        if checkpoint:
            set_moments(self.model.encoder, self.trainer.optimizer, moments)
        else:
            self.model.shard.write(0, FIRST.to(self.device))
        self.trainer.run(map(batch_of, range(self.trainer.state.step, STEPS)))

    def _build(self, checkpoint: Checkpoint | None) -> Model:
        return build_model(self.config, LABELS, Ranks(), self.device)

    def _save(self, metrics: dict[str, float]) -> None:
        self.evaluated += [self.trainer.state.step] if metrics else []
        if self.trainer.state.step == SAVED:
            each = self.model.encoder, self.trainer.optimizer, self.model.shard
            self.writer.save(self.trainer.state, *each, metrics)
            assert self.writer.background and self.writer.wait()

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {name: t.cpu() for name, t in self.model.encoder.state_dict().items()}
        return state | {"classifier": self.model.shard.weights.weight.read(0, LABELS).cpu()}

    def change(self) -> torch.Tensor:
        """Of the classifier's weights, by the whole run."""
        return self.tensors()["classifier"] - FIRST


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_trains_and_goes_on_from_its_checkpoint(
    tmp_path: Path, encoder: str, device: str
) -> None:
    """On a CPU bit for bit; a GPU may add up in another order."""
    whole = Run(tmp_path, encoder, device)
    assert whole.evaluated == [0, STEPS]
    assert whole.losses[-1] < 0.8 * whole.losses[0] and not whole.trainer.state.skipped
    resumed = Run(tmp_path, encoder, device)
    assert len(resumed.losses) == STEPS - SAVED
    assert resumed.losses == pytest.approx(whole.losses[SAVED:], rel=1e-3)
    if device == "cpu":
        wanted = whole.tensors()
        assert all(torch.equal(found, wanted[name]) for name, found in resumed.tensors().items())
    kept = {state["step"].item() for state in resumed.trainer.optimizer.state.values()}
    assert kept == {STEPS}


@pytest.mark.parametrize(
    ("autocast", "precision", "least", "most"),
    [("off", "fp32", 0.0, 1e-3), ("bf16", "fp32", 1e-5, 0.05), ("bf16", "bf16_sr", 1e-5, 0.1)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_steps_equal_those_of_a_cpu_in_fp32(
    tmp_path: Path, encoder: str, device: str, autocast: str, precision: str,
    least: float, most: float,
) -> None:  # fmt: skip
    """bf16 autocast has 8 bits; that it is on shows."""
    wanted = Run(tmp_path / "wanted", encoder, "cpu", "off", "fp32")
    found = Run(tmp_path / "found", encoder, device, autocast, precision)
    assert least <= difference(found.change(), wanted.change()) <= most
    assert found.losses == pytest.approx(wanted.losses, rel=0.05)
