"""Hostile datasets, models, configurations and sources: the cases of docs/security.md.

Those that concern run directories and checkpoints are in test_hostile_runs.py.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from renee_ray.cli.main import main
from renee_ray.config.schema import EncoderConfig
from renee_ray.data import dataset as layout
from renee_ray.data import storage, tokenizer
from renee_ray.data.dataset import DATASET, Dataset
from renee_ray.data.dataset.manifest import MANIFEST_LIMIT
from renee_ray.data.destination import Destination
from renee_ray.data.sources import xmlrepo
from renee_ray.data.sources.lines import (
    GRAIN_BYTES,
    MAX_LINE_BYTES,
    PACKED_LEAST,
    LineBatch,
    Lines,
    count,
    lines_of,
    ranges,
)
from renee_ray.data.sources.lines import read as read_lines
from renee_ray.data.sources.parquet import index_parquet
from renee_ray.errors import ReneeError, printable, redacted
from renee_ray.model.encoder import build_encoder
from renee_ray.report.inspection import inspection_text
from renee_ray.report.run import examples_text, write_report

from .data.tiny import write_tiny
from .hostile import SECRET, Canary, Case, Place, place, refused

__all__ = ["place"]
SECURITY = Path(__file__).parents[1] / "docs" / "security.md"
CPU = torch.device("cpu")
ESCAPES = "a\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r\nb"

Made = list[str] | Callable[[], object]
Change = Callable[[pa.Table], pa.Table]


# ----------------------------------------------------------------------------------- dataset.json


def tiny(place: Place) -> Path:
    path = place.given / "set"
    write_tiny(path)
    return path


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], Made]:
    """A dataset whose manifest `change` has changed, to be inspected."""

    def make(place: Place) -> Made:
        path = tiny(place)
        raw = json.loads((path / layout.MANIFEST).read_text())
        change(raw)
        (path / layout.MANIFEST).write_text(json.dumps(raw))
        return ["inspect", str(path)]

    return make


def part(**values: Any) -> Callable[[Place], Made]:
    return manifest(lambda raw: raw["splits"]["train"][0].update(values))


def top(**values: Any) -> Callable[[Place], Made]:
    return manifest(lambda raw: raw.update(values))


def text(content: str) -> Callable[[Place], Made]:
    """A dataset whose manifest is `content`."""

    def make(place: Place) -> Made:
        (tiny(place) / layout.MANIFEST).write_text(content)
        return ["inspect", str(place.given / "set")]

    return make


def more_rows(rows: int) -> Callable[[dict[str, Any]], None]:
    """Says so many rows of the last part of labels."""

    def change(raw: dict[str, Any]) -> None:
        labels = raw["splits"]["labels"]
        labels[-1]["rows"] = rows
        raw["num_labels"] = labels[-1]["first"] + rows

    return change


def long_manifest(place: Place) -> Made:
    with open(tiny(place) / layout.MANIFEST, "ab") as file:
        file.truncate(MANIFEST_LIMIT + 1)
    return ["inspect", str(place.given / "set")]


def linked(name: str, to: Callable[[Place], Path]) -> Callable[[Place], Made]:
    """A dataset in which `name` is a symbolic link."""

    def make(place: Place) -> Made:
        path = tiny(place) / name
        target = to(place)
        if path.is_dir():
            path.rename(target)
        elif not target.exists():
            target.write_bytes(path.read_bytes())
            path.unlink()
        else:
            path.unlink()
        path.symlink_to(target)
        return ["inspect", str(place.given / "set")]

    return make


def pipe(place: Place) -> Made:
    path = tiny(place) / layout.MANIFEST
    path.unlink()
    os.mkfifo(path)
    return ["inspect", str(place.given / "set")]


TRAIN = "train/part-00000.parquet"
DATASETS = [
    Case("part-outside", part(path="train/../../../outside/x.parquet"), "outside the dataset"),
    Case("part-absolute", part(path="/etc/passwd"), "outside the dataset"),
    Case("part-url", part(path="s3://bucket/part-00000.parquet"), "outside the dataset"),
    Case("part-file-url", part(path="file:///etc/passwd"), "outside the dataset"),
    Case("part-unprintable", part(path="train/part-0\0\n\x1b[2J.parquet"), "outside the dataset"),
    Case("part-of-another-split", part(path="test/part-00000.parquet"), "or not named train/part"),
    Case(
        "part-twice",
        manifest(lambda raw: raw["splits"]["train"][2].update(path=TRAIN)),
        f"has the part {TRAIN} twice",
    ),
    Case("manifest-long", long_manifest, r"has \d+ bytes, which no such file has"),
    Case("manifest-nested", text("[" * 10**6), "is not JSON .nested too deeply"),
    Case("manifest-nan", text('{"format_version": NaN}'), "NaN is no number of JSON"),
    Case("manifest-infinite", text('{"format_version": 1e999}'), "1e999 is too large a number"),
    Case("manifest-many-digits", text('{"a": ' + "9" * 10**5 + "}"), "is not JSON"),
    Case("count-huge", part(rows=10**30), r"splits\.train\.0\.rows=1000"),
    Case("count-negative", part(rows=-1), r"splits\.train\.0\.rows=-1: "),
    Case("count-float", part(rows=6.0), r"splits\.train\.0\.rows=6\.0: "),
    Case("count-boolean", part(first=False), r"splits\.train\.0\.first=False: "),
    Case("labels-huge", top(num_labels=2**62), "num_labels=4611686018427387904: input "),
    Case("rows-beyond-bytes", manifest(more_rows(2**31 - 7)), "says 2147483641 rows of the"),
    Case("rows-that-lie", manifest(more_rows(5)), "has 4 rows and dataset.json says 5"),
    Case("length-huge", top(max_length=10**12), "max_length=1000000000000: input should be less"),
    Case("padding-negative", top(pad_id=-5), "pad_id=-5: input should be greater"),
    Case("propensity-negative", top(propensity_a=-1.0), "propensity_a=-1.0: input should "),
    Case(
        "statistics-of-another-kind",
        top(statistics={"labels": {"share_of_labels_by_train_count": {"0": "x"}}}),
        "share_of_labels_by_train_count=",
    ),
    Case("tokenizer-unprintable", top(tokenizer="a\x1b[2J"), r"tokenizer='a\\x1b\[2J': "),
    Case("value-long", top(num_labels="9" * 10**6), "num_labels='9+: input should be"),
    Case("manifest-link", linked(layout.MANIFEST, lambda p: p.secret), "'dataset.json', which"),
    Case("part-link", linked(TRAIN, lambda p: p.outside / "x"), "symbolic link '.*', which leads"),
    Case("split-link", linked("train", lambda p: p.outside / "t"), "'train', which leads out"),
    Case("manifest-pipe", pipe, "is not a renee_ray dataset"),
]


# ----------------------------------------------------------------------------------------- parts


def replaced(path: Path, split: str, content: bytes) -> Dataset:
    """The dataset with another first part, of which the manifest knows size and SHA-256."""
    name = f"{split}/part-00000.parquet"
    (path / name).write_bytes(content)
    raw = json.loads((path / layout.MANIFEST).read_text())
    raw["splits"][split][0] |= {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path / layout.MANIFEST).write_text(json.dumps(raw))
    return Dataset.without_check(str(path))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


def first_part(path: Path, split: str) -> pa.Table:
    return pq.read_table(path / split / "part-00000.parquet")


def rewritten(
    split: str, change: Callable[[pa.Table], pa.Table], **options: Any
) -> Callable[..., Made]:
    """A dataset with a first part that `change` has changed, to be read."""

    def make(place: Place) -> Made:
        path = tiny(place)
        dataset = replaced(path, split, parquet(change(first_part(path, split)), **options))
        return lambda: dataset.read_part(dataset.manifest.splits[split][0])

    return make


def column(
    name: str, values: Any, kind: pa.DataType | None = None
) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        made = values if isinstance(values, pa.Array) else pa.array(values, kind)
        return table.set_column(index, name, made)

    return change


def zeros(table: pa.Table) -> pa.Table:
    """30 million tokens a row."""
    size = 6 * 10**6
    offsets = pa.array(np.arange(7, dtype=np.int32) * size)
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(6 * size, np.int32)))
    return column("input_ids", lists)(table)


def long_texts(rows: int, size: int = 100 << 20) -> pa.Array:
    """`rows` times one text: some KB of Parquet, GBs of memory."""
    indices = pa.array(np.zeros(rows, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(["x" * size]))


def footer_lies(place: Place) -> Made:
    path = tiny(place)
    content = bytearray((path / TRAIN).read_bytes())
    content[-8:-4] = b"\xff\xff\xff\x7f"
    dataset = replaced(path, "train", bytes(content))
    return lambda: dataset.read_part(dataset.manifest.splits["train"][0])


def twice(table: pa.Table) -> pa.Table:
    return table.append_column("labels", table["labels"])


WHOLE = {"store_schema": False, "dictionary_pagesize_limit": 1 << 30}
PARTS = [
    Case("part-of-zeros", rewritten("train", zeros), "would decode to"),
    Case(
        "part-of-one-text",
        rewritten("labels", column("text", long_texts(7)), **WHOLE),
        "text would decode to more",
    ),
    Case(
        "part-other-type",
        rewritten("train", column("labels", ["a"] * 6)),
        "has string as column 'labels'",
    ),
    Case("part-column-twice", rewritten("train", twice), "list.* and list.* as column 'labels'"),
    Case(
        "part-column-missing",
        rewritten("train", lambda t: t.drop_columns(["labels"])),
        "nothing as column 'labels'",
    ),
    Case(
        "part-nulls",
        rewritten("train", column("labels", [[None]] * 6, pa.list_(pa.int64()))),
        "nulls in labels",
    ),
    Case(
        "label-beyond",
        rewritten("train", column("labels", [[11]] * 6, pa.list_(pa.int64()))),
        r"11 in labels, which is not in \[0, 11\)",
    ),
    Case(
        "label-negative",
        rewritten("train", column("filter_labels", [[-1]] * 6, pa.list_(pa.int64()))),
        "-1 in filter_labels",
    ),
    Case(
        "token-negative",
        rewritten("train", column("input_ids", [[-7]] * 6, pa.list_(pa.int32()))),
        "-7 in input_ids",
    ),
    Case(
        "label-ids-disordered",
        rewritten("labels", column("label_id", [0, 2, 1, 3, 4, 5, 6])),
        "not in the order of their ids",
    ),
    Case("footer-that-lies", footer_lies, "cannot be read"),
]


def test_pickled_extension_type(place: Place) -> None:
    """pyarrow once unpickled a column type of this name; it is read as what it is stored as."""
    path = tiny(place)
    table = first_part(path, "train")
    field = table.schema.field("point_id").with_metadata(
        {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Canary(place.command())),
        }
    )
    content = parquet(table.cast(table.schema.set(0, field)))
    dataset = replaced(path, "train", content)
    read = dataset.read_part(dataset.manifest.splits["train"][0])
    assert read["point_id"].to_pylist() == table["point_id"].to_pylist()


def test_flipped_bytes(place: Place) -> None:
    """Whatever bytes of a part without checksums are flipped, it reads or is refused."""
    path = tiny(place)
    whole = parquet(first_part(path, "train"))
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, len(content), 3):
            content[at] ^= 1 << rng.integers(8)
        dataset = replaced(path, "train", bytes(content))
        try:
            dataset.read_part(dataset.manifest.splits["train"][0])
            outcomes.add("read")
        except ReneeError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---------------------------------------------------------------------------------------- models


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


def vocabulary_outside(place: Place) -> Made:
    settings = {"tokenizer_class": "BertTokenizer", "vocab_file": "../../outside/secret.txt"}
    return converted(tokenizer_config__json=settings, config__json=BERT)(place)


def named(name: str) -> Callable[[Place], Made]:
    return lambda place: partial(tokenizer.load, name)


SHARDS = {"weight_map": {"a": "../../outside/secret.txt"}}
MODELS = [
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
        "tokenizer-vocabulary-outside",
        vocabulary_outside,
        "names a file in another directory as vocab_file",
    ),
    Case(
        "tokenizer-nested",
        converted(tokenizer__json="[" * 10**5),
        "no fast tokenizer can be loaded",
    ),
    Case(
        "tokenizer-settings-nested",
        converted(tokenizer_config__json="[" * 10**5),
        "nested too deeply",
    ),
    Case(
        "encoder-with-code",
        encoder(config__json={"model_type": "x", "auto_map": AUTO_MAP}),
        "encoder.name=.* cannot be loaded",
    ),
    Case("encoder-pickled", pickled, "encoder.name=.* cannot be loaded"),
    Case("encoder-weights-pickled", weights, "is not a plain state_dict"),
    Case(
        "encoder-wide",
        encoder(save=True, config__json={**BERT, "vocab_size": 10**12}),
        r"describes \d+ weights and its safetensors files have \d+ bytes",
    ),
    Case(
        "encoder-deep",
        encoder(save=True, config__json={**BERT, "num_hidden_layers": 10**9}),
        "num_hidden_layers=1e.09, above the limit",
    ),
    Case(
        "encoder-shards-outside",
        encoder(config__json=BERT, model__safetensors__index__json=SHARDS),
        "names the file",
    ),
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


# -------------------------------------------------------------------------------- configurations


def config(content: str | bytes) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        file = place.given / "recipe.yaml"
        raw = content.encode() if isinstance(content, str) else content
        file.write_bytes(raw.replace(b"COMMAND", place.command().encode()))
        return ["train", str(file)]

    return make


def override(*arguments: str) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        filled = [each.replace("COMMAND", place.command()) for each in arguments]
        return ["train", *config("data: a\noutput: b\n")(place)[1:], *filled]  # type: ignore[index]

    return make


LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
CONFIGS = [
    Case(
        "yaml-python-object",
        config("data: !!python/object/apply:os.system ['COMMAND']\n"),
        "line 1 is not valid YAML",
    ),
    Case("yaml-laughs", config(LAUGHS + "data: *a60\n"), "may not use aliases"),
    Case("yaml-long", config("#" * (1 << 20) + "\n"), "is longer than 1048576 bytes"),
    Case("yaml-device", lambda place: ["train", "/dev/zero"], "is longer than 1048576 bytes"),
    Case("yaml-not-utf-8", config(b"data: \xff\xfe\n"), "is not in UTF-8"),
    Case("yaml-nested", config("[" * 10**5), "nested too deeply"),
    Case("yaml-key-twice", config("data: a\ndata: b\n"), "has the key 'data' twice"),
    Case("yaml-unknown-key", config('data: a\noutput: b\n"\\e[2J": 1\n'), "has no key"),
    Case("yaml-many-digits", config("seed: " + "9" * 10**5), "is not valid YAML"),
    Case("yaml-not-a-number", config("data: a\noutput: b\nwarmup: .nan\n"), "warmup=nan"),
    Case(
        "yaml-infinite",
        config("data: a\noutput: b\nencoder: {learning_rate: .inf}\n"),
        "learning_rate=inf",
    ),
    Case(
        "yaml-value-long",
        config(f"data: a\noutput: b\nseed: {'x' * 10**5}\n"),
        "seed='xxx.* is wrong",
    ),
    Case("override-dunder", override("__class__.__init__.__globals__=1"), "has no key '__class__'"),
    Case(
        "override-python-object",
        override("num_workers=[!!python/object/apply:os.system ['COMMAND']]"),
        "is not YAML",
    ),
    Case("override-laughs", override("seed=[&a [x], *a]"), "may not use aliases"),
    Case("override-deep", override(".".join("a" * 10**4) + "=1"), "no key has so many parts"),
]


# ---------------------------------------------------------------------------- secrets in arguments


KEYS = f"s3://AKIAXXXX:{SECRET}/+x@bucket/set"
QUERY = f"s3://bucket/set?secret_key={SECRET}"
SECRETS = [
    Case("url-keys-data", override(f"data={KEYS}"), "put credentials in the environment"),
    Case(
        "url-keys-output",
        lambda place: [
            "train",
            *config("seed: 1\n")(place)[1:],
            f"data={tiny(place)}",
            f"output={KEYS}",
        ],
        "put credentials in the environment",
    ),  # type: ignore[index]
    Case(
        "url-keys-source",
        lambda place: ["convert", KEYS, "dst"],
        "put credentials in the environment",
    ),
    Case(
        "url-keys-destination",
        lambda place: ["convert", "src", KEYS],
        "put credentials in the environment",
    ),
    Case(
        "url-keys-run",
        lambda place: ["evaluate", KEYS, "data"],
        "put credentials in the environment",
    ),
    Case(
        "url-keys-predictions",
        lambda place: ["predict", "run", "data", KEYS],
        "put credentials in the environment",
    ),
    Case("url-keys-export", lambda place: ["export", "run", KEYS], "put credentials|is not a run"),
    Case(
        "url-keys-inspect", lambda place: ["inspect", QUERY], "put credentials in the environment"
    ),
    Case(
        "url-keys-in-an-error",
        lambda place: ["quickstart", f"output={KEYS}"],
        r"s3://\*\*\*@bucket",
    ),
    Case(
        "url-that-chains",
        lambda place: ["inspect", "reference://x/::file:///etc/passwd"],
        "no filesystem is installed|carries credentials",
    ),
    Case(
        "url-of-a-wrapper",
        lambda place: ["inspect", "simplecache://x"],
        "no filesystem is installed",
    ),
]


def test_usage_errors_show_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "a", KEYS]) == 2
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{KEYS} is gone", "s3://***@bucket/set is gone"),
        (f"cannot read '{QUERY}&x=1'", "cannot read 's3://bucket/set?secret_key=***&x=1'"),
        ("abfs://container@account.net/x", "abfs://container@account.net/x"),
        ("a: b@c", "a: b@c"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown


# --------------------------------------------------------------------------------------- sources


def source_file(
    name: str, content: bytes, read: Callable[[str], object]
) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        (place.given / name).write_bytes(content)
        return lambda: read(str(place.given / name))

    return make


def bomb(place: Place) -> Made:
    """300 MB of lines in 300 KB; refused before they are all unpacked."""
    path = place.given / "trn_X.txt.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(300):
            file.write((b"x" * 1023 + b"\n") * 1024)

    def index() -> None:
        unpacked = place.given / "trn_X.txt"
        try:
            counted(str(path), str(place.given))
        finally:
            assert unpacked.stat().st_size <= PACKED_LEAST + GRAIN_BYTES
            unpacked.unlink()

    return index


def long_line(place: Place) -> Made:
    path = place.given / "trn_X.txt"
    with open(path, "wb") as file:
        file.write(b"first\n")
        file.truncate(MAX_LINE_BYTES + 2 * GRAIN_BYTES)
    return lambda: counted(str(path))


def counted(path: str, scratch: str = "") -> Lines:
    parts = ranges(path, scratch)
    return lines_of(parts, [count(part) for part in parts])


def lines(parse: Callable[[LineBatch], object]) -> Callable[[str], object]:
    def read(path: str) -> object:
        found = counted(path)
        return parse(read_lines(found, 0, found.rows))

    return read


def header(path: str) -> object:
    return xmlrepo.header_of(counted(path), 1)


def source_bomb(place: Place) -> Made:
    path = place.given / "source"
    path.mkdir()
    texts = long_texts(200)
    table = pa.table({"text": texts, "labels": pa.array([[1]] * 200)})
    pq.write_table(table, path / "train.parquet", compression="zstd", **WHOLE)

    def read() -> None:
        train = index_parquet(str(path)).train
        next(train.read(train.blocks[0], ["text"]))

    return read


PAIR = partial(xmlrepo.parse_pairs, num_labels=None)
FILTER = partial(xmlrepo.parse_filters, num_rows=3, num_labels=3)
OBJECT = partial(xmlrepo.parse_objects, num_labels=3)
SOURCES = [
    Case("gzip-bomb", bomb, "unpacks to more than 100 times its size"),
    Case("line-long", long_line, "trn_X.txt:2: the line is longer than"),
    Case(
        "label-id-huge",
        source_file("y.txt", b"1000000000000000000:1\n", lines(PAIR)),
        "implausibly large",
    ),
    Case(
        "label-id-of-many-digits",
        source_file("y.txt", b"9" * 10**5 + b":1\n", lines(PAIR)),
        "implausibly large",
    ),
    Case(
        "label-header-huge",
        source_file("y.txt", b"1 4611686018427387904\n0:1\n", header),
        "above the limit",
    ),
    Case(
        "label-header-of-many-digits",
        source_file("y.txt", b"1 " + b"9" * 10**5 + b"\n", lines(PAIR)),
        "implausibly large",
    ),
    Case(
        "filter-row-huge",
        source_file("f.txt", b"1000000000000000000 1\n", lines(FILTER)),
        "is out of range",
    ),
    Case(
        "json-nested",
        source_file("j.json", b'{"title": ' + b"[" * 10**5, lines(OBJECT)),
        "bad JSON",
    ),
    Case(
        "json-target-huge",
        source_file(
            "j.json", b'{"title": "a", "target_ind": [' + b"9" * 5000 + b"]}", lines(OBJECT)
        ),
        "bad JSON|out of range",
    ),
    Case("source-of-one-text", source_bomb, "text would decode to more"),
]


# ---------------------------------------------------------------------------------- destinations


def run_directory(place: Place, dataset: Path) -> Path:
    """As much of a run as is read before Ray is started."""
    path = place.given / "run"
    path.mkdir()
    made = Dataset.open(str(dataset)).manifest
    saved = {
        "config": {"data": str(dataset), "output": str(path)},
        "dataset": {
            "path": str(dataset),
            "num_labels": made.num_labels,
            "vocabulary_hash": made.vocabulary_hash,
            "manifest_hash": made.hash,
        },
    }
    (path / "run.json").write_text(json.dumps(saved))
    return path


def predicted_into(destination: str) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        dataset = tiny(place)
        run = run_directory(place, dataset)
        (place.given / "link").symlink_to(dataset)
        return ["predict", str(run), str(dataset), str(place.given / destination)]

    return make


def through_a_link(place: Place) -> Made:
    (place.given / "report.json").symlink_to(place.secret)
    return lambda: storage.write_file(str(place.given / "report.json"), b"x")


def cleared(place: Place) -> Made:
    """A directory to be overwritten, whose split is a link to somebody's parts."""
    path = tiny(place)
    (path / "train").rename(place.outside / "train")
    (path / "train").symlink_to(place.outside / "train")
    return lambda: Destination(str(path), DATASET, overwrite=True).check()


