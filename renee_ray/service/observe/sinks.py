"""Curves of a run in TensorBoard, MLflow or Weights & Biases, as `observe.log_to` asks.

Rank 0 writes them. A sink that fails is reported once and dropped; training goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from renee_ray.config.overrides import dotted
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError, reason
from renee_ray.rank.recorder import GPU_MEMORY

T = TypeVar("T")

log = logging.getLogger(__name__)

CURVES = (
    "loss", "rows_per_second", "padding", "encoder_lr", "classifier_lr", "peak_rss_gib", "skipped",
    "loss_scale", "epoch", *GPU_MEMORY,
)  # fmt: skip
"""Keys of a record of training/loop that are drawn over steps, beside seconds by phase."""
CLOSE_S = 30.0
EXPERIMENT, RUN_TAG = "renee_ray", "renee_ray.output"


def check_sinks(config: RunConfig) -> None:
    """Raises ReneeError where a sink that is asked for is not available."""
    for name in config.observe.log_to:
        if importlib.util.find_spec(name) is None:
            raise ReneeError(
                f"observe.log_to={name} needs the package {name}, which is not "
                f"installed; pip install 'renee_ray[{name}]' on every node"
            )
    where = _tensorboard_dir(config)
    if "tensorboard" in config.observe.log_to and "://" in where:
        raise ReneeError(
            f"TensorBoard's files cannot be appended to at {where}; set observe.tensorboard_dir "
            f"to a directory that the nodes share, or use observe.log_to=[mlflow]"
        )
    if "mlflow" in config.observe.log_to and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ReneeError(
            "observe.log_to=mlflow needs MLFLOW_TRACKING_URI in the environment of every node; "
            "set it to the address of an MLflow server"
        )
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
    if "wandb" in config.observe.log_to and not (offline or os.environ.get("WANDB_API_KEY")):
        raise ReneeError(
            "observe.log_to=wandb needs WANDB_API_KEY in the environment of every node; set it, or "
            "WANDB_MODE=offline to write files for `wandb sync`"
        )
    homeless = offline and "://" in config.output and not os.environ.get("WANDB_DIR")
    if "wandb" in config.observe.log_to and homeless:
        raise ReneeError(
            f"WANDB_MODE=offline cannot write its files to {config.output}; set WANDB_DIR in the "
            f"environment of every node to a directory there"
        )


class Sinks:
    """All sinks of a run, which rank 0 makes and a thread writes to.

    Args:
        step: the run begins, or goes on, after it; later entries of a run cut off are replaced.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self._config, self._step = config, step
        self._open: dict[str, TensorBoard | MLflow | WandB] = {}
        self._queue: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)
        self._thread.start()

    def record(self, record: Mapping[str, Any], phases: Mapping[str, float]) -> None:
        """Takes a record of training/loop, and seconds a step by phase."""
        numbers = {f"train/{key}": float(record[key]) for key in CURVES if record[key] is not None}
        numbers |= {f"seconds/{phase}": seconds for phase, seconds in phases.items()}
        self._queue.put((record["step"], numbers))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._queue.put((step, {f"validation/{name}": value for name, value in metrics.items()}))

    def close(self) -> None:
        """Waits until everything is written, CLOSE_S at most."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        for name in self._config.observe.log_to:
            opened = self._guarded(name, partial(SINKS[name], self._config, self._step))
            if opened is not None:
                self._open[name] = opened
        while (entry := self._queue.get()) is not None:
            for kind, sink in list(self._open.items()):
                self._guarded(kind, partial(sink.write, *entry))
        for kind, sink in list(self._open.items()):
            self._guarded(kind, sink.close)

    def _guarded(self, name: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # of a library whose failure must not end the training
            self._open.pop(name, None)
            log.warning("%s: %s; nothing more is written there", name, reason(error))
            return None


class TensorBoard:
    """Event files in a directory."""

    def __init__(self, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter  # which has no types
        self._writer = writer(_tensorboard_dir(config), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment `renee_ray`; the same one when training is resumed."""

    def __init__(self, config: RunConfig, step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        self._run = self._known(experiment, config.output) or self._created(experiment, config)
        self._client.update_run(self._run, status="RUNNING")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow has no @ in names.
        metrics = [
            self._metric(name.replace("@", "_at_"), number, now, step)
            for name, number in numbers.items()
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)

    def _known(self, experiment: str, output: str) -> str | None:
        quoted = f'"{output}"' if "'" in output else f"'{output}'"
        runs = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = {quoted}")
        return runs[0].info.run_id if runs else None

    def _created(self, experiment: str, config: RunConfig) -> str:
        from mlflow.entities import Param

        name = os.path.basename(config.output)
        created = self._client.create_run(experiment, tags={RUN_TAG: config.output}, run_name=name)
        run: str = created.info.run_id
        params = [Param(key, str(value)) for key, value in dotted(config.model_dump())]
        self._client.log_batch(run, params=params)
        return run


class WandB:
    """A run of the project `renee_ray`; the same one when training is resumed."""

    def __init__(self, config: RunConfig, step: int) -> None:
        import wandb

        local = None if "://" in config.output else config.output
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
            id=hashlib.sha256(config.output.encode()).hexdigest()[:16],
            resume="allow",
            name=os.path.basename(config.output),
            config=dict(dotted(config.model_dump(mode="json"))),
            dir=os.environ.get("WANDB_DIR", local),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, x_disable_meta=True
            ),
        )
        # A resumed run repeats steps, which wandb's own counter does not allow.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[RunConfig, int], TensorBoard | MLflow | WandB]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def _tensorboard_dir(config: RunConfig) -> str:
    return config.observe.tensorboard_dir or f"{config.output}/tensorboard"
