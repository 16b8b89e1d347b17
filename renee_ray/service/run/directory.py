"""The directory of a run: its configuration, its dataset and its checkpoints.

run.json            configuration, and why it was chosen, dataset and plan of the last start
history.json        losses and evaluations (service/run/history.py)
status.json         its state (renee_ray/report/status.py); report.html: it as a page
lease.json          the driver that trains it now (service/run/lease.py)
checkpoints/        checkpoint/state.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import Checkpoint
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset, has_manifest
from renee_ray.data.storage import make_directory, read_json, replace_file
from renee_ray.errors import ConfigError, ReneeError

RUN_FILE, HISTORY_FILE = "run.json", "history.json"


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, local or remote."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.rstrip("/") or "/")

    def read(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON file of the run; None where it is not there."""
        return read_json(f"{self.path}/{name}")

    def write(self, name: str, content: dict[str, Any], patience: float | None = None) -> None:
        make_directory(self.path, patience)
        replace_file(f"{self.path}/{name}", json.dumps(content, indent=1).encode(), patience)

    def config(self) -> RunConfig:
        """Returns the configuration that the run was started with.

        Raises:
            ReneeError: there is no run here.
        """
        saved = self.read(RUN_FILE)
        if saved is None:
            raise ReneeError(
                f"{self.path} is not a run of renee_ray: no {RUN_FILE}; "
                f"run `renee-ray train CONFIG data=DATASET output={self.path}` first"
            )
        self._part(saved, "dataset")
        config = self._part(saved, "config")
        try:
            return make_config(RunConfig, config, where=f"{self.path}/{RUN_FILE}")
        except ConfigError as error:
            raise ReneeError(f"{error}; this needs the renee_ray that made the run") from None

    def _part(self, saved: dict[str, Any], name: str) -> dict[str, Any]:
        part = saved.get(name)
        if not isinstance(part, dict):
            raise ReneeError(
                f"{self.path}/{RUN_FILE} is damaged: it has no {name}; give the directory of a run"
            )
        return part

    def dataset(self) -> Dataset:
        """Opens the dataset that the run was trained on, for its label counts, texts and points.

        Raises:
            ReneeError: it is not where it was any more.
        """
        path = str(self._part(self.read(RUN_FILE) or {}, "dataset").get("path"))
        if not has_manifest(path):
            raise ReneeError(
                f"this needs the dataset that {self.path} was trained on, and it is not at {path} "
                f"any more; put it back there"
            )
        return Dataset.open(path)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path)

    def checkpoint(self, which: str) -> Checkpoint:
        """Finds the `best` whole checkpoint, by `evaluation.metric`, the `last`, or one by name.

        Without a validation split, the best one is the last.

        Raises:
            ReneeError: there is none.
        """
        found = self.checkpoints()
        if which not in ("best", "last"):
            return found.at(which)
        chosen = found.best(self.config().evaluation.metric) if which == "best" else found.newest()
        if chosen is None:
            raise ReneeError(
                f"{self.path} holds no committed checkpoint yet; wait for the first evaluation, "
                f"or run `renee-ray train` on it again"
            )
        return chosen
