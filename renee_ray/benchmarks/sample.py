"""A random encoder and dataset, for benchmarks where nothing can be fetched.

Points have 5 to 18 tokens, if nothing else is said, and 1 to 9 labels, as in the LF-AmazonTitles
datasets; labels have no texts. What is learned from them means nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tokenizers import Tokenizer, models

from renee_ray.data import dataset as layout
from renee_ray.data.models import quiet
from renee_ray.data.storage import make_directory
from renee_ray.data.tokenizer import load

PART_ROWS, VOCABULARY, MOST_LABELS = 16384, 30522, 9


def write_sample(
    directory: str, labels: int, points: int, dim: int, layers: int, longest: int = 18
) -> None:
    """Writes directory/encoder, a BERT, and directory/data; the same for the same sizes."""
    encoder, data = f"{directory}/encoder", f"{directory}/data"
    _write_encoder(encoder, dim, layers)
    rows = _points(points, labels, longest)
    splits: dict[str, tuple[layout.Part, ...]] = dict.fromkeys(layout.SPLITS, ())
    names = _labels(labels)
    for split, table in ("train", rows), ("labels", names):
        make_directory(f"{data}/{split}")
        splits[split] = tuple(
            layout.write_part(data, layout.part_path(split, i), at, table.slice(at, PART_ROWS))
            for i, at in enumerate(range(0, len(table), PART_ROWS))
        )
    others = tuple(part.rows for part in splits["labels"])
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    statistics = {"train": {"tokens_mean": float(lengths.mean()), "tokens_max": int(lengths.max())}}
    hashed = load(encoder).hash
    manifest = layout.Manifest(
        layout.FORMAT_VERSION, encoder, hashed, max(32, longest), 0, labels, False, 0.55, 1.5,
        splits, others, statistics, layout.hash_labels(0, names["text"]),
    )  # fmt: skip
    layout.write_manifest(data, manifest)


def _write_encoder(directory: str, dim: int, layers: int) -> None:
    from transformers import BertConfig, BertModel  # seconds, as for every encoder

    quiet()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=dim, num_hidden_layers=layers,
        num_attention_heads=max(1, dim // 64), intermediate_size=4 * dim,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    tokens = {f"token{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="token0"))
    tokenizer.save(f"{directory}/tokenizer.json")


def _points(points: int, labels: int, longest: int) -> pa.Table:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, longest + 1, points)
    drawn = np.sort(rng.integers(0, labels, (points, MOST_LABELS)), axis=1)
    kept = rng.random(drawn.shape) < 0.5
    kept[:, 0] = True
    kept[:, 1:] &= drawn[:, 1:] > drawn[:, :-1]
    columns = {
        "point_id": np.arange(points),
        "input_ids": _lists(lengths, rng.integers(1, VOCABULARY, lengths.sum())),
        "labels": _lists(kept.sum(axis=1), drawn[kept]),
        "filter_labels": _lists(np.zeros(points)),
    }
    return pa.table(columns, layout.POINTS)


def _labels(count: int) -> pa.Table:
    columns = {
        "label_id": np.arange(count),
        "text": pa.repeat("", count),
        "input_ids": _lists(np.zeros(count)),
        "train_count": np.ones(count, np.int64),
        "is_point": np.zeros(count, bool),
    }
    return pa.table(columns, layout.LABELS)


def _lists(lengths: np.ndarray, values: Any = ()) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64()))
