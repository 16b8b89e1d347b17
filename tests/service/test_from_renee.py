"""The released code's tokens and checkpoints, in its layout, against the dense computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from renee_ray.cli.main import main
from renee_ray.config.schema import ConvertConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.model.model import build_model
from renee_ray.rank.collectives import Ranks
from renee_ray.service.convert import convert as service
from renee_ray.service.from_renee import import_run
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.evaluate import evaluate_run

from .conftest import TINY_DIM
from .test_convert_parquet import in_this_process

__all__ = ["in_this_process"]
LENGTH, BOTTLENECK = 12, 24
FLAGS = (
    f"--maxlen {LENGTH} --batch-size 8 --epochs 2 --warmup 10 --bottleneck-dims {BOTTLENECK} "
    "--fp32encoder --tf "
)


def write_memmaps(source: Path, folder: Path, encoder: str) -> Path:
    """Tokens as CreateTokenizedFiles.py leaves them, beside the labels and filters."""
    tokens = folder / f"bert-base-uncased-{LENGTH}"
    tokens.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(f"{encoder}/tokenizer.json")
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    for name, role in ("trn_X", "trn_doc"), ("tst_X", "tst_doc"), ("Y", "lbl"):
        texts = (source / f"{name}.txt").read_text().splitlines()
        encoded = tokenizer.encode_batch([text.strip() for text in texts])
        for what, values in (
            ("input_ids", [each.ids for each in encoded]),
            ("attention_mask", [each.attention_mask for each in encoded]),
        ):
            shape = (len(texts), LENGTH)
            made = np.memmap(f"{tokens}/{role}_{what}.dat", dtype="int64", mode="w+", shape=shape)
            made[:] = values
            made.flush()
    for name in ("trn_X_Y", "tst_X_Y", "trn_filter_labels", "tst_filter_labels"):
        (folder / f"{name}.txt").write_bytes((source / f"{name}.txt").read_bytes())
    return folder


def converted(source: Path, path: Path, encoder: str) -> Dataset:
    config = ConvertConfig(tokenizer=encoder, max_length=LENGTH, validation=0.1, part_rows=64)
    service.convert(str(source), str(path), config)
    return Dataset.open(str(path))


@pytest.fixture
def dataset(source: Path, tiny_encoder: str, tmp_path: Path, in_this_process: None) -> Dataset:
    """Converted from tokens alone."""
    folder = write_memmaps(source, tmp_path / "LF-Tiny", tiny_encoder)
    return converted(folder, tmp_path / "dataset", tiny_encoder)


def test_tokens_convert_as_their_texts_do(
    source: Path, tiny_encoder: str, dataset: Dataset, tmp_path: Path
) -> None:
    texts = converted(source, tmp_path / "texts", tiny_encoder)
    assert dataset.manifest.has_label_texts and not (tmp_path / "LF-Tiny" / "Y.txt").exists()
    for split in ("train", "validation", "test"):
        assert dataset.manifest.splits[split] == texts.manifest.splits[split]  # with SHA-256
    number = texts.manifest.num_labels
    ours, theirs = (each.read_rows("labels", 0, number) for each in (dataset, texts))
    for name in ("label_id", "input_ids", "train_count", "is_point"):
        assert ours[name].to_pylist() == theirs[name].to_pylist()
    assert set(ours["text"].to_pylist()) == {""}


def test_tokens_that_do_not_fit(
    source: Path, tiny_encoder: str, tmp_path: Path, in_this_process: None
) -> None:
    folder = write_memmaps(source, tmp_path / "src", tiny_encoder)
    path = next(folder.glob("*/trn_doc_input_ids.dat"))
    whole = path.read_bytes()
    path.write_bytes(whole[: -8 * LENGTH])
    with pytest.raises(ReneeError, match="same number of rows of 12"):
        converted(folder, tmp_path / "d", tiny_encoder)
    mask = path.with_name("trn_doc_attention_mask.dat")
    path.write_bytes(whole[: -8 * LENGTH])
    mask.write_bytes(mask.read_bytes()[: -8 * LENGTH])
    with pytest.raises(ReneeError, match=r"319 texts .* 320 rows"):
        converted(folder, tmp_path / "d", tiny_encoder)


def write_checkpoint(folder: Path, encoder: str, num_labels: int, ranks: int) -> dict[str, Any]:
    """The files of a run on `ranks` GPUs, and what is in them as the dense model has it."""
    folder.mkdir()
    torch.manual_seed(ranks)
    backbone = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    bottleneck = torch.randn(BOTTLENECK, TINY_DIM) / 8
    weight = torch.randn(num_labels, BOTTLENECK)
    each = -(-num_labels // ranks)
    each = 16 * -(-each // 16)
    padded = torch.cat([weight, torch.full((each * ranks - num_labels, BOTTLENECK), 9.0)])
    for rank in range(ranks):
        inner = f"embed.module.0.{'_orig_mod.' if ranks == 3 else ''}transformer."
        state = {"xfc_weight": padded[rank * each : (rank + 1) * each].clone()}
        state |= {inner + name: tensor for name, tensor in backbone.state_dict().items()}
        state["embed.module.1.transformer_weight"] = bottleneck
        torch.save(state, folder / f"renee-exp_{rank}_state_dict.pt")
    return {"backbone": backbone.double().eval(), "bottleneck": bottleneck, "weight": weight}


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_imported_checkpoint_is_the_dense_model(
    dataset: Dataset, tiny_encoder: str, tmp_path: Path, ranks: int
) -> None:
    """Each label's score of each test point, without the padded labels; --fp16xfc, too."""
    released, run = tmp_path / "released", str(tmp_path / "run")
    dense = write_checkpoint(released, tiny_encoder, dataset.manifest.num_labels, ranks)
    command = f"{FLAGS}{tiny_encoder} --data-dir LF-Tiny --fp16xfc"
    name = import_run(command, str(released), dataset.path, run, 0)
    config, checkpoint = RunDirectory(run).config(), RunDirectory(run).checkpoints().at(name)
    assert config.classifier.precision == checkpoint.state.facts["precision"] == "fp16"
    cpu = torch.device("cpu")
    model = build_model(config, dataset.manifest.num_labels, Ranks(), cpu)
    checkpoint.load_encoder(model.encoder.eval())
    checkpoint.load_shard(model.shard)
    rows = dataset.read_rows("test", 0, dataset.manifest.num_points("test")).to_pylist()
    weights = model.shard.weights.read(0, dataset.manifest.num_labels)
    assert torch.equal(weights, dense["weight"])
    with torch.no_grad():
        for row in rows[:20]:
            ids = torch.tensor([row["input_ids"]])
            found = weights.double() @ model.encoder(ids, torch.ones_like(ids))[0].double()
            torch.testing.assert_close(found, dense_scores(dense, ids), rtol=1e-5, atol=1e-5)


