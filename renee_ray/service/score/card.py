"""The model card of an export, and what makes its directory one of sentence_transformers."""

from __future__ import annotations

import json
import os
from importlib import resources
from string import Template
from typing import Any

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.config.overrides import changed
from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.model.encoder import Encoder

CARD, SPLITS = "README.md", ("train", "validation", "test")
ROOT = ("modules.json", "config_sentence_transformers.json")
FOLDERS = ("1_Pooling", "2_Normalize")
POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
"""Words of sentence_transformers for ours."""


def card(config: RunConfig, dataset: Dataset, checkpoint: Checkpoint) -> str:
    """Returns the model card in Markdown, with front matter as the Hugging Face hub reads it.

    It leaves out paths, which tell of the machine that the run was trained on.
    """
    files, manifest, name = resources.files(__package__), dataset.manifest, config.encoder.name
    alone, local = name == NO_TRANSFORMER, os.path.exists(name)
    settings = [
        f"    {key}: {json.dumps(value)}"
        for key, value, _ in changed(config.model_dump(mode="json"))
        if not (isinstance(value, str) and os.path.isabs(value))
    ]
    metrics = [f"| {each} | {value:.2f} |" for each, value in checkpoint.manifest.metrics.items()]
    head = ["Of the validation points, in percent:", "", "| metric | value |", "|---|---|"]
    points = [f"{manifest.num_points(each):,} {each} points" for each in SPLITS]
    return Template(files.joinpath("card.md").read_text("utf-8")).substitute(
        base="" if alone or local else f"base_model: {json.dumps(name)}\n",
        labels=f"{manifest.num_labels:,}",
        step=f"{checkpoint.state.step:,}",
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
    kinds = {"encoder": "Transformer", FOLDERS[0]: "Pooling"}
    contents: dict[str, Any] = {}
    if settings.normalise and encoder.bag is None and encoder.bottleneck is None:
        kinds[FOLDERS[1]], contents[f"{FOLDERS[1]}/config.json"] = "Normalize", {}
    # The tokens of prompt and text are made apart here, and together by sentence_transformers.
    prompts = {"prompt": f"{settings.prompt.rstrip()} "} if settings.prompt else {}
    contents |= {
        "encoder/sentence_bert_config.json": {
            "max_seq_length": min(length + prompted, settings.max_length),
            "do_lower_case": False,
        },
        f"{FOLDERS[0]}/config.json": {
            "word_embedding_dimension": encoder.backbone.config.hidden_size,
            "pooling_mode": POOLING[settings.pooling],
        },
        ROOT[0]: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ],
        ROOT[1]: {"prompts": prompts, "default_prompt_name": next(iter(prompts), None)},
    }
    return {name: json.dumps(each, indent=1).encode() for name, each in contents.items()}
