"""An export is a directory of sentence_transformers, and has a model export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer

from renee_ray.config.schema import BagConfig, EncoderConfig, RunConfig
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import write_file
from renee_ray.model.encoder import build_encoder
from renee_ray.rank.batch import padded_tokens, ragged
from renee_ray.service.score import export

from ..data.tiny import write_tiny

CPU = torch.device("cpu")
LENGTH = 12
TEXTS = [
    "",
    "libjson perl",
    "a text of more tokens than the encoder is asked to read: " + "perl " * 9,
]
ENCODERS: list[dict[str, Any]] = [
    {},
    {"pooling": "cls", "prompt": "query:", "normalise": True, "scale": 3.0},
    {"pooling": "last", "bottleneck": 7, "bag": BagConfig(dim=5, buckets=11), "normalise": True},
]


def test_a_tokenizer_without_padding_is_exported_as_it_is(tmp_path: Path) -> None:
    """Its class makes another normaliser of it, and sentence_transformers needs a padding token."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    steps = [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    made.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator(TEXTS, trainer)
    model, exported = tmp_path / "model", tmp_path / "exported"
    model.mkdir()
    made.save(str(model / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    described = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **special}
    write_file(str(model / "tokenizer_config.json"), json.dumps(described).encode())
    manifest = replace(write_tiny(tmp_path / "set").manifest, tokenizer=str(model))
    own = tokenizer.load(str(model)).serialised
    export.save_tokenizer(exported, manifest, own)
    found = tokenizer.load(str(exported)).serialised
    for text in (" perl", "a  perl text", *TEXTS):
        assert tokenizer.encode(found, [text], 64) == tokenizer.encode(own, [text], 64)
    rows = AutoTokenizer.from_pretrained(exported)(["perl", "a text"], padding=True)["input_ids"]
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("settings", ENCODERS)
def test_other_libraries_embed_as_the_transformer_here(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """With pooling, prompt, cut and normalisation."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    config = EncoderConfig(max_length=LENGTH, autocast="off", **settings)
    encoder = build_encoder(config, CPU, 0).eval()
    encoder.constant += 1.5
    made = write_tiny(tmp_path / "set")
    facts = {"tokenizer": config.name, "vocabulary_hash": tokenizer.load(config.name).hash}
    dataset = Dataset(made.path, replace(made.manifest, **facts))
    export._save_encoder(tmp_path, encoder, config, dataset)
    length = LENGTH if encoder.prompt is None else encoder.prompt.limit
    for name, content in export.sentence_transformers_files(encoder, config, length).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_file(str(tmp_path / name), content)
        assert export.FILES.fullmatch(name)
    vocabulary, most = tokenizer.load(config.name).serialised, 100 if encoder.prompt else LENGTH
    ids = padded_tokens(ragged(tokenizer.encode(vocabulary, TEXTS, most)), 0, CPU)
    with torch.inference_mode():
        expected = (encoder(*ids) - encoder.constant) / config.scale
        if config.bottleneck:
            expected = encoder.pooled(*ids)
    found = SentenceTransformer(str(tmp_path)).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    if not settings:
        model, tokens = (
            k.from_pretrained(tmp_path / "encoder") for k in (AutoModel, AutoTokenizer)
        )
        with torch.inference_mode():
            for text, row in zip(TEXTS, expected, strict=True):
                inputs = tokens(text, truncation=True, max_length=LENGTH, return_tensors="pt")
                hidden = model(**inputs).last_hidden_state[0]
                np.testing.assert_allclose(hidden.mean(0), row, atol=2e-5)


@pytest.mark.parametrize("settings", [*ENCODERS, {"name": "none", "bag": BagConfig(dim=4)}])
def test_the_card_tells_of_the_run_and_of_no_machine(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    dataset = write_tiny(tmp_path / "set")
    weights = {"weights": str(tmp_path)} if "prompt" in settings else {}
    encoder = EncoderConfig(max_length=LENGTH, **weights, **settings)
    paths = {"data": str(tmp_path / "set"), "output": str(tmp_path / "run")}
    config = RunConfig(**paths, epochs=3, encoder=encoder)

    text = export.model_card(config, dataset, 17, {"P@1": 41.25})
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "text-classification"
    assert front.get("base_model") == (None if "name" in settings else EncoderConfig().name)
    assert str(tmp_path) not in text
    for word in ("epochs: 3", "| P@1 | 41.25 |", f"{dataset.manifest.num_labels:,} labels"):
        assert word in text
    assert ("SentenceTransformer" in text) is ("name" not in settings)
