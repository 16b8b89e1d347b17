"""The model card of an export, and what makes its directory one of sentence_transformers."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors.torch import save

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.config.overrides import dotted
from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.model.encoder import Encoder

CARD = "README.md"
ROOT = ("modules.json", "config_sentence_transformers.json")
FOLDERS = ("1_Pooling", "2_Dense", "3_Normalize")
POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
"""Words of sentence_transformers for ours."""
TEMPLATE = """---
library_name: renee_ray
pipeline_tag: text-classification
tags: [extreme-multi-label-classification, renee_ray]
{base}---

# A classifier of texts into {labels:,} labels

Trained by renee_ray, after Renée (MLSys 2023): an encoder and a vector for every label, trained
end to end, here for {step:,} steps.

## Use

```python
import renee_ray

renee_ray.load("this directory").predict(["a text"], k=5)
```

`export.json` says how a score is computed without renee_ray.{probabilities}

{embeddings}

## Data

Dataset `{name}`: {points}; {labels:,} labels.

## Metrics

{metrics}

## Settings

Those that are not the defaults:

{settings}
"""
EMBEDDINGS = """The transformer alone is `AutoModel.from_pretrained("this directory/encoder")`.
With its pooling{more} it is

```python
from sentence_transformers import SentenceTransformer

SentenceTransformer("this directory").encode(["a text"])
```

{less}"""


def card(config: RunConfig, dataset: Dataset, checkpoint: Checkpoint, calibrated: bool) -> str:
    """Returns the model card in Markdown, with front matter as the Hugging Face hub reads it."""
    encoder, manifest = config.encoder, dataset.manifest
    local = os.path.isabs(encoder.name) or os.path.exists(encoder.name)
    named = encoder.name != NO_TRANSFORMER and not local
    defaults = dict(dotted(RunConfig(data="-", output="-").model_dump()))
    changed = [
        f"    {key}: {json.dumps(value)}"
        for key, value in dotted(config.model_dump(exclude={"data", "output"}))
        if value != defaults[key] and not (local and key == "encoder.name") and not _path(value)
    ]
    metrics = [f"| {name} | {value:.2f} |" for name, value in checkpoint.manifest.metrics.items()]
    table = ["Of the validation points, in percent:", "", "| metric | value |", "|---|---|"]
    splits = [f"{manifest.num_points(name):,} {name} points" for name in ("train", "validation")]
    told = " It also has a calibration, which makes probabilities of scores." * calibrated
    return TEMPLATE.format(
        base=f"base_model: {json.dumps(encoder.name)}\n" * named,
        labels=manifest.num_labels,
        step=checkpoint.state.step,
        probabilities=told,
        embeddings=_embeddings(encoder),
        name=os.path.basename(dataset.path.rstrip("/")),
        points=", ".join(splits),
        metrics="\n".join([*table, *metrics] if metrics else ["None were measured."]),
        settings="\n".join(changed) or "None.",
    )


def _path(value: object) -> bool:
    """Whether a setting tells of the machine that the run was trained on."""
    return isinstance(value, str) and os.path.isabs(value)


def _embeddings(encoder: EncoderConfig) -> str:
    if encoder.name == NO_TRANSFORMER:
        return "There is no transformer: embeddings are those of a bag of n-grams alone."
    more = [", bottleneck"] * bool(encoder.bottleneck) + [", scaled to norm 1"] * _normalised(
        encoder
    )
    lacking = ["`constant`"] + ["`scale`"] * (encoder.scale != 1)
    less = f"These embeddings lack what `head.safetensors` adds: {' and '.join(lacking)}."
    if encoder.bag.dim:
        less = (
            f"sentence_transformers gives the transformer's columns only, not the "
            f"{encoder.bag.dim} columns of the bag of n-grams. " + less
        )
    return EMBEDDINGS.format(more="".join(more), less=less)


def _normalised(encoder: EncoderConfig) -> bool:
    """Whether the transformer's part has norm 1: with a bag, only both together have."""
    return encoder.normalise and not encoder.bag.dim


def sentence_transformers_files(
    encoder: Encoder, settings: EncoderConfig, length: int
) -> dict[str, bytes]:
    """Returns the files that describe the transformer's part of embeddings; none without one.

    length: most tokens of a text without its prompt.
    """
    if encoder.backbone is None:
        return {}
    hidden: int = encoder.backbone.config.hidden_size
    kinds = {"encoder": "Transformer", FOLDERS[0]: "Pooling"}
    files: dict[str, dict[str, Any]] = {}
    prompted = 0 if encoder.prompt is None else len(encoder.prompt.tokens)
    files["encoder/sentence_bert_config.json"] = {
        "max_seq_length": min(length + prompted, settings.max_length),
        "do_lower_case": False,
    }
    files[f"{FOLDERS[0]}/config.json"] = {
        "word_embedding_dimension": hidden,
        "pooling_mode": POOLING[settings.pooling],
    }
    if encoder.bottleneck is not None:
        kinds[FOLDERS[1]] = "Dense"
        files[f"{FOLDERS[1]}/config.json"] = {
            "in_features": hidden,
            "out_features": settings.bottleneck,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    if _normalised(settings):
        kinds[FOLDERS[2]] = "Normalize"
        files[f"{FOLDERS[2]}/config.json"] = {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    # The tokens of prompt and text are made apart here, and together by sentence_transformers.
    prompts = {"prompt": f"{settings.prompt.rstrip()} "} if settings.prompt else {}
    contents = {
        ROOT[0]: modules,
        ROOT[1]: {"prompts": prompts, "default_prompt_name": next(iter(prompts), None)},
    }
    written = {
        name: json.dumps(each, indent=1).encode() for name, each in (files | contents).items()
    }
    if encoder.bottleneck is not None:
        weight = encoder.bottleneck.weight.detach()
        written[f"{FOLDERS[1]}/model.safetensors"] = save({"linear.weight": weight})
    return written
