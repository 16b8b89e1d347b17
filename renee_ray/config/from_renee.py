"""Command lines of microsoft/renee's main.py, as configurations of ours."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

import yaml

from renee_ray.config.overrides import make_config, read_recipe
from renee_ray.config.recipes import recipe_names
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ConfigError

GPUS = 16
"""The number of GPUs that the released commands are written for."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the command of the released code cannot be read: {message}; correct it")


def _parser() -> _Parser:
    parser = _Parser(add_help=False)
    for name, kind, default in (
        ("data-dir", str, ""), ("batch-size", int, 8), ("epochs", int, 50),
        ("expname", str, "renee-exp"), ("device", int, None), ("dist-url", str, ""),
        ("rank", int, 0), ("world-size", int, 1), ("seed", int, 42), ("bottleneck-dims", int, 0),
        ("dropout", float, 0.5), ("lr1", float, 0.0025), ("lr2", float, 1e-5), ("mo", float, 0.9),
        ("wd1", float, 0.01), ("wd2", float, 0.01), ("checkpoint-resume", str, ""),
        ("warmup", int, 140_000), ("accum", int, 1), ("maxlen", int, 32),
        ("tf", str, "distilbert-base-uncased"), ("dataset", str, ""),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("custom-cuda", "default-impl", "fp32encoder", "fp16xfc", "noloss", "infer",
                 "pre-tok", "compile"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true")
    # A path in its last version, a switch before.
    parser.add_argument("--use-ngame-encoder", nargs="?", default="", const="NGAME")
    parser.add_argument("command", nargs="*")
    return parser


@dataclass(frozen=True)
class Translated:
    """keys: what differs from our defaults, nested; notes: what changed in meaning."""

    keys: dict[str, Any]
    notes: list[str]

    @property
    def config(self) -> RunConfig:
        return make_config(RunConfig, self.keys, where="the translated command")


def translate(
    command: str, *, gpus: int = 0, data: str = "", points: int = 0, labels: int = 0
) -> Translated:
    """Translates a command of the released code, flag by flag.

    Args:
        gpus: those it ran on; 0: 1 with --device, else 16.
        data: the dataset directory; empty: named after --data-dir.
        points, labels: of the dataset; 0: as the recipe of its name says.

    Raises:
        ConfigError: an unknown flag, a bad value, or a dataset of unknown size.
    """
    try:
        words = shlex.split(command.replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(
            f"the command of the released code is no shell command: {error}"
        ) from None
    given = _parser().parse_args(words)
    for flag, value in (("--batch-size", given.batch_size), ("--epochs", given.epochs)):
        if value < 1:
            raise ConfigError(f"{flag} {value} trains nothing; give at least 1")
    if unread := [w for w in given.command if w not in ("python", "python3", "main.py")]:
        raise ConfigError(f"{unread[0]!r:.80} is no flag of the released main.py; leave it out")
    name = given.dataset or PurePosixPath(given.data_dir).name
    base, augmented = name.removesuffix("-Aug"), name.endswith("-Aug")
    if not points and base.lower() in recipe_names():
        about = read_recipe(base.lower())[1]
        points, labels = (about.points or 0, about.labels) if about else (0, 0)
    if not points:
        raise ConfigError(
            f"the size of {name or 'the dataset'!r} is not known, and --warmup counts steps; give "
            f"data=DATASET, the converted dataset"
        )
    gpus = gpus or (1 if given.device is not None else GPUS)
    batch = given.batch_size * gpus
    total = given.epochs * math.ceil((points + labels * augmented) / batch)
    keys = _keys(given, name, augmented, gpus, data or f"data/{base}")
    keys["warmup"] = float(f"{min(given.warmup / total, 0.99):.4g}")
    notes = [
        f"batch_size={batch} is global: --batch-size {given.batch_size} on each of {gpus} GPUs",
        f"warmup={keys['warmup']} is a share: {given.warmup} of {total} steps, in {given.epochs} "
        f"epochs of {points:,} points" + (f" and {labels:,} label texts" if augmented else ""),
    ]
    if given.warmup >= total:
        notes.append("the released run ends before its warm-up does; lower warmup")
    return Translated(keys, [*notes, *_notes(given, name)])


def _keys(
    given: argparse.Namespace, name: str, augmented: bool, gpus: int, data: str
) -> dict[str, Any]:
    batch = given.batch_size * gpus
    weights = f"ngame_pretrained_models/{name}/state_dict.pt"
    encoder = {
        "name": given.tf, "max_length": given.maxlen, "bottleneck": given.bottleneck_dims,
        "dropout": given.dropout, "internal_dropout": None, "learning_rate": given.lr2,
        "weight_decay": given.wd2, "gradient": "mean", "compile": given.compile,
        "autocast": "off" if given.fp32encoder else "fp16",
    }  # fmt: skip
    if given.use_ngame_encoder:
        path = given.use_ngame_encoder
        encoder["weights"] = weights if path == "NGAME" else path
    return {
        "data": data,
        "output": f"runs/{given.expname}",
        "seed": given.seed,
        "num_workers": gpus,
        "batch_size": batch,
        "epochs": given.epochs,
        "loss_every": 0 if given.noloss else 100,
        "encoder": encoder,
        "classifier": {
            "precision": "fp16" if given.fp16xfc else "fp32", "init": "normal", "init_std": 0.02,
            "learning_rate": given.lr1, "momentum": given.mo, "weight_decay": given.wd1,
        },
        "feed": {
            "augment": 1.0 if augmented else 0.0, "filter_labels": "negative",
            "streams": math.gcd(batch, 8),
        },
        "evaluation": {"every": 5.0},
    }  # fmt: skip


def _notes(given: argparse.Namespace, name: str) -> list[str]:
    """Sentences on flags whose meaning is not that of one key."""
    a, b = (0.6, 2.6) if "Amazon" in name else (0.5, 0.4) if "Wiki" in name else (0.55, 1.5)
    notes = {
        "evaluation": "every 5 epochs, on points held out of the training set: the released code "
        "takes the best of the test set, and its figures are a little optimistic",
        "data": f"convert with tokenizer={given.tf} max_length={given.maxlen} propensity_a={a} "
        f"propensity_b={b}; the released code counts label texts as points in propensities",
        "encoder.gradient": "mean divides by the workers, as DDP does there; with sum the result "
        "does not depend on their number",
        "feed.augment": name.endswith("-Aug")
        and f"label texts are read beside the points: give {name.removesuffix('-Aug')}, not {name}",
        "--noloss": given.noloss and "loss_every=0: no loss is shown",
        "--accum": given.accum > 1 and "has no key: logits never exist for all labels at once",
        "--custom-cuda, --default-impl": (given.custom_cuda or given.default_impl)
        and "have no key: kernels are chosen by the device",
        "--pre-tok": given.pre_tok and "has no key, and no effect in the released code either",
        "--checkpoint-resume": given.checkpoint_resume
        and "has no key: the same command resumes the run at output",
        "--infer": given.infer
        and "is `renee-ray evaluate`, of a run that from-renee --checkpoint has imported",
        "--rank, --dist-url, --world-size": (given.dist_url or given.world_size > 1 or given.rank)
        and "have no key: Ray places workers on all nodes; --gpus is their number in all",
        "--device": given.device is not None and "has no key: num_workers=1 uses one GPU",
    }
    return [f"{key} {text}" for key, text in notes.items() if text]


def as_yaml(translated: Translated, command: str) -> str:
    """Writes the configuration as a YAML file with its notes as comments."""
    notes = [f"from: {' '.join(command.split())}", *translated.notes]
    content = yaml.safe_dump(translated.keys, sort_keys=False, allow_unicode=True)
    return "".join(f"# {note}\n" for note in notes) + content
