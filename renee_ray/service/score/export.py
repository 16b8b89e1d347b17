"""A trained run in files that need neither Ray nor renee_ray to be read.

    export.json                     what is here, and how a score comes about; written last
                                    (until then `_claim.json`, data/destination.py)
    README.md                       a model card
    modules.json, 1_Pooling/ ...    for sentence_transformers: the transformer's part of embeddings
    encoder/                        a Hugging Face directory: AutoModel, AutoTokenizer
    adapter/                        where it was trained by LoRA, which `encoder` contains: for peft
    head.safetensors                constant [D]; where the encoder has them, bottleneck [., H],
                                    and table [buckets, .] and idf [buckets] of the bag
    classifier-NNNNN.safetensors    weight float32 [n, D] of a range of labels
    labels-NNNNN.parquet            label_id, text, train_count of the same range

Retired labels keep their rows, so that ids stay; `retired` in export.json lists them.

The classifier passes through memory a range at a time, from wherever the checkpoint is to
wherever the export goes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save
from torch import Tensor

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.config.overrides import changed
from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig, LoraConfig, RunConfig
from renee_ray.config.score import ExportConfig
from renee_ray.data.dataset import Dataset, Manifest, hash_of_labels
from renee_ray.data.destination import Destination, Kind
from renee_ray.data.models import quiet, resolve_model
from renee_ray.data.storage import absolute, write_file
from renee_ray.model.bag import FACTORS
from renee_ray.model.encoder import Encoder
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.labels import opened, vocabulary_of
from renee_ray.service.score.calibrate import calibration_of
from renee_ray.service.score.trained import CPU, TRAINED, trained_encoder, trained_shard
from renee_ray.xfc.labels import LabelRange

MANIFEST, FORMAT_VERSION = "export.json", 1
HEAD, ENCODER, ADAPTER = "head.safetensors", "encoder", "adapter"
CARD, ROOT = "README.md", ("modules.json", "config_sentence_transformers.json")
POOLED, UNIT = "1_Pooling", "2_Normalize"
FOLDERS = (ENCODER, ADAPTER, POOLED, UNIT)
FILES = re.compile(
    rf"(?:{'|'.join(FOLDERS)})/[\w.-]+\.(?:json|txt|model|safetensors|jinja|codes|bpe)|"
    rf"{CARD}|{'|'.join(ROOT)}|"
    r"head\.safetensors|classifier-\d+\.safetensors|labels-\d+\.parquet"
)
EXPORT = Kind(
    "an export", MANIFEST, "_claim.json", frozenset({"format_version", "step", "ranges"}),
    FILES, FOLDERS,
)  # fmt: skip
RANGE_BYTES = 1 << 28
"""Bytes of the classifier in a file, about."""
TOKENS = (
    "tokens = tokenizer(text, truncation=True, max_length=text_tokens); "
    "if there are more than max_length, keep the first max_length - 1 and the last; "
)
PROMPT = (
    "if there are more than {limit} tokens, keep the first {limit} - 1 and the last; "
    "tokens = tokens[:{first}] + {tokens} + tokens[{first}:]; "
)
POOLING = {"mean": "mean", "cls": "first", "last": "last"}
THEIR_POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
"""Words of sentence_transformers for ours."""
TRANSFORMER = (
    "e = {pooling} of encoder(tokens).last_hidden_state over the tokens that are no padding; "
    "e = bottleneck @ e, where there is one; "
)
BAG = (
    "with u[g] = idf[g] * (1 + log(times)) for the buckets g of the n-grams of 1 to {ngrams} "
    "tokens, b = {norm} * sum(u[g] * table[g]) / sqrt(sum(u[g] ** 2)); an n-gram's bucket is "
    "h mod {buckets}, with h(t1) = mix(t1 + 1), h(t1 .. tn) = mix(3 * h(t1 .. tn-1) + mix(tn + 1)) "
    "in int64 modulo 2 ** 64, and mix(x): x = (x ^ (x >> 32)) * {factors[0]}; "
    "x = (x ^ (x >> 29)) * {factors[1]}; x ^ (x >> 32); "
)
NORMALISED, SCALED = "e = e / |e|; ", "e = {} * e; "
SCORE = (
    "e = e + constant; score of label l = weight[l] @ e - tail * log(max(train_count[l], 1)); "
    "its probability, where there is a calibration, is "
    "1 / (1 + exp(-(slope * score + intercept))); the labels in `retired` are no answers"
)


def export_run(run: str, destination: str, config: ExportConfig) -> dict[str, Any]:
    """Writes encoder, classifier and label texts of a run's checkpoint; returns `export.json`.

    Raises:
        ReneeError: no run, no checkpoint, its dataset is gone, or `destination` is taken.
    """
    quiet()
    directory, checkpoint, dataset = opened(run, config.checkpoint)
    settings = directory.config()
    output = Destination(absolute(destination), EXPORT, config.overwrite)
    output.check()
    encoder = trained_encoder(settings.encoder, checkpoint, CPU)
    number, size = dataset.manifest.num_labels, max(1, RANGE_BYTES // (4 * encoder.dim))
    owned = [LabelRange(at, min(at + size, number), number) for at in range(0, number, size)]
    only = encoder.prompt is not None and encoder.bag is None  # a bag reads what it displaces
    length = encoder.prompt.limit if encoder.prompt and only else settings.encoder.max_length
    length = min(length, dataset.manifest.max_length)
    no_votes = settings.evaluation.model_copy(update={"neighbours": 0})
    calibration = calibration_of(directory, checkpoint.name, no_votes)
    written = sentence_transformers_files(encoder, settings.encoder, length)
    metrics = _metrics(directory, checkpoint)
    written[CARD] = model_card(settings, dataset, checkpoint.state.step, metrics).encode()
    with tempfile.TemporaryDirectory(prefix="renee-ray-export-") as local:
        _save_encoder(Path(local), encoder, settings.encoder, dataset)
        saved = sorted(f"{file.parent.name}/{file.name}" for file in Path(local).glob("*/*"))
        files = [*saved, HEAD, *written]
        files += [name for index in range(len(owned)) for name in _range_names(index)]
        output.claim()
        output.declare(files)
        for file in saved:
            write_file(f"{output.path}/{file}", Path(local, file).read_bytes())
    for file, bytes_of in written.items():
        write_file(f"{output.path}/{file}", bytes_of)
    write_file(f"{output.path}/{HEAD}", save(_head(encoder)))
    content = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.state.step,
        "model": checkpoint.hash,
        "num_labels": number,
        "vocabulary_hash": dataset.manifest.vocabulary_hash,
        "labels_hash": hash_of_labels(dataset),
        "retired": checkpoint.state.retired.tolist(),
        "dim": encoder.dim,
        "text_tokens": dataset.manifest.max_length,
        "max_length": length,
        "pooling": settings.encoder.pooling,
        "tail": settings.evaluation.tail,
        "pad_id": dataset.manifest.pad_id,
        "encoder": settings.encoder.model_copy(
            update=TRAINED | {"lora": LoraConfig()}  # adapters are merged
        ).model_dump(),
        "score": _score(encoder, settings.encoder),
        "calibration": calibration and calibration.to_json(),
        "ranges": [
            _write_range(output.path, i, each, checkpoint, dataset) for i, each in enumerate(owned)
        ],
    }
    output.publish(content)
    return content


def _score(encoder: Encoder, settings: EncoderConfig) -> str:
    """Returns the sentence that tells how to score a text."""
    parts = [TOKENS]
    if encoder.bag is not None:
        parts.append(BAG.format(**settings.bag.model_dump(), factors=FACTORS))
    if encoder.prompt is not None:
        tokens = encoder.prompt.tokens.tolist()
        prompt = encoder.prompt
        parts.append(PROMPT.format(limit=prompt.limit, first=prompt.first, tokens=tokens))
    if encoder.backbone is not None:
        parts.append(TRANSFORMER.format(pooling=POOLING[settings.pooling]))
    if encoder.bag is not None:
        parts.append("e = b; " if encoder.backbone is None else "e = [e | b]; ")
    parts += [NORMALISED] * settings.normalise
    parts += [SCALED.format(settings.scale)] * (settings.scale != 1)
    return "".join([*parts, SCORE])


def _save_encoder(local: Path, encoder: Encoder, settings: EncoderConfig, dataset: Dataset) -> None:
    """Writes the directories of an export; a transformer with adapters in both of its forms.

    Raises:
        ReneeError: the tokenizer, which goes along, is not the dataset's any more.
    """
    vocabulary = vocabulary_of(dataset)
    backbone: Any = encoder.backbone
    if settings.lora.rank:
        backbone.save_pretrained(local / ADAPTER, save_embedding_layers=False)
        (local / ADAPTER / "README.md").unlink(missing_ok=True)
        backbone = backbone.merge_and_unload()
    if backbone is not None:
        backbone.save_pretrained(local / ENCODER)
    save_tokenizer(local / ENCODER, dataset.manifest, vocabulary)


def save_tokenizer(directory: Path, manifest: Manifest, vocabulary: str) -> None:
    """Writes a dataset's tokenizer, `vocabulary`, as transformers loads it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(manifest.tokenizer), trust_remote_code=False, local_files_only=True
    )
    if tokenizer.pad_token is None:  # without one, sentence_transformers embeds nothing
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(manifest.pad_id)
    tokenizer.save_pretrained(directory)
    # transformers makes some anew, by their class; a run has the tokens of the file.
    (directory / "tokenizer.json").write_text(vocabulary, "utf-8")


