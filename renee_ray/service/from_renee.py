"""`renee-ray from-renee --checkpoint`: a checkpoint of the released code becomes a run."""

from __future__ import annotations

import torch

from renee_ray.checkpoint.from_renee import load_released, rank_files
from renee_ray.checkpoint.state import State
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.config.from_renee import translate
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import adamw
from renee_ray.model.model import build_model
from renee_ray.rank.collectives import Ranks
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.train.resuming import identity
from renee_ray.service.train.train import check


def import_run(command: str, directory: str, data: str, output: str, gpus: int) -> str:
    """Writes the checkpoint in `directory` as a run at `output`, before its first step.

    `train` goes on from it as from first weights: the released files have no optimizer's state.
    Memory: the classifier in fp32, and its momentum.

    Returns:
        the name of the checkpoint.

    Raises:
        ReneeError: command, checkpoint and dataset do not belong together, or `output` is taken.
    """
    dataset, files = Dataset.open(data), rank_files(directory)
    points, num_labels = dataset.manifest.num_points("train"), dataset.manifest.num_labels
    keys = translate(
        command, gpus=gpus or len(files), data=dataset.path, points=points, labels=num_labels
    ).keys
    run = RunDirectory(absolute(output))
    if run.read(RUN_FILE) is not None:
        raise ReneeError(f"{run.path} is a run already; give another output")
    keys["output"], keys["encoder"]["weights"] = run.path, ""  # the checkpoint has all weights
    config = make_config(RunConfig, keys, where="the translated command")
    check(config, dataset)
    model = build_model(config, num_labels, Ranks(), torch.device("cpu"))
    load_released(files, model.encoder, model.shard)
    facts = {
        "num_labels": num_labels,
        "dim": model.encoder.dim,
        "precision": model.shard.weights.precision,
        "tokenizer": dataset.manifest.tokenizer,
    }
    checkpoints, metric = run.checkpoints(), config.evaluation.metric
    writer = CheckpointWriter(checkpoints, Ranks(), config.checkpoint.keep, metric, False).start()
    optimizer = adamw(model.encoder, config.encoder)
    writer.save(State(facts=facts), model.encoder, optimizer, model.shard, {})
    if not writer.wait():
        raise ReneeError(f"{run.path} cannot be written; see the warnings")
    run.write(RUN_FILE, {"config": config.model_dump(), "dataset": identity(dataset)})
    return run.checkpoint("last").name
