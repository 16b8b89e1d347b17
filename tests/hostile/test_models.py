"""Hostile models and tokenizers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from renee_ray.config.schema import EncoderConfig
from renee_ray.data import tokenizer
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import build_encoder

from .place import Canary, Case, Made, Place, refused

CPU = torch.device("cpu")


def model(name: str = "model", **files: Any) -> Callable[[Place], Path]:
    """A directory with these files: JSON, or text."""

    def make(place: Place) -> Path:
        path = place.given / name
        path.mkdir(exist_ok=True)
        for file, content in files.items():
            written = content if isinstance(content, str) else json.dumps(content)
            (path / file.replace("__", ".")).write_text(written)
        return path

    return make


def code(place: Place) -> str:
    """A module of a model that shows that it was imported."""
    return f"import os\nos.system({place.command()!r})\nclass X: pass\n"


AUTO_MAP = {name: "code.X" for name in ("AutoConfig", "AutoModel")}
BERT = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "vocab_size": 20, "max_position_embeddings": 16,
}  # fmt: skip


def converted(**files: Any) -> Callable[[Place], Made]:
    """A conversion with the tokenizer of a model of these files, and code beside them."""

    def make(place: Place) -> Made:
        path = model(**files, code__py=code(place))(place)
        source = place.given / "source"
        source.mkdir()
        (source / "trn_X.txt").write_text("a\n")
        (source / "trn_X_Y.txt").write_text("0:1\n")
        return ["convert", str(source), str(place.given / "dst"), f"tokenizer={path}"]

    return make


def encoder(save: bool = False, **files: Any) -> Callable[[Place], Made]:
    """An encoder of these files, to be built. save: with the weights of BERT."""

    def make(place: Place) -> Made:
        path = place.given / "model"
        if save:
            from transformers import BertConfig, BertModel

            settings = {k: v for k, v in BERT.items() if k != "model_type"}
            BertModel(BertConfig(**settings)).save_pretrained(path)
        path = model(**files, code__py=code(place))(place)
        return lambda: build_encoder(EncoderConfig(name=str(path)), CPU, 0)

    return make


def pickled(place: Place) -> Made:
    path = model(config__json=BERT)(place)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(place.command())))
    return lambda: build_encoder(EncoderConfig(name=str(path)), CPU, 0)


def weights(place: Place) -> Made:
    build = encoder(save=True)(place)
    assert not isinstance(build, list)
    file = place.given / "weights.bin"
    torch.save({"a": Canary(place.command())}, file)
    path = str(place.given / "model")
    return lambda: build_encoder(EncoderConfig(name=path, weights=str(file)), CPU, 0)


def named(name: str) -> Callable[[Place], Made]:
    return lambda place: partial(tokenizer.load, name)


CASES = [
    Case(
        "tokenizer-with-code",
        converted(
            tokenizer_config__json={
                "tokenizer_class": "X",
                "auto_map": {"AutoTokenizer": ["code.X", "code.X"]},
            }
        ),
        "no fast tokenizer can be loaded",
    ),
    Case(
        "tokenizer-nested",
        converted(tokenizer__json="[" * 10**5),
        "no fast tokenizer can be loaded",
    ),
    Case(
        "tokenizer-settings-nested",
        converted(tokenizer_config__json="[" * 10**5),
        "no fast tokenizer can be loaded",
    ),
    Case(
        "encoder-with-code",
        encoder(config__json={"model_type": "x", "auto_map": AUTO_MAP}),
        "encoder.name=.* cannot be loaded",
    ),
    Case("encoder-pickled", pickled, "encoder.name=.* cannot be loaded"),
    Case("encoder-weights-pickled", weights, "is not a plain state_dict"),
    Case(
        "encoder-adapter",
        encoder(config__json=BERT, adapter_config__json={"base_model_name_or_path": "x/y"}),
        "holds an adapter",
    ),
    Case(
        "encoder-quantised",
        encoder(config__json={**BERT, "quantization_config": {"quant_method": "x"}}),
        "is quantised",
    ),
    Case(
        "encoder-header-lies",
        encoder(config__json=BERT, model__safetensors="\x7f" * 4096),
        "cannot be loaded",
    ),
    Case("name-that-climbs", named("../../outside/none"), "is neither a directory nor"),
    Case("name-long", named("x" * 10**5), "is neither a directory nor"),
    Case("name-unprintable", named("a\0b"), "is neither a directory nor"),
    Case(
        "name-given-by-a-dataset",
        lambda place: partial(tokenizer.load, "no/where", fetch=False),
        "nor in the hub's cache$",
    ),
]


def test_code_beside_a_known_model_is_left_alone(place: Place) -> None:
    build = encoder(save=True, config__json={**BERT, "auto_map": AUTO_MAP})(place)
    assert not isinstance(build, list)
    build()


def test_a_token_outside_the_vocabulary_is_one_sentence(place: Place) -> None:
    build = encoder(save=True)(place)
    assert not isinstance(build, list)
    built: Any = build()
    ids = torch.full((1, 2), BERT["vocab_size"], dtype=torch.int64)
    with pytest.raises(ReneeError, match="token ids up to 20 and the encoder knows 20 tokens"):
        built(ids, torch.ones_like(ids))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)