def claimed(place: Place) -> Made:
    from renee_ray.service.score.export import EXPORT

    path = place.given / "home"
    (path / "thesis").mkdir(parents=True)
    (path / "thesis" / "thesis.tex").write_text("years of work")
    manifest = {"format_version": 1, "step": 1, "ranges": [], "files": ["thesis/thesis.tex"]}
    (path / "export.json").write_text(json.dumps(manifest))
    return lambda: Destination(str(path), EXPORT, overwrite=True).check()


DESTINATIONS = [
    Case("predictions-in-the-source", predicted_into("set/predictions"), "one is in the other"),
    Case(
        "predictions-in-the-source-by-a-link",
        predicted_into("link/predictions"),
        "one is in the other",
    ),
    Case("predictions-over-the-source", predicted_into("."), "one is in the other"),
    Case("written-through-a-link", through_a_link, "is a symbolic link"),
    Case("cleared-through-a-link", cleared, "'train', which leads out"),
    Case("export-over-other-files", claimed, r"home/export\.json is in the way"),
]


# ----------------------------------------------------------------------------------------- shown


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_inspect_shows_label_texts_and_does_not_obey_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(place)
    table = column("text", [f"[red]{ESCAPES}"] * 7)(first_part(path, "labels"))
    replaced(path, "labels", parquet(table))
    assert main(["inspect", str(path), "--samples", "9"]) == 0
    out = capsys.readouterr().out
    assert "[red]a\\x1b]0;owned\\x07\\x1b[2J\\u202egnp.exe\\r\\nb" in out.replace("\n", "")
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", out)


