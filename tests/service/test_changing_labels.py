"""Labels that are added to a run, retired, and trained on: each revision whole, none in between."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import renee_ray
from renee_ray.checkpoint import registry
from renee_ray.checkpoint.state import Checkpoint, State
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.config.score import ExportConfig, ScoreConfig
from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset, Extended
from renee_ray.errors import ReneeError
from renee_ray.model.cold_start import GAIN, SHARE, ColdStart
from renee_ray.model.encoder import adamw
from renee_ray.model.model import build_model
from renee_ray.rank.collectives import Ranks
from renee_ray.service.labels import add_labels, list_labels, retire_labels
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.labels import hidden_labels, labels_of
from renee_ray.service.score.job import ScoringJob
from renee_ray.service.score.predictions import label_texts
from renee_ray.service.train.resuming import identity, start_of
from renee_ray.service.train.train import train
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import STORAGES, Weights

from ..data.tiny import write_tiny
from ..pairwise import pairwise
from ..training.gloo import on_ranks

CPU = torch.device("cpu")
NAME = EncoderConfig().name
LABELS, DIM = 63, 8
NEW = ["perl module for lamps", "garden tools", "xml"]


def quiet(text: str) -> None:
    """Stands for the terminal."""


def dataset_at(path: Path, more: list[str]) -> Dataset:
    """A tiny dataset of MiniLM's vocabulary, whose last labels have the texts `more`."""
    sizes = (40, LABELS - 40, *[len(more)] * bool(more))
    made = write_tiny(path, train=(300,), labels=sizes, vocabulary=1000)
    manifest, parts = made.manifest, [*made.manifest.splits["labels"]]
    if more:
        table = made.read_part(parts[-1])
        table = table.set_column(1, "text", [more])
        parts[-1] = layout.write_part(str(path), parts[-1].path, LABELS, table)
    splits = {**manifest.splits, "labels": tuple(parts)}
    hashed = tokenizer.load(NAME).hash
    manifest = replace(manifest, tokenizer=NAME, vocabulary_hash=hashed, splits=splits)
    texts = Dataset(str(path), manifest).read_rows("labels", 0, manifest.num_labels)["text"]
    known = layout.hash_labels(0, texts)
    layout.write_manifest(str(path), replace(manifest, labels_hash=known))
    return Dataset.open(str(path))


def bag_config(data: str, output: str, precision: str = "fp32") -> RunConfig:
    bag = {"name": "none", "max_length": 9, "bag": {"dim": DIM, "buckets": 64}}
    settings = {"num_workers": 2, "epochs": 1, "batch_size": 16, "encoder": bag}
    places = {"data": data, "output": output, "classifier": {"precision": precision}}
    return RunConfig.model_validate(settings | places)


def run_at(path: Path, precision: str = "fp32") -> RunDirectory:
    """A run with one checkpoint, without a training."""
    dataset = dataset_at(path / "set", [])
    config = bag_config(dataset.path, str(path / "run"), precision)
    directory = RunDirectory(config.output)
    save_checkpoint(directory, config, LABELS, precision)
    directory.write(RUN_FILE, {"config": config.model_dump(), "dataset": identity(dataset)})
    return directory


def save_checkpoint(
    directory: RunDirectory,
    config: RunConfig,
    num_labels: int,
    precision: str = "fp32",
    step: int = 7,
    metric: float = 1.0,
) -> None:
    """Writes a checkpoint of a bag with random rows of labels."""
    model = build_model(config, num_labels, Ranks(), CPU)
    assert model.encoder.bag is not None and model.shard.weights.velocity is not None
    model.encoder.bag.idf.fill_(1)
    generator = torch.Generator().manual_seed(0)
    model.shard.write(0, torch.randn(num_labels, DIM, generator=generator))
    model.shard.weights.velocity.write(0, num_labels, torch.ones(num_labels, DIM))
    facts = {"num_labels": num_labels, "dim": DIM, "precision": precision, "tokenizer": NAME}
    writer = CheckpointWriter(directory.checkpoints(), Ranks(), 2, "P@1").start()
    optimizer = adamw(model.encoder, config.encoder)
    state = State(step=step, facts=facts)
    writer.save(state, model.encoder, optimizer, model.shard, {"P@1": metric})
    assert writer.wait()


