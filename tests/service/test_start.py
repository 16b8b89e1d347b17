"""A run that begins from another's best checkpoint: the same model, and all n-grams weighed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from renee_ray.checkpoint.state import State
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.config.overrides import keys_of, make_config, parse_overrides
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import adamw
from renee_ray.model.model import Model, build_model
from renee_ray.rank.collectives import Ranks
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.train.resuming import MODEL, start_of
from renee_ray.service.train.train import train

from .test_changing_labels import CPU, LABELS, NAME, dataset_at, run_at

OTHERS = (
    "encoder.max_length=12", "encoder.prompt='query: '", "encoder.pooling=cls",
    "encoder.bottleneck=4", "encoder.normalise=true", "encoder.scale=2", "encoder.lora.rank=8",
    "encoder.lora.alpha=4", "encoder.lora.targets=[query]", "encoder.bag.dim=16",
    "encoder.bag.ngrams=3", "encoder.bag.buckets=128", "encoder.bag.norm=5",
    "classifier.objective=softmax",
)  # fmt: skip
FREE = """
    encoder.name encoder.weights encoder.dropout encoder.internal_dropout encoder.attention
    encoder.autocast encoder.compile encoder.micro_batch encoder.gradient_checkpointing
    encoder.learning_rate encoder.weight_decay encoder.clip_norm encoder.gradient
    encoder.lora.dropout encoder.bag.learning_rate encoder.bag.decay encoder.bag.dropout
    classifier.precision classifier.init classifier.init_std classifier.init_scale
    classifier.init_centroid classifier.init_constant classifier.learning_rate classifier.momentum
    classifier.weight_decay classifier.chunk
"""
"""Keys that a run may have otherwise than the one that it begins from, or that are compared by the
checkpoint's tensors and facts."""


@pytest.fixture
def first(tmp_path: Path) -> RunDirectory:
    """A run of a transformer with adapters and a bag; its checkpoint is not loaded."""
    run = run_at(tmp_path)
    saved = run.read(RUN_FILE) or {}
    saved["config"]["encoder"] |= {"name": NAME, "lora": {"rank": 4}}
    run.write(RUN_FILE, saved)
    return run


def config_of(run: RunDirectory, *overrides: str) -> RunConfig:
    given = parse_overrides([f"output={run.path}-next", f"start={run.path}", *overrides])
    return make_config(RunConfig, run.config().model_dump(), given)


def test_every_setting_of_the_model_is_compared_or_free() -> None:
    keys = [key for key, *_ in keys_of(RunConfig) if key.startswith(("encoder.", "classifier."))]
    assert sorted(keys) == sorted([*MODEL, *FREE.split()])
    assert [each.partition("=")[0] for each in OTHERS] == list(MODEL[1:])


def test_another_model_is_refused(first: RunDirectory) -> None:
    dataset = first.dataset()
    name = first.checkpoint("best").name
    for other in OTHERS:
        key, _, value = other.partition("=")
        with pytest.raises(ReneeError) as error:
            start_of(config_of(first, other), dataset, None)
        sentence = str(error.value)
        assert sentence.startswith(f"{key}=") and f"; give {key}=" in sentence
        assert first.path in sentence and value.strip("'[]").lower() in sentence.lower()
        remedy = sentence.partition("; give ")[2].rpartition(", or")[0]
        assert start_of(config_of(first, other, remedy), dataset, None) == name
    frozen = "encoder.frozen=true", "encoder.lora.rank=0"
    with pytest.raises(ReneeError, match=r"^encoder\.frozen=True, .* was trained with False"):
        start_of(config_of(first, *frozen), dataset, None)


def test_how_it_is_trained_may_differ(first: RunDirectory) -> None:
    free = config_of(
        first, "encoder.learning_rate=0", "encoder.dropout=0.2", "encoder.internal_dropout=0.1",
        "encoder.lora.dropout=0.1", "encoder.gradient_checkpointing=true", "encoder.compile=true",
        "encoder.bag.decay=0.9", "encoder.bag.dropout=0.1", "classifier.learning_rate=1",
        "classifier.precision=auto", "threads=1", "epochs=3", "feed.augment=0.5",
    )  # fmt: skip
    assert start_of(free, first.dataset(), None) == first.checkpoint("best").name
    saved = first.read(RUN_FILE) or {}
    saved["config"]["encoder"]["bag"]["dim"] = 0
    first.write(RUN_FILE, saved)
    idle = config_of(first, "encoder.bag.ngrams=3")
    assert start_of(idle, first.dataset(), None), "without a bag its keys have no effect"


def loaded(run: RunDirectory, which: str, num_labels: int) -> Model:
    model, checkpoint = build_model(run.config(), num_labels, Ranks(), CPU), run.checkpoint(which)
    checkpoint.load_encoder(model.encoder)
    checkpoint.load_shard(model.shard)
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ngrams_that_the_first_run_lacked_are_weighed(tmp_path: Path) -> None:
    """In the first run every second bucket has no n-gram."""
    run = run_at(tmp_path)
    model, state = loaded(run, "best", LABELS), run.checkpoint("best").state
    assert model.encoder.bag is not None
    model.encoder.bag.idf[::2] = 0
    writer = CheckpointWriter(run.checkpoints(), Ranks(), 2, "P@1").start()
    optimizer = adamw(model.encoder, run.config().encoder)
    writer.save(State(step=9, facts=state.facts), model.encoder, optimizer, model.shard,
                {"P@1": 2.0})  # fmt: skip
    assert writer.wait()
    data = dataset_at(tmp_path / "second", [])
    config = config_of(run, f"data={data.path}", "num_workers=2", "average=0.5")
    train(config)
    after = loaded(RunDirectory(config.output), "last", LABELS).encoder.bag
    assert after is not None
    assert torch.equal(after.idf[1::2], torch.ones(32))
    assert (after.idf[::2] > 0).all() and len(after.idf[::2].unique()) > 8
    assert not torch.equal(after.table[::2], model.encoder.bag.table[::2])