def test_report_shows_texts_and_does_not_obey_them(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>[red]" + ESCAPES
    examples = [
        {
            "text": script,
            "true": [script],
            "predicted": [{"label": script, "score": 0.5, "right": True}],
        }
    ]
    out = shown(examples_text(examples))
    assert out.count("<script>alert(1)</script>[red]a\\x1b]0;owned") == 3
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", out)
    write_report(
        str(tmp_path / "report.html"), title=script, facts={script: script}, history={},
        comparison=[{"model": script, "P@1": 1.0}], examples=examples,
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)") >= 6


def test_printable() -> None:
    assert printable("é 漢 [b]\t\x9b\ud800") == "é 漢 [b]\\t\\x9b\\ud800"
    facts: dict[str, Any] = {"tokens_a_row": {"train": {}}, "labels_a_point": {"train": {}}}
    facts |= {"points": {}, "parts": {"train": 0}, "labels": 1, "bytes": 1, "max_length": 1}
    facts |= {
        "share_of_labels_by_points": {"[b]\x1b": 1.0},
        "share_of_pairs_by_points": {"[b]\x1b": 1.0},
    }
    out = shown(
        inspection_text({**facts, "path": "p\x1b[2J", "tokenizer": "t", "problems": ["\x1bx"]})
    )
    assert "\x1b[2J" not in out and "[b]\\x1b" in out and "\\x1bx" in out


# ------------------------------------------------------------------------------------------- all


CASES = [*DATASETS, *PARTS, *MODELS, *CONFIGS, *SECRETS, *SOURCES, *DESTINATIONS]


def test_the_document_lists_every_case_by_number() -> None:
    from . import test_hostile_runs as runs
    from .service import test_serve as serve

    listed = SECURITY.read_text(encoding="utf-8").partition("## Hostile cases")[2]
    names = re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", listed)
    known = [*(case.name for case in [*CASES, *runs.CASES]), *serve.WRONG_TOKENS, *serve.HOSTILE]
    assert sorted(names) == sorted(known) and len(set(known)) == len(known)
    tests = set(re.findall(r"`(test_\w+)`", listed))
    assert tests <= {*globals(), *vars(runs), *vars(serve)}
    numbers = [int(number) for number in re.findall(r"(?:^|, )(\d+)\. `", listed, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 30


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)


def test_a_read_outside_is_noticed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What `refused` asserts can fail: a case that reads the secret, and one that quotes it."""

    def reads(place: Place) -> Made:
        def read() -> None:
            raise ReneeError(f"refused {len(place.secret.read_text())}")

        return read

    def quotes(place: Place) -> Made:
        def quote() -> None:
            raise ReneeError(f"refused {SECRET}")

        return quote

    with pytest.raises(AssertionError, match="something outside was read"):
        refused(Case("reads", reads, "refused"), place, capsys)
    with pytest.raises(AssertionError):
        refused(Case("quotes", quotes, "refused"), place, capsys)