def _head(encoder: Encoder) -> dict[str, Tensor]:
    """Returns what an embedding needs beside the transformer; the tensors alias the encoder's."""
    head = {"constant": encoder.constant}
    if encoder.bottleneck is not None:
        head["bottleneck"] = encoder.bottleneck.weight.detach()
    if encoder.bag is not None:
        head |= {"table": encoder.bag.table.detach(), "idf": encoder.bag.idf}
    return head


def load_head(encoder: Encoder, head: dict[str, Tensor]) -> None:
    """Gives an encoder what `HEAD` holds. Raises LookupError or ValueError if it does not fit."""
    for name, tensor in _head(encoder).items():
        if head[name].shape != tensor.shape:
            raise ValueError(f"{name} is {list(head[name].shape)}, not {list(tensor.shape)}")
        tensor.copy_(head[name])


def _range_names(index: int) -> tuple[str, str]:
    return f"classifier-{index:05d}.safetensors", f"labels-{index:05d}.parquet"


def _write_range(
    destination: str, index: int, owned: LabelRange, checkpoint: Checkpoint, dataset: Dataset
) -> dict[str, Any]:
    names = _range_names(index)
    weight = trained_shard(checkpoint, owned, CPU).weights.read(0, len(owned)).contiguous()
    write_file(f"{destination}/{names[0]}", save({"weight": weight}))
    table = dataset.read_rows(
        "labels", owned.start, owned.stop, ["label_id", "text", "train_count"]
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_file(f"{destination}/{names[1]}", buffer.getvalue())
    return {"start": owned.start, "stop": owned.stop, "classifier": names[0], "labels": names[1]}


def _is_path(value: str) -> bool:
    return "://" in value or os.path.isabs(value) or (os.sep in value and os.path.exists(value))


def _metrics(directory: RunDirectory, checkpoint: Checkpoint) -> dict[str, float]:
    """Returns what the export as it is gets of the validation points, if that was measured.

    Training measures without votes and with the `tail` that it was given. If it chose another, it
    measured the best checkpoint again. Of labels that were added or retired since, it knew nothing.
    """
    tails = (directory.read(RUN_FILE) or {}).get("tails")
    if checkpoint.revision:
        return {}
    if tails is None:
        return checkpoint.manifest.metrics
    found: dict[str, float] = tails.get("without_votes", {})
    own = tails["checkpoint"] == checkpoint.name
    return {name: value for name, value in found.items() if own and name != "tail"}


def model_card(config: RunConfig, dataset: Dataset, step: int, measured: dict[str, float]) -> str:
    """Returns the model card in Markdown, with front matter as the Hugging Face hub reads it.

    It leaves out paths, which tell of the machine that the run was trained on.

    measured: metrics of the validation points, in percent.
    """
    files, manifest, name = resources.files(__package__), dataset.manifest, config.encoder.name
    alone, local = name == NO_TRANSFORMER, os.path.exists(name)
    settings = [
        f"    {key}: {json.dumps(value)}"
        for key, value, _ in changed(config.model_dump(mode="json"))
        if not (isinstance(value, str) and _is_path(value))
    ]
    metrics = [f"| {each} | {value:.2f} |" for each, value in measured.items()]
    head = ["Of the validation points, in percent:", "", "| metric | value |", "|---|---|"]
    points = [
        f"{manifest.num_points(each):,} {each} points" for each in ("train", "validation", "test")
    ]
    return Template(files.joinpath("card.md").read_text("utf-8")).substitute(
        base="" if alone or local else f"base_model: {json.dumps(name)}\n",
        labels=f"{manifest.num_labels:,}",
        step=f"{step:,}",
        transformer="\n" if alone else files.joinpath("card_transformer.md").read_text("utf-8"),
        dataset=os.path.basename(dataset.path.rstrip("/")),
        points=", ".join(points),
        metrics="\n".join([*head, *metrics] if metrics else ["None were measured."]),
        settings="\n".join(settings) or "None.",
    )


def sentence_transformers_files(
    encoder: Encoder, settings: EncoderConfig, length: int
) -> dict[str, bytes]:
    """Returns the files that describe the transformer's part of embeddings; none without one.

    With a bag or a bottleneck, that part has no norm of its own, and is not normalised.

    length: most tokens of a text without its prompt.
    """
    if encoder.backbone is None:
        return {}
    prompted = 0 if encoder.prompt is None else len(encoder.prompt.tokens)
    kinds = {"encoder": "Transformer", POOLED: "Pooling"}
    contents: dict[str, Any] = {}
    if settings.normalise and encoder.bag is None and encoder.bottleneck is None:
        kinds[UNIT], contents[f"{UNIT}/config.json"] = "Normalize", {}
    # The tokens of prompt and text are made apart here, and together by sentence_transformers.
    prompts = {"prompt": f"{settings.prompt.rstrip()} "} if settings.prompt else {}
    contents |= {
        "encoder/sentence_bert_config.json": {
            "max_seq_length": min(length + prompted, settings.max_length),
            "do_lower_case": False,
        },
        f"{POOLED}/config.json": {
            "word_embedding_dimension": encoder.backbone.config.hidden_size,
            "pooling_mode": THEIR_POOLING[settings.pooling],
        },
        ROOT[0]: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ],
        ROOT[1]: {"prompts": prompts, "default_prompt_name": next(iter(prompts), None)},
    }
    return {name: json.dumps(each, indent=1).encode() for name, each in contents.items()}