def new_at(path: Path, lines: list[str] = NEW) -> str:
    (path / "new.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(path / "new.txt")


def hashes(run: RunDirectory) -> dict[str, str]:
    files = [each for each in Path(run.path, "checkpoints").rglob("*") if each.is_file()]
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def rows_of(checkpoint: Checkpoint, num_labels: int, num_ranks: int) -> dict[str, torch.Tensor]:
    """All tensors of the classifier, as so many ranks read them."""
    found: dict[str, list[torch.Tensor]] = {}
    for rank in range(num_ranks):
        owned = LabelRange.of_rank(num_labels, num_ranks, rank)
        weights = Weights(checkpoint.state.facts["precision"], len(owned), DIM, True, CPU)
        checkpoint.load_shard(Shard(owned, weights))
        for name, tensor in weights.tensors().items():
            found.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in found.items()}


@pytest.mark.parametrize(("precision", "num_ranks"), pairwise(STORAGES, [1, 3]))
def test_a_revision_adds_one_file_and_is_read_by_range(
    tmp_path: Path, precision: str, num_ranks: int
) -> None:
    run = run_at(tmp_path, precision)
    before, files = run.checkpoint("best"), hashes(run)
    old = rows_of(before, LABELS, 1)
    found = add_labels(run.path, new_at(tmp_path), quiet)
    assert (found["first"], found["labels"]) == (LABELS, len(NEW))
    after = run.checkpoint("best")
    assert after.name == f"{before.name}@1" == run.checkpoint("last").name
    after.verify()
    assert files.items() <= hashes(run).items(), "a file of the revision before has changed"
    added = hashes(run).keys() - files.keys()
    assert added == {
        "manifest-0001.json",
        f"classifier-{LABELS:012d}-{LABELS + 3:012d}.safetensors",
    }
    rows = rows_of(after, LABELS + len(NEW), num_ranks)
    for name, tensor in rows.items():
        assert torch.equal(tensor[:LABELS], old[name])
        assert not name.startswith("momentum") or not tensor[LABELS:].any()
    assert rows["weight" if "weight" in rows else next(iter(rows))][LABELS:].float().any()
    assert after.added(LABELS) == [(text, text) for text in NEW]