def dense_scores(dense: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Scores of all labels for one point of tokens [1, T], in float64."""
    hidden = dense["backbone"](input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
    return dense["weight"].double() @ (dense["bottleneck"].double() @ hidden.mean(0))


def dense_precisions(dense: dict[str, Any], dataset: Dataset) -> dict[str, float]:
    """P@k of a dataset's training points in float64, point by point."""
    rows = dataset.read_rows("train", 0, dataset.manifest.num_points("train")).to_pylist()
    hits = dict.fromkeys((1, 3, 5), 0)
    with torch.no_grad():
        for row in rows:
            scores = dense_scores(dense, torch.tensor([row["input_ids"]]))
            scores[row["filter_labels"]] = -torch.inf
            best = scores.argsort(descending=True).tolist()
            for k in hits:
                hits[k] += len(set(best[:k]) & set(row["labels"]))
    return {f"P@{k}": 100 * number / (k * len(rows)) for k, number in hits.items()}


@pytest.mark.slow
def test_an_imported_checkpoint_evaluates_as_the_dense_model(
    dataset: Dataset, tiny_encoder: str, tmp_path: Path, local_ray: None
) -> None:
    released, ranks = tmp_path / "released", 2
    dense = write_checkpoint(released, tiny_encoder, dataset.manifest.num_labels, ranks)
    command, run = f"{FLAGS}{tiny_encoder} --data-dir LF-Tiny", str(tmp_path / "run")
    arguments = ["from-renee", command, "--checkpoint", str(released), f"output={run}"]
    assert main([*arguments, f"data={dataset.path}"]) == 0
    score = ScoreConfig(num_workers=1, split="train")  # of the few test points, it may hit none
    found = evaluate_run(run, dataset.path, score)["metrics"]
    wanted = dense_precisions(dense, dataset)
    assert wanted["P@5"] > 0 and {key: found[key] for key in wanted} == pytest.approx(wanted)
    checkpoint = RunDirectory(run).checkpoint("last")
    checkpoint.verify()
    assert checkpoint.state.step == 0 and RunDirectory(run).config().num_workers == ranks
    with pytest.raises(ReneeError, match="is a run already"):
        import_run(command, str(released), dataset.path, run, 0)


def test_checkpoints_that_do_not_fit(dataset: Dataset, tiny_encoder: str, tmp_path: Path) -> None:
    released, number = tmp_path / "released", dataset.manifest.num_labels
    write_checkpoint(released, tiny_encoder, number, 2)
    command = f"{FLAGS}{tiny_encoder}"

    def refused(sentence: str, flags: str = "") -> None:
        with pytest.raises(ReneeError, match=sentence):
            import_run(command + flags, str(released), dataset.path, str(tmp_path / "run"), 0)
        assert not (tmp_path / "run").exists()

    refused(rf"xfc_weight of \[400, 24\] .* are \[400, {TINY_DIM}\]", " --bottleneck-dims 0")
    first = released / "renee-exp_0_state_dict.pt"
    state = torch.load(first, weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.endswith("query.weight")}, first)
    refused("lacks 1 tensors of this encoder.*query.weight")
    first.write_bytes(b"no checkpoint")
    refused("not a plain state_dict")
    first.unlink()
    refused("from rank 0 on")