def test_rows_follow_the_texts() -> None:
    """A linear map of planted labels, with means by frequency, is found again by other texts."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(3000, 12, generator=generator)
    counts = torch.randint(0, 3, (3000,), generator=generator)
    planted = torch.randn(12, 12, generator=generator)
    unit = texts / texts.norm(dim=1, keepdim=True)
    rows = 2 * unit @ planted - counts[:, None]
    rows += 0.05 * torch.randn(3000, 12, generator=generator)
    rows[counts == 0] = 1e3  # never trained
    fit = ColdStart.fit(texts[:2500], rows[:2500], counts[:2500])
    wanted = (2 * GAIN * unit @ planted - 1)[2500:]
    found = fit.rows(texts[2500:])
    assert (found - wanted).norm() < 0.15 * wanted.norm(), "but for the mean of a class' texts"
    assert (found - 2 * (unit @ planted)[2500:] + 1).norm() > 0.4 * wanted.norm()
    assert fit.figures["cosine"] > 0.98 and fit.figures["recall@10"] > 95
    assert fit.figures["points"] == 1
    points = torch.randn(1000, 12, generator=generator)
    points[:, 0] = 20  # which makes the same score for all points possible
    best = (points @ rows[:2500][counts[:2500] > 0].T).amax(dim=1) + 30
    raised = fit.raised(points, best)
    first = (points @ raised.rows(fit.held).T).amax(dim=1) > best
    share = SHARE * len(fit.held) / (len(fit.held) + fit.figures["fitted"])
    assert 0 < first.float().mean() < 2 * share
    assert not ((points @ fit.rows(fit.held).T).amax(dim=1) > best).any()
    wrong = ColdStart.fit(texts[:2500].roll(1, 0), rows[:2500], counts[:2500])
    assert wrong.figures["cosine"] < 0.3
    with pytest.raises(ReneeError, match="only 12 labels"):
        ColdStart.fit(texts[:12], rows[:12], torch.ones(12))


def _killed(ranks: Ranks, path: str, new: str, publishes: bool) -> None:
    """Adds labels until it is killed: in the middle of the new file, or before the manifest."""
    written = registry.write

    def die(*arguments: Any, **more: Any) -> None:
        if not publishes:
            arguments[0].write(b"half")
            arguments[0].flush()
        os.kill(os.getpid(), signal.SIGKILL)

    registry.write = written if publishes else die  # type: ignore[assignment]
    registry.replace_on = die
    add_labels(path, new, quiet)


@pytest.mark.parametrize("publishes", [False, True])
def test_killed_midway_the_old_revision_is_whole(tmp_path: Path, publishes: bool) -> None:
    run, new = run_at(tmp_path), new_at(tmp_path)
    with pytest.raises(Exception, match="SIGKILL"):
        on_ranks(1, _killed, run.path, new, publishes)
    newest = run.checkpoint("best")
    newest.verify()
    assert newest.revision == 0
    assert sum(1 for _ in list_labels(run.path)) == LABELS
    add_labels(run.path, new_at(tmp_path, NEW[:2]), quiet)
    run.checkpoint("best").verify()
    assert [each["text"] for each in list_labels(run.path)][LABELS:] == NEW[:2]


def test_hidden_labels_are_nowhere_and_ids_stay(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    whole = renee_ray.load(run.path).predict(["perl lamps"], k=LABELS)[0]
    gone = [each.id for each in whole[:5]]
    (tmp_path / "gone.txt").write_text(f"{gone[1]}\n\nlabel {gone[2]}\n")
    retire_labels(run.path, (str(gone[0]), f"label {gone[3]}"), "", quiet, restore=False)
    retire_labels(run.path, (), str(tmp_path / "gone.txt"), quiet, restore=False)
    retire_labels(run.path, (str(gone[3]),), "", quiet, restore=True)
    add_labels(run.path, new_at(tmp_path), quiet)
    states = [each["state"] for each in list_labels(run.path)]
    assert [i for i, state in enumerate(states) if state == "retired"] == sorted(gone[:3])
    model = renee_ray.load(run.path)
    renee_ray.export(run.path, str(tmp_path / "export"), ExportConfig())
    exported = renee_ray.load(str(tmp_path / "export"))
    assert json.loads((tmp_path / "export" / "export.json").read_text())["retired"] == sorted(
        gone[:3]
    )
    for loaded in (model, exported):
        (found,) = loaded.predict(["perl lamps"], k=999)
        assert {each.id for each in found} == set(range(LABELS + 3)) - set(gone[:3])
        old = [each for each in found if each.id < LABELS]
        assert [each[:2] for each in old] == [each[:2] for each in whole if each.id not in gone[:3]]
        assert {each.text for each in found if each.id >= LABELS} == set(NEW)
        assert len(loaded.predict(["perl lamps"], k=4)[0]) == 4
        with pytest.raises(ReneeError, match="k=0 asks for no label"):
            loaded.predict(["perl lamps"], k=0)


def test_lists_allow_and_deny(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    add_labels(run.path, new_at(tmp_path), quiet)
    retire_labels(run.path, ("5", "xml"), "", quiet, restore=False)
    checkpoint = run.checkpoint("best")
    labels = labels_of(run, run.dataset(), checkpoint)
    assert isinstance(labels, Extended)

    def hidden(**files: str) -> set[int]:
        paths = {}
        for name, content in files.items():
            (tmp_path / name).write_text(content)
            paths[name] = str(tmp_path / name)
        found = hidden_labels(labels, checkpoint, **paths)
        assert found is not None
        return set(np.flatnonzero(found).tolist())

    texts = label_texts(labels, np.array([LABELS + 1, 7, LABELS, 50, 7]))
    assert texts.to_pylist() == [NEW[1], "label 7", NEW[0], "label 50", "label 7"]
    everything = set(range(LABELS + 3))
    assert hidden() == {5, LABELS + 2}
    assert hidden(deny="7\nlabel 9\ngarden tools\n") == {5, LABELS + 2, 7, 9, LABELS + 1}
    assert hidden(allow="7\nlabel 5\nlabel 9") == everything - {7, 9}
    assert hidden(allow="7\n9", deny="9") == everything - {7}
    with pytest.raises(ReneeError, match=r"deny:2: the run has no label 'label x'"):
        hidden(deny="7\nlabel x\n")
    with pytest.raises(ReneeError, match=r"deny:1: the run has no label '66'"):
        hidden(deny="66")
    again = retire_labels(run.path, ("5",), "", quiet, restore=False)
    assert again["checkpoint"] == checkpoint.name, "index and calibration stay valid"


def test_a_dataset_with_the_added_labels_knows_their_names(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    (tmp_path / "new.csv").write_text("label,text\nL2,garden tools\n")
    add_labels(run.path, str(tmp_path / "new.csv"), quiet)
    both = dataset_at(tmp_path / "both", ["garden tools"])
    (tmp_path / "deny.txt").write_text("L2\n")
    job = ScoringJob.checked(run, both, ScoreConfig(deny=str(tmp_path / "deny.txt")))
    assert job.hidden is not None and np.flatnonzero(job.hidden).tolist() == [LABELS]


def test_names_that_could_be_misread(tmp_path: Path) -> None:
    """Digits are an id, if no label has that name; a name may hold what ends lines elsewhere."""
    run = run_at(tmp_path)
    for name, content in (
        ("numbers.jsonl", '{"label": 7}\n{"label": 2024}\n'),
        ("texts.jsonl", '{"label": "a\\u2028b"}\n'),
    ):
        (tmp_path / name).write_text(content)
        add_labels(run.path, str(tmp_path / name), quiet)
    with pytest.raises(ReneeError, match=r"7 is the id of one label .*; write id:7 or id:63"):
        retire_labels(run.path, ("7",), "", quiet, restore=False)
    (tmp_path / "gone.txt").write_text("a\u2028b\r\n2024\n", encoding="utf-8", newline="")
    retire_labels(run.path, ("id:7",), str(tmp_path / "gone.txt"), quiet, restore=False)
    assert run.checkpoint("best").state.retired.tolist() == [7, LABELS + 1, LABELS + 2]


def test_long_names_that_begin_alike_are_all_retired(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    names = [f"{'the collected works ' * 6}, volume {i}" for i in (1, 2)]
    add_labels(run.path, new_at(tmp_path, names), quiet)
    assert retire_labels(run.path, tuple(names), "", quiet, restore=False)["labels"] == 2
    assert run.checkpoint("best").state.retired.tolist() == [LABELS, LABELS + 1]


def test_new_labels_do_not_compete_with_retired_ones(tmp_path: Path) -> None:
    """The constant of new rows is chosen against the best label that anybody sees."""
    constants = []
    for name in ("all", "fewer"):
        run = run_at(tmp_path / name)
        if name == "fewer":
            gone = tuple(map(str, range(LABELS // 2)))
            retire_labels(run.path, gone, "", quiet, restore=False)
        add_labels(run.path, new_at(tmp_path), quiet)
        weight = rows_of(run.checkpoint("best"), LABELS + len(NEW), 1)["weight"]
        constants.append(weight[LABELS:].norm())
    assert constants[1] < constants[0]


def test_labels_can_be_replaced_by_others_altogether(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    retire_labels(run.path, tuple(map(str, range(LABELS))), "", quiet, restore=False)
    add_labels(run.path, new_at(tmp_path), quiet)
    weight = rows_of(run.checkpoint("best"), LABELS + len(NEW), 1)["weight"]
    assert weight.isfinite().all()


def test_labels_of_a_run_stay_while_it_would_lose_steps(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    save_checkpoint(run, run.config(), LABELS, step=9, metric=0.5)
    status = {"format_version": 1, "time_s": 0.0, "state": "stopped"}
    run.write("status.json", status)
    with pytest.raises(ReneeError, match=r"come to step 9 and is not finished; .* of step 7"):
        retire_labels(run.path, ("3",), "", quiet, restore=False)
    run.write("status.json", status | {"state": "finished"})
    retire_labels(run.path, ("3",), "", quiet, restore=False)
    last = run.checkpoint("last")
    assert (last.state.step, last.revision) == (7, 1)
    assert last.manifest.metrics == {}, "a later one, without the label, could not be the best"


def test_an_older_revision_does_not_stand_in_for_a_damaged_one(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    before = hashes(run)
    add_labels(run.path, new_at(tmp_path), quiet)
    (added,) = (name for name in hashes(run).keys() - before if "manifest" not in name)
    (lost,) = Path(run.path, "checkpoints").rglob(added)
    lost.unlink()
    for which in ("best", "last"):
        with pytest.raises(ReneeError, match=added):
            run.checkpoint(which)


def test_the_adjustment_counts_the_points_that_were_trained_on(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    other = dataset_at(tmp_path / "other", [])
    other = Dataset(other.path, replace(other.manifest, statistics={"other": 1}))
    for tail, counted in ((0.0, other.path), (0.3, run.config().data)):
        job = ScoringJob.checked(run, other, ScoreConfig(tail=tail))
        assert (job.counted.path, job.labels.path) == (counted, other.path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "new.txt",
            "a\nlabel 7\n",
            r"new.txt:2 has the label 'label 7', which is the run's label 7",
        ),
        ("new.txt", "a\nb\na\n", r"new.txt:3 has the label 'a' of .*new.txt:1 again"),
        ("new.csv", "label,text\na,lamps\n ,tools\n", r"new.csv:2 has a label without a name"),
        ("new.jsonl", '{"name": "a"}\n', r"rename the one with the labels"),
        ("new.txt", "", r"no label"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, name: str, content: str, problem: str) -> None:
    run = run_at(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ReneeError, match=problem):
        add_labels(run.path, str(tmp_path / name), quiet)
    assert run.checkpoint("best").revision == 0


def test_names_and_texts_of_a_table(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    (tmp_path / "new.csv").write_text("label,text\nL1,lamps\nL2,garden tools\n")
    add_labels(run.path, str(tmp_path / "new.csv"), quiet)
    retire_labels(run.path, ("L2",), "", quiet, restore=False)
    assert [tuple(each.values()) for each in list_labels(run.path)][LABELS:] == [
        (LABELS, "active", 0, "lamps"),
        (LABELS + 1, "retired", 0, "garden tools"),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_training_goes_on_with_the_new_labels(tmp_path: Path) -> None:
    """With learning rates of 0 every row is what the revision has."""
    run = run_at(tmp_path)
    add_labels(run.path, new_at(tmp_path), quiet)
    retire_labels(run.path, ("4",), "", quiet, restore=False)
    wanted = rows_of(run.checkpoint("best"), LABELS + 3, 1)["weight"]
    both, lacking = dataset_at(tmp_path / "both", NEW), run.dataset()
    other = dataset_at(tmp_path / "other", [*NEW[:2], "html"])
    settings = run.config().model_dump() | {"output": str(tmp_path / "next"), "start": run.path}
    settings["num_workers"] = 1  # of others: test_a_revision_adds_one_file_and_is_read_by_range
    settings["classifier"]["learning_rate"] = settings["encoder"]["bag"]["learning_rate"] = 0
    config = RunConfig.model_validate(settings | {"data": both.path})
    with pytest.raises(ReneeError, match="lacks labels that were added"):
        start_of(config, lacking, None)
    with pytest.raises(ReneeError, match="has other labels"):
        start_of(config, other, None)
    with pytest.raises(ReneeError, match=f"has {LABELS + 3} labels"):
        start_of(run.config(), lacking, run.checkpoint("best"))
    assert train(config)["step"] == 19
    after = RunDirectory(config.output).checkpoint("last")
    assert torch.equal(rows_of(after, LABELS + 3, 2)["weight"], wanted)
    assert after.state.retired.tolist() == [4] and after.revision == 0
    assert [each["state"] for each in list_labels(config.output)][4] == "retired"
    assert len(renee_ray.load(config.output).predict(["xml"], k=99)[0]) == LABELS + 2
